"""The fused weight of learned rounding. Oracle: nn/rounding.py in plain torch, and its gradients by autograd."""

import pytest
import torch

from lowbit.numerics.formats import int_format
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
