"""The meaning of the ops. Oracles: the dequantized weight in torch's own linear, and compressed-tensors' fake_quantize
for activations."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor
from torch.nn.functional import linear

from lowbit.kernels import reference
from lowbit.numerics.scheme import QuantScheme
from lowbit.tensors import PackedWeight

WEIGHT_ONLY = ["w4a16-g32", "w4a16-g32-asym", "w3a16", "w8a16-tensor-asym", "nf4-b64", "fp4-b32-dq"]
DYNAMIC = ["w8a8", "w8a8-dynamic-asym", "w4a8-g32", "w8a8-asym", "fp8"]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def made(text: str, rows: int = 17, columns: int = 96) -> PackedWeight:
    return PackedWeight.from_float(random(rows, columns, seed=1), QuantScheme.parse(text), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("text", WEIGHT_ONLY)
def test_weights_alone_are_decoded_and_multiplied(text: str, dtype: torch.dtype) -> None:
    x, bias, weight = random(5, 96, dtype=dtype), random(17, seed=2, dtype=dtype), made(text)
    y = reference.wna16_linear(x, weight, bias)
    assert y.dtype == dtype
    assert torch.equal(y, linear(x, weight.dequantize().to(dtype), bias))


def rounded_by_them(x: Tensor, scheme: QuantScheme, scale: Tensor | None, zero: Tensor | None) -> Tensor:
    activations = scheme.activations
    assert activations is not None
    args = QuantizationArgs(
        num_bits=8,
        type="float" if activations.format.kind == "float" else "int",
        symmetric=activations.symmetric,
        strategy=activations.granularity,
        dynamic=activations.dynamic,
    )
    if scale is None:
        low, high = torch.aminmax(x, dim=-1, keepdim=True)
        scale, zero = calculate_qparams(low, high, args)
    return fake_quantize(x, scale, torch.zeros_like(scale) if zero is None else zero, args)


@pytest.mark.parametrize("text", DYNAMIC)
def test_activations_are_rounded_as_compressed_tensors_rounds_them(text: str) -> None:
    x, weight = random(5, 96), made(text)
    x[3] = 0
    expected = linear(rounded_by_them(x, weight.scheme, None, None), weight.dequantize())
    assert torch.equal(reference.wa8_linear(x, weight, None), expected)


@pytest.mark.parametrize(
    ("text", "zero"), [("w8a8-static", None), ("w8a8-static-asym", torch.tensor([-3], dtype=torch.int8))]
)
def test_a_static_grid_is_used_as_given(text: str, zero: Tensor | None) -> None:
    x, weight, scale = random(5, 96), made(text), torch.tensor([0.01])  # saturates beyond 1.27
    expected = linear(rounded_by_them(x, weight.scheme, scale, zero), weight.dequantize())
    assert torch.equal(reference.wa8_linear(x, weight, None, scale, zero), expected)
    assert x.max() > 2


def test_a_token_of_zeros_stays_zero() -> None:
    for text in DYNAMIC:
        assert (reference.wa8_linear(torch.zeros(2, 96), made(text), None) == 0).all()


def test_int8_product_is_exact_where_float32_is_not() -> None:
    q = torch.full((1, 4099), 127, dtype=torch.int8)
    q[0, 0] = 126
    assert reference.int8_product(q, q).item() == 4098 * 127**2 + 126**2
    assert reference.int8_product(q, q).dtype == torch.int32
