"""Oracles: torch.fake_quantize for the straight-through line, finite differences and LSQ's formula for the scales."""

import math

import pytest
import torch

from lowbit.numerics.affine import choose_scale, quantize_dequantize, value_range
from lowbit.numerics.fake import fake_quantize, fake_quantize_dynamic, lsq_gradient_scale, range_grid
from lowbit.numerics.formats import int_format
from lowbit.numerics.scheme import TensorScheme

SCHEMES = {
    "tensor": TensorScheme(int_format(4), "tensor"),
    "channel": TensorScheme(int_format(3), "channel"),
    "channel-asym": TensorScheme(int_format(8), "channel", symmetric=False),
    "group": TensorScheme(int_format(2), "group", group_size=16),
    "group-asym": TensorScheme(int_format(4), "group", symmetric=False, group_size=16),
}


def weights() -> torch.Tensor:
    return torch.randn(6, 64, generator=torch.Generator().manual_seed(0))


def grid(w: torch.Tensor, scheme: TensorScheme, shrink: float = 0.7) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A grid too narrow for w, so that some of it saturates."""
    low, high = value_range(w, scheme)
    scale, zero = choose_scale(shrink * low, shrink * high, scheme, torch.float32)
    return scale, None if zero is None else zero.float()


@pytest.mark.parametrize("name", SCHEMES)
def test_with_min_max_grids_it_is_quantize_dequantize(name: str) -> None:
    w, scheme = weights(), SCHEMES[name]
    assert torch.equal(fake_quantize(w, *grid(w, scheme, 1.0), scheme), quantize_dequantize(w, scheme))
    assert torch.equal(fake_quantize_dynamic(w, scheme), quantize_dequantize(w, scheme))


@pytest.mark.parametrize("name", ["tensor", "channel", "channel-asym"])
def test_the_gradient_to_x_is_that_of_torch(name: str) -> None:
    w, scheme = weights().requires_grad_(), SCHEMES[name]
    scale, zero = grid(w.detach(), scheme)
    fake_quantize(w, scale, zero, scheme).square().sum().backward()
    theirs = w.detach().clone().requires_grad_()
    rows, bounds = w.shape[0], scheme.format
    torch.fake_quantize_per_channel_affine(
        theirs,
        scale.expand(rows, 1).reshape(rows),
        torch.zeros(rows, dtype=torch.int32) if zero is None else zero.reshape(rows).int(),
        0,
        int(bounds.low),
        int(bounds.high),
    ).square().sum().backward()
    assert torch.allclose(w.grad, theirs.grad, atol=1e-6)
    assert 0 < (w.grad == 0).float().mean() < 0.9


@pytest.mark.parametrize("name", SCHEMES)
def test_the_gradient_to_the_scale_is_learned_step_size(name: str) -> None:
    w, scheme = weights(), SCHEMES[name]
    scale, zero = grid(w, scheme)
    scale.requires_grad_()
    fake_quantize(w, scale, zero, scheme).sum().backward()
    size = w.numel() // scale.numel()
    g = lsq_gradient_scale(size, scheme)
    assert math.isclose(g, 1 / math.sqrt(size * scheme.format.high))
    shift = 0 if zero is None else zero.reshape(-1, 1)
    v = w.reshape(-1, size) / scale.detach().reshape(-1, 1)
    q = (v + shift).round().clamp(scheme.format.low, scheme.format.high) - shift
    inside = (v + shift).round() - shift == q
    expected = torch.where(inside, q - v, q).sum(-1) * g
    assert torch.allclose(scale.grad.reshape(-1), expected, rtol=1e-4, atol=1e-5)


def test_the_gradient_to_the_zero_point_is_minus_the_step_where_codes_saturate() -> None:
    w, scheme = weights(), SCHEMES["group-asym"]
    scale, zero = grid(w, scheme)
    assert zero is not None
    zero.requires_grad_()
    fake_quantize(w, scale, zero, scheme).sum().backward()
    codes = (w.view(6, 4, 16) / scale[..., None] + zero.detach()[..., None]).round()
    outside = ((codes < -8) | (codes > 7)).sum(-1)
    assert torch.allclose(zero.grad, -scale * outside, atol=1e-6)


@pytest.mark.parametrize("name", ["channel", "channel-asym", "group-asym"])
def test_gradients_of_ranges_are_those_of_the_grid_without_rounding(name: str) -> None:
    scheme = SCHEMES[name]
    low, high = (bound.double() for bound in value_range(weights(), scheme))
    for bound in (low, high):
        bound.requires_grad_()
    scale, zero = range_grid(low, high, scheme)
    (scale * 3).sum().backward() if zero is None else (scale * 3 + zero * 0.25).sum().backward()
    found = low.grad.clone(), high.grad.clone()
    low.grad = high.grad = None
    steps = scheme.format.high - scheme.format.low
    exact = 2 * torch.maximum(-low, high) / steps if zero is None else (high - low) / steps
    total = exact * 3 if zero is None else exact * 3 + (scheme.format.low - low / exact) * 0.25
    total.sum().backward()
    assert torch.allclose(found[0], low.grad, rtol=1e-4)
    assert torch.allclose(found[1], high.grad, rtol=1e-4)
