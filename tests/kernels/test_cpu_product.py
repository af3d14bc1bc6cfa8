"""The int8 product of the CPU. Oracle: products of 64-bit integers, which both ways must give bit by bit."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lowbit.kernels import cpu_product
from lowbit.kernels.reference import int8_product

needs_vnni = pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="u8 x s8 is exact only with VNNI")


def _codes(rows: int, columns: int) -> Tensor:
    return torch.randint(-128, 128, (rows, columns), generator=torch.Generator().manual_seed(rows)).to(torch.int8)


@needs_vnni
@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 17, 33), (17, 40, 576), (64, 5, 2)], ids=str)
def test_the_prepacked_product_is_exact(shape: tuple[int, int, int]) -> None:
    M, N, K = shape  # noqa: N806
    q, codes = _codes(M, K), _codes(N, K)
    layout = torch.ops.onednn.qlinear_prepack(codes, None)
    assert torch.equal(cpu_product.prepacked(q, layout), int8_product(q, codes).float())


@needs_vnni
def test_sums_at_the_ends_of_the_range_do_not_overflow() -> None:
    q, codes = torch.full((2, 4096), -128, dtype=torch.int8), torch.full((3, 4096), -128, dtype=torch.int8)
    layout = torch.ops.onednn.qlinear_prepack(codes, None)
    assert torch.equal(cpu_product.prepacked(q, layout), torch.full((2, 3), 4096.0 * 128 * 128))


@needs_vnni
def test_the_faster_way_is_found_by_timing_once_and_codes_may_change(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[Callable[[], Tensor]] = []

    def seconds(call: Callable[[], Tensor]) -> float:
        assert call().shape == (32, 48)
        timed.append(call)
        return float(len(timed))  # prepacked is timed first

    monkeypatch.setattr(cpu_product, "least_seconds", seconds)
    cpu_product.prepacked_is_faster.cache_clear()
    try:
        q, codes = _codes(20, 64), _codes(48, 64)
        for _ in range(2):
            assert torch.equal(cpu_product.product(q, codes), int8_product(q, codes).float())
            codes.neg_()
        assert cpu_product.product(q, codes).dtype == torch.float32
        assert len(timed) == 2
    finally:
        cpu_product.prepacked_is_faster.cache_clear()


def test_no_tokens_make_no_rows() -> None:
    assert cpu_product.product(_codes(0, 16), _codes(8, 16)).shape == (0, 8)


def test_the_timing_really_runs() -> None:
    assert cpu_product.least_seconds(lambda: torch._int_mm(_codes(4, 16), _codes(8, 16).T)) > 0
