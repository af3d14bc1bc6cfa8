"""Fake quantization as training runs it: one kernel forward and one backward on a GPU, plain torch elsewhere.

    lowbit::fake_quantize(x, scale, zero, scheme, inputs, scale_dtype, dtype) -> x^
    lowbit::fake_quantize_backward(dy, x, scale, zero, scheme, inputs, scale_dtype) -> dx, ds, dz
    lowbit::fake_quantize_rows(x, scheme) -> x^

`inputs`: x are static activations under the scheme's grid of those, otherwise a weight.

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
_GRID = "Tensor x, Tensor scale, Tensor? zero, str scheme, bool inputs, ScalarType scale_dtype"
_LIBRARY.define(f"fake_quantize({_GRID}, ScalarType dtype) -> Tensor")
_LIBRARY.define(f"fake_quantize_backward(Tensor dy, {_GRID}) -> (Tensor, Tensor, Tensor)")
_LIBRARY.define("fake_quantize_rows(Tensor x, str scheme) -> Tensor")
_parsed = cache(QuantScheme.parse)


def _kernels() -> Any:
    return late("lowbit.kernels.triton.fake_quantize")


def _grid_of(scheme: str, inputs: bool) -> TensorScheme | None:
    return _parsed(scheme).activations if inputs else _parsed(scheme).weights


def _forward(
    x: Tensor, scale: Tensor, zero: Tensor | None, scheme: str, inputs: bool, scale_dtype: torch.dtype,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    with torch.cuda.device(x.device):
        kernel = _kernels().fake_quantize
        return cast("Tensor", kernel(x, scale, zero, _grid_of(scheme, inputs), scale_dtype, dtype))


def _backward(
    dy: Tensor, x: Tensor, scale: Tensor, zero: Tensor | None, scheme: str, inputs: bool, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.cuda.device(x.device):
        kernel = _kernels().fake_quantize_backward
        gradients = kernel(dy, x, scale, zero, _grid_of(scheme, inputs), scale_dtype)
        return cast("tuple[Tensor, Tensor, Tensor]", gradients)


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


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero: Tensor | None, scheme: str, inputs: bool, scale_dtype: torch.dtype,
        dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, scale, zero)
        ctx.settings = scheme, inputs, scale_dtype
        return cast("Tensor", torch.ops.lowbit.fake_quantize(x, scale, zero, *ctx.settings, dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dy = gradients[0].contiguous()
        slopes = torch.ops.lowbit.fake_quantize_backward(dy, *ctx.saved_tensors, *ctx.settings)
        wanted = (slope if needed else None for slope, needed in zip(slopes, ctx.needs_input_grad, strict=False))
        return *wanted, None, None, None, None


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
    return _by_kernel(w, scale, zero, str(scheme), False, scale_dtype, dtype)


def fake_inputs(
    x: Tensor, scale: Tensor, zero: Tensor | None, scheme: QuantScheme, scale_dtype: torch.dtype, dtype: torch.dtype
) -> Tensor:
    """x [..., K] under the static grid of scheme's activations, float32 [1], rounded to `dtype`; differentiable."""
    activations = scheme.activations
    assert activations is not None
    if not (_on_kernel(x) and activations.granularity == "tensor" and activations.format.kind == "int"):
        return fake.fake_quantize(x, scale, zero, activations, scale_dtype).to(dtype)
    return _by_kernel(x, scale, zero, str(scheme), True, scale_dtype, dtype)


def fake_activations(x: Tensor, scheme: QuantScheme) -> Tensor:
    """x [..., K] under the dynamic grids of scheme's activations: x's dtype; the gradient passes unchanged."""
    activations = scheme.activations
    assert activations is not None
    token = activations.granularity == "token" and activations.format.kind == "int"
    simple = token and not activations.searched and not activations.outlier
    if not (_on_kernel(x) and simple and x.shape[-1] <= _LARGEST_RUN):
        return fake.fake_quantize_dynamic(x, activations)
    return cast("Tensor", _FakeRows.apply(x.contiguous(), str(scheme)))


def _by_kernel(x: Tensor, scale: Tensor, zero: Tensor | None, *settings: Any) -> Tensor:
    zero = None if zero is None else zero.contiguous()
    return cast("Tensor", _FakeQuantize.apply(x.contiguous(), scale.contiguous(), zero, *settings))


def _on_kernel(x: Tensor) -> bool:
    return x.is_cuda and x.dtype in (torch.float32, torch.bfloat16, torch.float16) and installed("triton")


def _run_of(w: Tensor, scheme: TensorScheme) -> int:
    return scheme.group_size if scheme.granularity == "group" and scheme.group_size else w.shape[-1]
