"""The int8 kernel of the CPU. Oracle: the reference in float64, whose only error is that of the last rounding; the
integer sum itself must be exact."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from lowbit.kernels import cpu, registry
from lowbit.kernels.reference import activation_scale, int8_product
from lowbit.numerics.affine import decode, encode
from lowbit.numerics.scheme import QuantScheme
from lowbit.tensors import PackedWeight

SIZES = (2, 17, 64, 576)
RUNS = ["w8a8", "w8a8-tensor", "w4a8", "w8a8-dynamic-asym", "w8a8-static", "w8a8-static-asym"]
STATIC = {"w8a8-static": (0.02, None), "w8a8-static-asym": (0.02, 5)}


def problem(text: str, tokens: int, rows: int, columns: int) -> tuple[Tensor, PackedWeight, list[Tensor | None]]:
    """(x [M, K], weight [N, K], [static scale, static zero])."""
    generator = torch.Generator().manual_seed(tokens * rows * columns)
    x = torch.randn(tokens, columns, generator=generator) * 10 ** torch.rand(tokens, 1, generator=generator)
    w = torch.randn(rows, columns, generator=generator)
    scale, zero = STATIC.get(text, (None, None))
    static = [
        None if scale is None else torch.tensor([scale]),
        None if zero is None else torch.tensor([zero], dtype=torch.int8),
    ]
    return x, PackedWeight.from_float(w, QuantScheme.parse(text), torch.float32), static


def in_float64(x: Tensor, weight: PackedWeight, static: list[Tensor | None]) -> Tensor:
    scheme = weight.scheme.activations
    assert scheme is not None
    scale, zero = activation_scale(x, scheme, *static)
    rounded = decode(encode(x, scale, zero, scheme), scale, zero, scheme)
    return rounded.double() @ weight.dequantize().double().T


@pytest.mark.parametrize("text", RUNS)
@pytest.mark.parametrize(("tokens", "rows", "columns"), [*product((1, 17), (1, 17, 576), SIZES), (64, 64, 64)])
def test_it_computes_what_the_reference_means(text: str, tokens: int, rows: int, columns: int) -> None:
    x, weight, static = problem(text, tokens, rows, columns)
    assert cpu.int8_refusal(x, weight) is None
    expected = in_float64(x, weight, static)
    # each of the oracle's K terms carries 2^-24 of two decodes; the kernel's sum is exact and rounds four times
    bound = 4 * columns**0.5 * 2**-24 * (x.norm(dim=-1, keepdim=True) * weight.dequantize().norm(dim=-1)) + 1e-12
    assert ((cpu.int8_linear(x, weight, None, *static) - expected).abs() <= bound).all()


@pytest.mark.parametrize("columns", SIZES)
def test_the_integer_sum_is_exact(columns: int) -> None:
    """With scales of one the output is the integer itself, also at the far ends of the range."""
    codes = torch.full((3, columns), -128, dtype=torch.int8)
    weight = PackedWeight.from_codes(codes, torch.ones(3, 1), None, QuantScheme.parse("w8a8-static"))
    for value in (-128.0, 127.0):
        x = torch.full((2, columns), value)
        y = cpu.int8_linear(x, weight, None, torch.ones(1))
        assert torch.equal(y, int8_product(x.to(torch.int8), codes).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_output_and_bias_have_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    x, weight, static = problem("w8a8", 5, 17, 64)
    x, bias = x.to(dtype), torch.linspace(-100, 100, 17).to(dtype)
    y = cpu.int8_linear(x, weight, bias)
    assert y.dtype == dtype
    assert torch.allclose(
        y.double(), in_float64(x, weight, static) + bias.double(), rtol=torch.finfo(dtype).eps, atol=1e-4
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("w8a8-asym", "are not symmetric int8 codes"),
        ("fp8", "are not symmetric int8 codes"),
        ("w8a8-g32", "has a scale per group, inside the integer sum"),
    ],
)
def test_it_refuses_what_it_would_get_wrong(text: str, reason: str) -> None:
    x, weight, _ = problem(text, 1, 17, 64)
    assert reason in (cpu.int8_refusal(x, weight) or "")


def test_it_refuses_other_devices() -> None:
    _, weight, _ = problem("w8a8", 1, 17, 64)
    assert cpu.int8_refusal(torch.empty(1, 64, device="meta"), weight) == "x is on meta, this kernel runs on the CPU"


def test_it_refuses_a_single_column_which_torch_misreads() -> None:
    """torch._int_mm of [1, 1] and [1, N] gives other numbers at every call; should this fail, the refusal can go."""
    x, weight, _ = problem("w8a8", 1, 17, 1)
    assert "one column" in (cpu.int8_refusal(x, weight) or "")
    q, codes = torch.ones(2, 1, dtype=torch.int8), torch.arange(64, dtype=torch.int8).view(64, 1)
    assert not torch.equal(torch._int_mm(q, codes.T), int8_product(q, codes))


def test_without_vnni_the_faster_product_is_found_by_timing_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, _ = problem("w8a8", 17, 64, 64)
    assert cpu.winners(x, weight) == () or not torch.cpu._is_vnni_supported()
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    slow: list[int] = []

    def seconds(call: Callable[[], Tensor]) -> float:
        assert call().shape == (32, 64)  # M, up to a power of two
        slow.append(len(slow))
        return 1.0 if len(slow) % 2 else 0.5  # int8 first

    monkeypatch.setattr(cpu, "least_seconds", seconds)
    cpu.int8_is_slower.cache_clear()
    try:
        assert registry.pick("wa8_linear", x, weight).name == "reference"
        assert registry.pick("wa8_linear", x[:20], weight).name == "reference"
        assert len(slow) == 2
        assert cpu.winners(x, problem("w8a8", 17, 64, 1)[1]) == ()  # refused: nothing to time
    finally:
        cpu.int8_is_slower.cache_clear()


def test_the_timing_really_runs() -> None:
    assert cpu.int8_is_slower(2, 16, 32, torch.float32, torch.get_num_threads()) in (True, False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_tokens_are_quantized_to_the_bits_of_the_general_way(dtype: torch.dtype) -> None:
    scheme = QuantScheme.parse("w8a8").activations
    assert scheme is not None
    x = (torch.randn(9, 577, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    x[0], x[1] = 0, x[1] * 1e-4
    q, scale = cpu.quantize_tokens(x)
    wanted, _ = activation_scale(x, scheme, None, None)
    assert torch.equal(scale, wanted)
    assert torch.equal(q, encode(x, wanted, None, scheme))
