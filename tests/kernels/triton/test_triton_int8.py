"""The int8 kernels in Triton. Oracles: numerics/affine.py, and products of 64-bit integers.

Without a GPU Triton's interpreter runs them, in float16 and float32: it is silently wrong for bfloat16 (tests/gpu).
"""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from lowbit.kernels.int8 import Scaling, pad_columns
from lowbit.kernels.triton import int8_linear, int8_quantize
from lowbit.numerics.affine import choose_scale, encode, value_range
from lowbit.numerics.scheme import QuantScheme, TensorScheme

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(3, 17), (2, 576), (1, 4095)]
DTYPES = [torch.float16, torch.float32]


def _activations(text: str) -> TensorScheme:
    activations = QuantScheme.parse(text).activations
    assert activations is not None
    return activations


def _normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def _wanted(x: Tensor, scheme: TensorScheme) -> tuple[Tensor, Tensor, Tensor | None]:
    """(codes, scale, zero) by the CPU: on a GPU torch divides by a number by multiplying with its reciprocal."""
    x = x.cpu()
    scale, zero = choose_scale(*value_range(x, scheme), scheme, x.dtype)
    q, flat = encode(x, scale, zero, scheme).to(DEVICE), scale.float().flatten().to(DEVICE)
    return q, flat, None if zero is None else zero.int().flatten().to(DEVICE)


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-dynamic-asym"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tokens_get_the_codes_of_the_reference(shape: tuple[int, int], dtype: torch.dtype, scheme: str) -> None:
    x = _normal(*shape, dtype=dtype) * 3 + 1
    x[-1] = 0
    x[0] = _normal(shape[1], dtype=dtype, seed=1)
    made, (q, scale, zero) = (
        int8_quantize.quantize_rows(x, scheme == "w8a8"),
        _wanted(x, _activations(scheme)),
    )
    assert torch.equal(made.q[:, : shape[1]], q)
    assert torch.equal(made.scale, scale)
    assert (made.zero is None) == (zero is None)
    assert zero is None or torch.equal(made.zero, zero)
    assert made.q.shape[1] % 16 == 0


@pytest.mark.parametrize("scheme", ["w8a8-static", "w8a8-static-asym"])
def test_a_calibrated_grid_is_used_as_it_is(scheme: str) -> None:
    x, scale = _normal(5, 33, dtype=torch.float16), torch.tensor([0.01], device=DEVICE).half()
    zero = torch.tensor([-7], dtype=torch.int8, device=DEVICE) if scheme.endswith("asym") else None
    made = int8_quantize.quantize_static(x, scale, zero)
    assert torch.equal(made.q[:, :33], encode(x, scale, zero, _activations(scheme)))
    assert torch.equal(made.scale, scale.float())


def test_rows_of_a_wider_matrix_are_quantized_in_place() -> None:
    wide = _normal(4, 100, dtype=torch.float16)
    assert torch.equal(
        int8_quantize.quantize_rows(wide[:, 16:80]).q, int8_quantize.quantize_rows(wide[:, 16:80].contiguous()).q
    )


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_and_silu_are_rounded_as_the_unfused_modules_round(dtype: torch.dtype, symmetric: bool) -> None:
    x, residual = _normal(3, 200, dtype=dtype), _normal(3, 200, dtype=dtype, seed=1)
    weight, smooth = _normal(200, dtype=dtype, seed=2), _normal(200, dtype=dtype, seed=3).abs() + 0.5
    scheme = _activations("w8a8" if symmetric else "w8a8-dynamic-asym")
    h = x + residual
    normed = (h.float() * torch.rsqrt(h.float().square().mean(-1, keepdim=True) + 1e-5)).to(dtype)
    made, sums = int8_quantize.rms_norm_quantize(x, weight, 1e-5, residual, smooth, symmetric)
    assert torch.equal(sums, h)
    plain, same = int8_quantize.rms_norm_quantize(h, weight, 1e-5, symmetric=symmetric)
    assert same is h
    gemma, _ = int8_quantize.rms_norm_quantize(h, weight, 1e-5, symmetric=symmetric, weight_offset=1.0)
    gated = int8_quantize.silu_product_quantize(x, residual, smooth, symmetric)
    for got, y in (
        (made, normed * weight * smooth),
        (plain, normed * weight),
        (gemma, (normed.float() * (1 + weight.float())).to(dtype)),
        (gated, torch.nn.functional.silu(x) * residual * smooth),
    ):
        difference = (got.q[:, :200].int() - _wanted(y, scheme)[0].int()).abs()
        assert difference.max() <= 1  # a last bit of exp or rsqrt may decide a rounding
        assert (difference > 0).float().mean() < 0.02


@pytest.mark.parametrize("shape", [(1, 17, 17), (5, 40, 576), (33, 70, 100), (70, 33, 1)], ids=str)
def test_products_are_exact_and_scaled_on_the_way_out(shape: tuple[int, int, int]) -> None:
    M, N, K = shape  # noqa: N806
    generator = torch.Generator().manual_seed(0)
    q, w = (torch.randint(-128, 128, (rows, K), dtype=torch.int8, generator=generator) for rows in (M, N))
    exact = (q.long() @ w.long().T).int().to(DEVICE)
    q, w = pad_columns(q).to(DEVICE), pad_columns(w).to(DEVICE)
    assert torch.equal(int8_linear.product(q, w), exact)
    x_zero = torch.arange(M, dtype=torch.int32, device=DEVICE) - 9
    x_scale, w_scale = _normal(M).abs() * 0.01, _normal(N, 1, dtype=torch.float16, seed=1).abs() * 0.01
    per_token = Scaling(torch.float32, x_scale, w_scale, x_zero, w.sum(1, dtype=torch.int32), _normal(N, seed=2))
    one_scale = Scaling(torch.float16, x_scale[:1], w_scale[:1])
    for scaling, tolerance in ((per_token, 1e-6), (one_scale, 1e-3)):
        got, wanted = int8_linear.product(q, w, scaling).double(), scaling.apply(exact).double()
        assert (got - wanted).norm() <= tolerance * wanted.norm()  # two roundings of float32; half a bit of float16


@pytest.mark.parametrize("tile", int8_linear.TILES, ids=str)
def test_every_tile_of_the_table_computes_the_product(tile: int8_linear.Tile) -> None:
    generator = torch.Generator().manual_seed(0)
    q, w = (torch.randint(-128, 128, (rows, 48), dtype=torch.int8, generator=generator) for rows in (7, 9))
    assert torch.equal(int8_linear.product(q.to(DEVICE), w.to(DEVICE), None, tile).cpu(), (q.long() @ w.long().T).int())
