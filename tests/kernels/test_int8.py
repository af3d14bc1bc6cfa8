"""What int8 kernels share, who may run, and LLM.int8(). Oracles: kernels/reference.py and arithmetic in 64 bits."""

import pytest
import torch
from torch import Tensor

from lowbit.kernels import fp8, int8_linear, int8_outlier
from lowbit.kernels.cuda import int8_decode, int8_hopper, int8_prefill
from lowbit.kernels.int8 import Scaling, int8_weight, pad_columns, weight_refusal
from lowbit.kernels.int8_matmul import CANDIDATES, int8_matmul
from lowbit.kernels.int8_outlier import outlying
from lowbit.kernels.registry import explain, use
from lowbit.nn.linear import QuantLinear
from lowbit.numerics.scheme import QuantScheme
from lowbit.tensors import PackedWeight


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _packed(scheme: str, rows: int = 24, columns: int = 36) -> PackedWeight:
    return PackedWeight.from_float(_normal(rows, columns), QuantScheme.parse(scheme), torch.float32)


def test_rows_are_padded_with_zeros_to_sixteen_bytes() -> None:
    q = torch.ones(3, 17, dtype=torch.int8)
    padded = pad_columns(q)
    assert padded.shape == (3, 32)
    assert torch.equal(padded[:, :17], q)
    assert not padded[:, 17:].any()
    assert pad_columns(padded) is padded


def test_the_kernels_form_of_a_weight_is_made_once_and_again_after_a_write() -> None:
    weight = _packed("w8a8")
    ready = int8_weight(weight)
    assert int8_weight(weight) is ready
    assert torch.equal(ready.sums, weight.codes.sum(1, dtype=torch.int32))
    weight.codes.zero_()
    assert not int8_weight(weight).sums.any()


def test_scaling_is_the_reference_of_every_epilogue() -> None:
    sums = torch.tensor([[100, -200], [300, 400]], dtype=torch.int32)
    scaling = Scaling(
        torch.float32,
        torch.tensor([0.5, 2.0]),
        torch.tensor([[1.0], [0.25]]),
        torch.tensor([1, -2], dtype=torch.int32),
        torch.tensor([10, 20], dtype=torch.int32),
        torch.tensor([1.0, -1.0]),
    )
    assert scaling.apply(sums).tolist() == [[46.0, -28.5], [641.0, 219.0]]


@pytest.mark.parametrize("shape", [(1, 17, 17), (17, 1, 1), (5, 24, 576)], ids=str)
def test_int8_matmul_is_exact_here_and_its_other_kernels_say_why_not(shape: tuple[int, int, int]) -> None:
    M, N, K = shape  # noqa: N806
    generator = torch.Generator().manual_seed(0)
    q, w = (torch.randint(-128, 128, (rows, K), dtype=torch.int8, generator=generator) for rows in (M, N))
    assert torch.equal(int8_matmul(q, w), (q.long() @ w.long().T).int())
    reasons = {candidate.name: candidate.refusal(q, w) for candidate in CANDIDATES}
    assert [name for name, reason in reasons.items() if reason is None] == ["reference"]
    assert "CUDA device" in str(reasons["mma_m8n8k16"])


@pytest.mark.parametrize(
    ("scheme", "words"),
    [("w8a8-g12", "a scale per group"), ("w4a16", "not symmetric int8"), ("w8a8-asym", "not symmetric int8")],
)
def test_weights_that_int8_products_cannot_take_are_refused(scheme: str, words: str) -> None:
    assert words in str(weight_refusal(_packed(scheme)))


def test_a_row_whose_sum_may_overflow_is_refused() -> None:
    codes = torch.zeros(1, 131072, dtype=torch.int8)
    weight = PackedWeight(QuantScheme.parse("w8a8"), (1, 131072), codes, torch.ones(1, 1))
    assert "may overflow" in str(weight_refusal(weight))


def test_cuda_kernels_refuse_a_cpu() -> None:
    x, weight = _normal(2, 36), _packed("w8a8")
    for refusal in (int8_linear.hopper_refusal, int8_linear.triton_refusal, int8_linear.turing_refusal):
        assert "runs on CUDA devices" in str(refusal(x, weight))


def test_fp8_products_say_what_they_lack() -> None:
    x = _normal(2, 512)
    for scheme, refusal, reason in [
        ("fp8", fp8.refusal, "runs on CUDA devices"),
        ("fp8-tile128", fp8.tiles_refusal, "runs on CUDA devices"),
        ("fp8-tile64", fp8.refusal, "not fp8 with a scale per channel or tensor"),
        ("fp8-static", fp8.refusal, "does not quantize activations per token"),
        ("fp8-static", fp8.static_refusal, "runs on CUDA devices"),
        ("fp8", fp8.static_refusal, "has no calibrated scale"),
        ("fp8-tile64", fp8.tiles_refusal, "tile of 128 x 128"),
    ]:
        assert reason in str(refusal(x, _packed(scheme, 128, 512)))
    assert "no multiple of 512" in str(fp8.tiles_refusal(x, _packed("fp8-tile128", 128, 128)))


