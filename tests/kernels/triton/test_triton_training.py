"""The kernels of training in Triton. Oracles: numerics/fake.py under torch's autograd, the definition of KL, decoding.

Without a GPU Triton's interpreter runs them, in float16 and float32: it is silently wrong for bfloat16 (tests/gpu).
"""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from lowbit.kernels.triton import fake_quantize, kl_rows, nibbles_dequantize
from lowbit.numerics import fake
from lowbit.numerics.affine import choose_scale, value_range
from lowbit.numerics.formats import int_format
from lowbit.numerics.scheme import QuantScheme, TensorScheme
from lowbit.tensors import PackedWeight

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WEIGHTS = ["w4a16-g64", "w2a16-g64-asym", "w4a16", "w3a16-g48-asym"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def grid_of(w: Tensor, scheme: TensorScheme) -> tuple[Tensor, Tensor | None]:
    """A grid that saturates some weights, its zero-points between integers."""
    scale, zero = choose_scale(*value_range(w, scheme), scheme, torch.float32)
    return scale * 0.8, None if zero is None else zero.float() + 0.3


@pytest.mark.parametrize("stored", [torch.float16, torch.float32], ids=["fp16 scales", "fp32 scales"])
@pytest.mark.parametrize("text", WEIGHTS)
def test_fake_weights_are_bitwise_those_of_the_reference_and_so_are_their_gradients(
    text: str, stored: torch.dtype
) -> None:
    scheme, w, dy = QuantScheme.parse(text).weights, normal(24, 192), normal(24, 192, seed=1)
    scale, zero = grid_of(w, scheme)
    leaves = [None if one is None else one.clone().requires_grad_() for one in (w, scale, zero)]
    expected = fake.fake_quantize(*leaves, scheme, stored)
    expected.backward(dy)
    found = fake_quantize.fake_quantize(w, scale, zero, scheme, stored, torch.float32)
    dw, ds, dz = fake_quantize.fake_quantize_backward(dy, w, scale, zero, scheme, stored)
    assert torch.equal(found, expected)
    assert torch.equal(dw, leaves[0].grad)
    assert torch.allclose(ds, leaves[1].grad, rtol=1e-5, atol=1e-5)  # sums of up to 192 terms in another order
    if zero is not None:
        assert torch.allclose(dz, leaves[2].grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("shape", [(3, 50, 96), (5, 7), (1, 4096, 4)], ids=["runs of 64", "odd", "whole runs"])
@pytest.mark.parametrize("text", ["w8a8-static", "w8a8-static-asym"])
def test_static_activations_and_the_gradient_of_their_scale_are_those_of_the_reference(
    text: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    scheme = QuantScheme.parse(text).activations
    x, dy = normal(*shape).to(dtype), normal(*shape, seed=1).to(dtype)
    scale, zero = grid_of(x, scheme)
    leaves = [None if one is None else one.clone().requires_grad_() for one in (x, scale, zero)]
    expected = fake.fake_quantize(*leaves, scheme, torch.float16).to(dtype)
    expected.backward(dy)
    found = fake_quantize.fake_quantize(x, scale, zero, scheme, torch.float16, dtype)
    slopes = fake_quantize.fake_quantize_backward(dy, x, scale, zero, scheme, torch.float16)
    assert torch.equal(found, expected)
    assert torch.equal(slopes[0], leaves[0].grad)
    assert torch.equal(slopes[1], fake_quantize.fake_quantize_backward(dy, x, scale, zero, scheme, torch.float16)[1])
    for slope, leaf in zip(slopes[1:], leaves[1:], strict=True):  # sums of up to 16384 terms in another order
        assert leaf is None or torch.allclose(slope, leaf.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [4, 8])
def test_fake_activations_are_bitwise_those_of_the_reference(bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    scheme = TensorScheme(int_format(bits), "token", symmetric, dynamic=True)
    x = normal(5, 7, 96).to(dtype)
    x[0, 0] = 0
    assert torch.equal(fake_quantize.fake_quantize_rows(x, scheme), fake.fake_quantize_dynamic(x, scheme))


@pytest.mark.parametrize("columns", [50, 4097], ids=["one block", "two blocks"])
def test_kl_and_its_gradient_are_those_of_the_definition(columns: int) -> None:
    logits, wanted = 3 * normal(5, columns), 3 * normal(5, columns, seed=1)
    leaf = logits.double().requires_grad_()
    log_p, log_q = wanted.double().log_softmax(-1), leaf.log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)
    expected.mean().backward()
    kl, gradient = kl_rows.kl_rows(logits, wanted)
    assert torch.allclose(kl.double(), expected, rtol=1e-4, atol=1e-6)
    assert torch.allclose(gradient.double(), leaf.grad, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("text", ["nf4-b64-dq", "nf4-b64", "fp4-b128-dq"])
def test_nibbles_decode_to_the_bits_of_the_reference(text: str) -> None:
    weight = PackedWeight.from_float(normal(48, 640) * 0.02, QuantScheme.parse(text), torch.float32)
    like = torch.empty(0, dtype=torch.float16, device=DEVICE)
    assert torch.equal(nibbles_dequantize.dequantize(like, weight), weight.dequantize(torch.float16))
