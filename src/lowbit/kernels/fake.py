"""Fake quantization as training runs it: one kernel forward and one backward on a GPU, plain torch elsewhere.

    lowbit::fake_quantize(x, scale, zero, scheme, scale_dtype, dtype) -> x^
    lowbit::fake_quantize_backward(dy, x, scale, zero, scheme, scale_dtype) -> dx, ds, dz
    lowbit::fake_quantize_rows(x, scheme) -> x^

numerics/fake.py says what they compute, and is the oracle. The kernels (triton/fake_quantize.py) are ops of
torch.library, so that torch.compile takes them as they are: inductor would drop the rounding of a scale to bfloat16,
and training would see other numbers than the converted layer's. The gradient stands outside, in an autograd.Function.
"""

from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from lowbit.numerics import fake
from lowbit.numerics.scheme import QuantScheme, TensorScheme
from lowbit.optional import installed, late

_LARGEST_RUN = 16384  # elements under one scale, which a program holds in registers
_LIBRARY = torch.library.Library("lowbit", "FRAGMENT")
_GRID = "Tensor x, Tensor scale, Tensor? zero, str scheme, ScalarType scale_dtype"
_LIBRARY.define(f"fake_quantize({_GRID}, ScalarType dtype) -> Tensor")
_LIBRARY.define(f"fake_quantize_backward(Tensor dy, {_GRID}) -> (Tensor, Tensor, Tensor)")
_LIBRARY.define("fake_quantize_rows(Tensor x, str scheme) -> Tensor")
_parsed = cache(QuantScheme.parse)


def _kernels() -> Any:
    return late("lowbit.kernels.triton.fake_quantize")


def _forward(
    x: Tensor, scale: Tensor, zero: Tensor | None, scheme: str, scale_dtype: torch.dtype, dtype: torch.dtype
) -> Tensor:
    with torch.cuda.device(x.device):
        return cast("Tensor", _kernels().fake_quantize(x, scale, zero, _parsed(scheme).weights, scale_dtype, dtype))


def _backward(
    dy: Tensor, x: Tensor, scale: Tensor, zero: Tensor | None, scheme: str, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.cuda.device(x.device):
        kernel = _kernels().fake_quantize_backward
        return cast("tuple[Tensor, Tensor, Tensor]", kernel(dy, x, scale, zero, _parsed(scheme).weights, scale_dtype))


def _rows(x: Tensor, scheme: str) -> Tensor:
    with torch.cuda.device(x.device):
        return cast("Tensor", _kernels().fake_quantize_rows(x, _parsed(scheme).activations))


def _shapes_backward(dy: Tensor, x: Tensor, scale: Tensor, zero: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(x), torch.empty_like(scale), scale.new_empty(0 if zero is None else scale.shape)


_LIBRARY.impl("fake_quantize", _forward, "CUDA")
_LIBRARY.impl("fake_quantize_backward", _backward, "CUDA")
_LIBRARY.impl("fake_quantize_rows", _rows, "CUDA")
torch.library.register_fake("lowbit::fake_quantize", lambda x, *rest: torch.empty_like(x, dtype=rest[-1]), lib=_LIBRARY)
torch.library.register_fake("lowbit::fake_quantize_backward", _shapes_backward, lib=_LIBRARY)
torch.library.register_fake("lowbit::fake_quantize_rows", lambda x, scheme: torch.empty_like(x), lib=_LIBRARY)


class _FakeWeight(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        scheme: str,
        scale_dtype: torch.dtype,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(x, scale, zero)
        ctx.scheme, ctx.scale_dtype = scheme, scale_dtype
        return cast("Tensor", torch.ops.lowbit.fake_quantize(x, scale, zero, scheme, scale_dtype, dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero = ctx.saved_tensors
        dx, ds, dz = torch.ops.lowbit.fake_quantize_backward(
            gradients[0].contiguous(), x, scale, zero, ctx.scheme, ctx.scale_dtype
        )
        wanted = ctx.needs_input_grad
        return dx if wanted[0] else None, ds if wanted[1] else None, dz if wanted[2] else None, None, None, None


class _FakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scheme: str) -> Tensor:
        return cast("Tensor", torch.ops.lowbit.fake_quantize_rows(x, scheme))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def fake_weight(
    w: Tensor, scale: Tensor, zero: Tensor | None, scheme: QuantScheme, scale_dtype: torch.dtype, dtype: torch.dtype
) -> Tensor:
    """w [N, K] under a grid of float32 parameters (numerics/affine.py's shapes), rounded to `dtype`; differentiable."""
    weights = scheme.weights
    if not (_on_kernel(w) and weights.granularity in ("group", "channel") and _run_of(w, weights) <= _LARGEST_RUN):
        return fake.fake_quantize(w, scale, zero, weights, scale_dtype).to(dtype)
    scale, zero = scale.contiguous(), None if zero is None else zero.contiguous()
    return cast("Tensor", _FakeWeight.apply(w.contiguous(), scale, zero, str(scheme), scale_dtype, dtype))


def fake_activations(x: Tensor, scheme: QuantScheme) -> Tensor:
    """x [..., K] under the dynamic grids of scheme's activations: x's dtype; the gradient passes unchanged."""
    activations = scheme.activations
    assert activations is not None
    token = activations.granularity == "token" and activations.format.kind == "int"
    simple = token and not activations.searched and not activations.outlier
    if not (_on_kernel(x) and simple and x.shape[-1] <= _LARGEST_RUN):
        return fake.fake_quantize_dynamic(x, activations)
    return cast("Tensor", _FakeRows.apply(x.contiguous(), str(scheme)))


def _on_kernel(x: Tensor) -> bool:
    return x.is_cuda and x.dtype in (torch.float32, torch.bfloat16, torch.float16) and installed("triton")


def _run_of(w: Tensor, scheme: TensorScheme) -> int:
    return scheme.group_size if scheme.granularity == "group" and scheme.group_size else w.shape[-1]
