"""The fused weight of learned rounding. Oracle: nn/rounding.py in plain torch, and its gradients by autograd; for a
whole model the solved one, whose KL learning must begin with."""

import copy

import pytest
import torch
from architectures import tiny
from checkpoints import quantize_in_memory

from lowbit.model.recipe import Recipe
from lowbit.nn.linear import QuantLinear
from lowbit.nn.rounding import RoundingLinear
from lowbit.numerics.formats import int_format
from lowbit.numerics.metrics import kl_divergence
from lowbit.optional import installed

pytestmark = pytest.mark.skipif(not installed("triton"), reason="needs triton, which this platform has no wheel of")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("has_zero", [True, False], ids=["asym", "sym"])
@pytest.mark.parametrize(("rows", "columns", "size"), [(5, 96, 32), (3, 48, 48)], ids=["groups", "channel"])
def test_weight_and_gradients_are_those_of_autograd(has_zero: bool, rows: int, columns: int, size: int) -> None:
    from lowbit.kernels.triton.rounding import rounded_gradients, rounded_weight  # noqa: PLC0415 - needs triton

    generator = torch.Generator().manual_seed(0)
    limits = int_format(3)
    u = torch.randn(rows, columns, generator=generator).mul(3).to(DEVICE)
    v = (torch.rand(rows, columns, generator=generator) - 0.5).to(DEVICE).requires_grad_()
    scale = torch.rand(rows, columns // size, generator=generator).add(0.1).to(DEVICE).requires_grad_()
    zero = torch.randint(-2, 3, scale.shape, generator=generator).float().to(DEVICE) if has_zero else None
    soft = (u + v).clamp(limits.low, limits.high)
    code = soft + (soft.round() - soft).detach()
    shifted = code if zero is None else code - zero.repeat_interleave(size, -1)
    weight = shifted * scale.repeat_interleave(size, -1)
    slope = torch.randn(rows, columns, generator=generator).to(DEVICE)
    weight.backward(slope)
    found = rounded_weight(u, v.detach(), scale.detach(), zero, limits, torch.float32)
    assert torch.equal(found, weight.detach())
    dv, ds = rounded_gradients(u, v.detach(), scale.detach(), zero, slope, limits)
    assert v.grad is not None
    assert scale.grad is not None
    assert torch.equal(dv, v.grad)
    assert torch.allclose(ds, scale.grad, rtol=1e-5, atol=1e-5)


SCHEMES = ["w4a16-g16-asym", "w2a16-g16-asym", "w4a16-asym", "w3a16-g16"]


def _softened(scheme: str, fuses: bool) -> tuple[torch.nn.Module, torch.nn.Module, torch.nn.Module]:
    """(original, solved by `aligned`, the same with every quantized layer softened)"""
    original = tiny("llama").to(DEVICE)
    with torch.no_grad():
        original.lm_head.weight.mul_(20)  # a head sharp enough for rounding to matter
    solved = copy.deepcopy(original)
    quantize_in_memory(solved.cpu(), Recipe.parse(f"aligned:{scheme}"), torch.bfloat16)
    soft = copy.deepcopy(solved).to(DEVICE)
    for name, layer in list(soft.named_modules()):
        if isinstance(layer, QuantLinear):
            parent, _, attribute = name.rpartition(".")
            rounding = RoundingLinear(layer)
            rounding.fuses = fuses
            setattr(soft.get_submodule(parent), attribute, rounding)
    return original, solved.to(DEVICE), soft


@pytest.mark.parametrize("scheme", SCHEMES)
def test_learning_of_a_solved_model_begins_with_its_kl_and_autograds_slopes(scheme: str) -> None:
    """The zero-points are those that packed weights store: what unpacks them is a view with other strides."""
    ids = torch.randint(3, 128, (2, 16), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    slopes, losses = [], []
    for fuses in (True, False):
        original, solved, soft = _softened(scheme, fuses)
        with torch.no_grad():
            wanted = original(input_ids=ids, use_cache=False).logits
            kl = kl_divergence(wanted, solved(input_ids=ids, use_cache=False).logits).mean()
        loss = kl_divergence(wanted, soft(input_ids=ids, use_cache=False).logits).mean()
        loss.backward()
        assert loss.item() == pytest.approx(kl.item(), rel=1e-4)
        layers = [layer for layer in soft.modules() if isinstance(layer, RoundingLinear)]
        assert all(layer.v.grad is not None and layer.gain.grad is not None for layer in layers)
        slopes.append([parameter.grad for layer in layers for parameter in (layer.v, layer.gain)])
        losses.append(loss.item())
    assert losses[0] > 0
    for fused, plain in zip(*slopes, strict=True):
        assert fused is not None
        assert plain is not None
        assert plain.abs().max() > 0
        assert torch.allclose(fused, plain, rtol=1e-3, atol=1e-5 * plain.abs().max().item())
