"""The oracle is bitsandbytes' Linear8bitLt on the CPU: the codes of LLM.int8() and its products.

It works in float16, we in the input's dtype; the bound on the difference is float16's rounding of x, of the weight
columns in 16 bits and of the output.
"""

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.nn import Int8Params, Linear8bitLt
from torch import Tensor, nn

from lowbit.nn.linear import QuantLinear
from lowbit.numerics.scheme import QuantScheme
from lowbit.tensors import PackedWeight

N, K, M = 40, 64, 9


def make_layers(threshold: float) -> tuple[Linear8bitLt, QuantLinear]:
    generator = torch.Generator().manual_seed(0)
    w, bias = torch.randn(N, K, generator=generator).half(), torch.randn(N, generator=generator).half()
    theirs = Linear8bitLt(K, N, has_fp16_weights=False, threshold=threshold)
    theirs.weight, theirs.bias = Int8Params(w, requires_grad=False), nn.Parameter(bias)
    codes, maxima, _ = bnb.int8_vectorwise_quant(w)
    theirs.weight.CB, theirs.weight.SCB, theirs.weight.data = codes, maxima, codes
    packed = PackedWeight(QuantScheme.parse(f"int8-t{threshold:g}"), (N, K), codes, (maxima / 127).view(-1, 1))
    return theirs.eval(), QuantLinear.from_packed(packed, bias)


def make_input(outliers: bool) -> Tensor:
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(1)).clamp(-5, 5)
    if outliers:
        x[3, 10], x[5, 41], x[0, 10], x[8, 0] = 30.0, -6.0, 7.5, 6.01
    x[2] = 0
    return x.half()


@pytest.mark.parametrize("outliers", [False, True], ids=["no outliers", "outliers"])
@pytest.mark.parametrize("threshold", [0.0, 6.0, 2.5])
@torch.no_grad()
def test_products_are_theirs_within_float16_rounding(threshold: float, outliers: bool) -> None:
    theirs, ours = make_layers(threshold)
    x = make_input(outliers)
    expected, y = theirs(x).float(), ours(x).float()
    assert (y - expected).abs().max() <= 3 * 2**-11 * expected.abs().max()
    if outliers and threshold == 6.0:  # and the decomposition is worth its work
        exact = x.float() @ ours.packed.dequantize().T + ours.bias.float()
        plain = make_layers(0.0)[1](x).float()
        assert (y - exact).norm() < 0.5 * (plain - exact).norm()


@torch.no_grad()
def test_a_value_at_the_threshold_is_an_outlier_and_its_whole_column_goes() -> None:
    _, ours = make_layers(6.0)
    x = torch.zeros(2, K)
    x[0, 5], x[1, 5], x[1, 6] = 6.0, 0.123, 1.0
    w = ours.packed.dequantize()
    expected = x @ w.T + ours.bias.float()  # 0.123 in column 5 is not rounded, and 1.0 is the largest of its row
    torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_gradients_reach_the_input() -> None:
    _, ours = make_layers(6.0)
    x = make_input(True).float().requires_grad_()
    with torch.enable_grad():
        ours(x).sum().backward()
    torch.testing.assert_close(x.grad, ours.packed.dequantize().sum(0).expand(M, K))
