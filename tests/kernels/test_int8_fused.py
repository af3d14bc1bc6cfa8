"""Activations quantized once and multiplied many times. Oracle: QuantLinear on the activations themselves."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from lowbit.kernels.int8_fused import multiply, quantize_tokens, rms_norm_quantize, silu_product_quantize
from lowbit.nn.linear import QuantLinear
from lowbit.numerics.scheme import QuantScheme
from lowbit.tensors import PackedWeight


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-dynamic-asym"])
@pytest.mark.parametrize("columns", [36, 64])
def test_quantized_once_is_what_each_layer_would_have_done(scheme: str, columns: int) -> None:
    x = _normal(5, columns)
    made = quantize_tokens(x, symmetric=scheme == "w8a8")
    for seed in (1, 2):
        weight = PackedWeight.from_float(_normal(24, columns, seed=seed), QuantScheme.parse(scheme), torch.float32)
        layer = QuantLinear.from_packed(weight, _normal(24, seed=3))
        torch.testing.assert_close(multiply(made, weight, layer.bias, x.dtype), layer(x), rtol=1e-5, atol=1e-5)


def test_the_norm_before_a_layer_gives_its_codes_and_the_new_residual() -> None:
    x, residual, weight, smooth = _normal(5, 48), _normal(5, 48, seed=1), _normal(48, seed=2), torch.full((48,), 0.5)
    made, h = rms_norm_quantize(x, weight, 1e-5, residual, smooth)
    y = torch.nn.functional.rms_norm(x + residual, (48,), weight, 1e-5) * smooth
    assert torch.equal(h, x + residual)
    assert (made.q.int() - quantize_tokens(y).q.int()).abs().max() <= 1
    torch.testing.assert_close(made.q * made.scale[:, None], y, atol=float(made.scale.max()), rtol=0)


def test_the_gate_before_a_layer_gives_its_codes() -> None:
    gate, up = _normal(5, 48), _normal(5, 48, seed=1)
    assert torch.equal(silu_product_quantize(gate, up).q, quantize_tokens(silu(gate) * up).q)
    asymmetric = silu_product_quantize(gate, up, torch.ones(48), symmetric=False)
    assert asymmetric.zero is not None