def test_outlier_columns_stay_exact_where_plain_int8_loses_the_rest() -> None:
    """A column of 60 takes the whole range of the others; LLM.int8(), section 3.2."""
    x, w, bias = _normal(8, 256), _normal(24, 256, seed=1) * 0.1, _normal(24)
    x[:, 7] = 60.0
    errors = {}
    for scheme in ("w8a8", "int8-t6"):
        layer = QuantLinear.from_packed(PackedWeight.from_float(w, QuantScheme.parse(scheme), torch.float32), bias)
        exact = torch.nn.functional.linear(x, layer.packed.dequantize(), bias)
        errors[scheme] = float((layer(x) - exact).norm() / exact.norm())
    assert errors["int8-t6"] < errors["w8a8"] / 5


@pytest.mark.parametrize("columns", [1, 33, 256])
@pytest.mark.parametrize("scheme", ["int8-t6", "int8-t1.5", "int8-t0"])
def test_the_outlier_kernel_is_its_reference(scheme: str, columns: int) -> None:
    x = _normal(8, columns) * 2
    x[2], x[3, 0] = 0, 30.0
    layer = QuantLinear.from_packed(_packed(scheme, columns=columns))
    with use("reference"):
        wanted = layer(x)
    with use("int8_outlier"):
        torch.testing.assert_close(layer(x), wanted, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_looking_at_a_fixed_number_of_columns_finds_the_outliers_among_them(threshold: float) -> None:
    x = _normal(8, 100).clamp(-5, 5).half()
    x[0, 7], x[3, 70] = 9.0, -6.0
    found, every = outlying(x, threshold, None)
    assert sorted(found.tolist()) == ([7, 70] if threshold else [])
    assert every.all()
    columns, apart = outlying(x, threshold, 64)
    assert len(columns) == 64
    assert sorted(columns[apart].tolist()) == sorted(found.tolist())
    assert outlying(x, threshold, 1)[0].tolist() == [7]
    assert len(outlying(x[:, :10], threshold, 64)[0]) == 10


def test_what_a_gpu_computes_of_outliers_is_the_same_here(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = QuantLinear.from_packed(_packed("int8-t6", columns=256)), _normal(8, 256)
    x[:, 9], x[2, 200] = 60.0, 8.0
    with use("int8_outlier"):
        wanted = layer(x)
        monkeypatch.setattr(int8_outlier, "outlying", lambda half, threshold, most: outlying(half, threshold, 64))
        torch.testing.assert_close(layer(x), wanted, rtol=1e-6, atol=1e-5)


def test_only_the_outlier_kernel_takes_outlier_schemes() -> None:
    reasons = explain("wa8_linear", _normal(2, 36), _packed("int8-t6"))
    ready = [name for name, reason in reasons.items() if reason == "ready"]
    assert ready == ["int8_outlier", "reference"]
    assert "keeps no columns" in explain("wa8_linear", _normal(2, 36), _packed("w8a8"))["int8_outlier"]


@pytest.mark.parametrize("tokens", [1, 16, 64, 100, 300])
@pytest.mark.parametrize("shape", [(28672, 4096), (4096, 4096), (4096, 14336), (17, 128), (8192, 28672)], ids=str)
def test_the_decode_kernel_is_chosen_within_the_chips_limits(tokens: int, shape: tuple[int, int]) -> None:
    chosen = int8_decode.choose(tokens, *shape, processors=132)
    assert chosen.shared_bytes <= 227 * 1024  # of one block on sm_90
    assert chosen.split in (1, 2, 4, 8)  # 8: the largest cluster that every device of sm_90 can run
    assert chosen.split == 1 or shape[1] >= chosen.split * 2 * int8_decode.STEP
    assert chosen.tokens >= min(tokens, 128)


@pytest.mark.parametrize("columns", [192, 256])
def test_a_prefill_block_fits_the_chip(columns: int) -> None:
    assert int8_prefill.prefill_bytes(columns) <= 227 * 1024  # of one block on sm_90


def test_narrower_tiles_are_taken_where_they_fill_the_last_round() -> None:
    assert int8_prefill.choose_columns(1024, 6144, processors=132) == 192
    assert {int8_prefill.choose_columns(M, N, 132) for M in (1024, 4096) for N in (4096, 28672)} == {256}


def test_kernels_that_quantize_take_rows_of_whole_16_bytes() -> None:
    x = torch.zeros(4, 64, dtype=torch.bfloat16)
    assert int8_hopper.takes_floats(x)
    assert int8_hopper.takes_floats(x[:, :32])
    assert not int8_hopper.takes_floats(x[:, 1:33])  # starts two bytes late
    assert not int8_hopper.takes_floats(x[:, :24])
    assert not int8_hopper.takes_floats(x.T)
    assert not int8_hopper.takes_floats(x.float())
