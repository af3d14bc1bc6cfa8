"""The ops as torch sees them: schema, shape rule, meaning; gradients stand outside.

    lowbit::quantized_linear(x, weight tensors, bias, input scale, input zero, scheme, N, K) -> y [..., N]
    lowbit::rotate(x, rotation, inverse) -> x Q or x Q^T [..., K]                    numerics/hadamard.py

One op serves every scheme: the registry picks the kernel by what the scheme asks for. It is registered with
`Library.define/impl` rather than `custom_op`, which costs 40 us more a call; `autograd.Function` adds dX = dY W, with W
dequantized, which is what training adapters on a frozen quantized base needs.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from lowbit.kernels.fake import fake_activations as fake_activations  # for nn, which sees this file only
from lowbit.kernels.fake import fake_inputs as fake_inputs
from lowbit.kernels.fake import fake_weight as fake_weight
from lowbit.kernels.hadamard import rotated
from lowbit.kernels.registry import pick
from lowbit.numerics.hadamard import Hadamard
from lowbit.numerics.scheme import QuantScheme
from lowbit.tensors import PackedWeight

_LIBRARY = torch.library.Library("lowbit", "DEF")
_LIBRARY.define(
    "dequantize(Tensor like, Tensor[] tensors, str[] names, str scheme, int out_features, int in_features) -> Tensor"
)
_LIBRARY.define(
    "quantized_linear(Tensor x, Tensor[] tensors, str[] names, Tensor? bias, Tensor? input_scale, Tensor? input_zero, "
    "str scheme, int out_features, int in_features) -> Tensor"
)


_LIBRARY.define("rotate(Tensor x, str rotation, bool inverse) -> Tensor")


_parsed = cache(QuantScheme.parse)
_parsed_rotation = cache(Hadamard.parse)
_MANY_TOKENS = 128  # from here the product is bound by arithmetic: dequantize once, then torch's product


def _quantized_linear(
    x: Tensor,
    tensors: list[Tensor],
    names: list[str],
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_zero: Tensor | None,
    scheme: str,
    out_features: int,
    in_features: int,
) -> Tensor:
    parsed = _parsed(scheme)
    named = dict(zip(names, tensors, strict=True))
    weight = PackedWeight.from_tensors(named, parsed, (out_features, in_features))
    rows = x.reshape(-1, in_features)  # [..., K] -> [M, K]
    if weight.order is not None:
        rows, weight = rows.index_select(1, weight.order), weight.in_order()
    if parsed.activations is None:
        y = pick("wna16_linear", rows, weight).run(rows, weight, bias)
    else:
        y = pick("wa8_linear", rows, weight).run(rows, weight, bias, input_scale, input_zero)
    return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], out_features])  # not a view: callers add to it in place


def _quantized_linear_shape(x: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], arguments[-2])


def _dequantize(like: Tensor, tensors: list[Tensor], names: list[str], scheme: str, rows: int, columns: int) -> Tensor:
    named = dict(zip(names, tensors, strict=True))
    weight = PackedWeight.from_tensors(named, _parsed(scheme), (rows, columns))
    in_order = weight.in_order()
    w = pick("dequantize", like, in_order).run(like, in_order)
    return w if weight.order is None else w.index_select(1, torch.argsort(weight.order))


def _dequantize_shape(like: Tensor, *arguments: Any) -> Tensor:
    return like.new_empty(arguments[-2:])


_LIBRARY.impl("dequantize", _dequantize, "CompositeExplicitAutograd")
torch.library.register_fake("lowbit::dequantize", _dequantize_shape, lib=_LIBRARY)
_LIBRARY.impl("quantized_linear", _quantized_linear, "CompositeExplicitAutograd")
torch.library.register_fake("lowbit::quantized_linear", _quantized_linear_shape, lib=_LIBRARY)


def _rotate(x: Tensor, rotation: str, inverse: bool) -> Tensor:
    return rotated(x, _parsed_rotation(rotation), inverse)


def _rotate_shape(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_LIBRARY.impl("rotate", _rotate, "CompositeExplicitAutograd")
torch.library.register_fake("lowbit::rotate", _rotate_shape, lib=_LIBRARY)


class _Rotate(torch.autograd.Function):
    """y = x Q with Q orthogonal: dX = dY Q^T."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rotation: str, inverse: bool) -> Tensor:
        ctx.rotation, ctx.inverse = rotation, inverse
        return torch.ops.lowbit.rotate(x, rotation, inverse)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return torch.ops.lowbit.rotate(gradients[0], ctx.rotation, not ctx.inverse), None, None


def rotate(x: Tensor, rotation: Hadamard, inverse: bool = False) -> Tensor:
    """x Q (or x Q^T) for x [..., K], in x's dtype; sums in float32."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _Rotate.apply(x, str(rotation), inverse)
    return torch.ops.lowbit.rotate(x, str(rotation), inverse)


class _QuantizedLinear(torch.autograd.Function):
    """y = x W^T + b with the weight frozen: dX = dY W, db = sum dY."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, weight: PackedWeight, static: tuple[Tensor | None, ...]
    ) -> Tensor:
        ctx.weight = weight
        if weight.scheme.activations is None and x.numel() // x.shape[-1] >= _MANY_TOKENS:
            return torch.nn.functional.linear(x, dequantize(weight, x), bias)
        return _call(x, bias, weight, static)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (dy,) = gradients
        dx = dy @ dequantize(ctx.weight, dy) if ctx.needs_input_grad[0] else None
        db = dy.reshape(-1, dy.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        return dx, db, None, None


def _named(weight: PackedWeight) -> dict[str, Tensor]:
    """`weight.tensors()` without the shape, which would be a new tensor at every call."""
    if not isinstance(weight.scale, Tensor):
        return weight.tensors()
    named = {"weight_packed": weight.codes, "weight_scale": weight.scale}
    others = (weight.zero, weight.global_scale, weight.order)
    names = ("weight_zero_point", "weight_global_scale", "weight_order")
    return named | {name: tensor for name, tensor in zip(names, others, strict=True) if tensor is not None}


def _call(x: Tensor, bias: Tensor | None, weight: PackedWeight, static: tuple[Tensor | None, ...]) -> Tensor:
    named = _named(weight)
    arguments = (list(named.values()), list(named), bias, *static, str(weight.scheme), *weight.shape)
    return torch.ops.lowbit.quantized_linear(x, *arguments)


def dequantize(weight: PackedWeight, like: Tensor) -> Tensor:
    """The weight [N, K] in the dtype of `like`, by the kernel for its device; `like` is a tensor [M, ...] on it."""
    named = _named(weight)
    return torch.ops.lowbit.dequantize(like, list(named.values()), list(named), str(weight.scheme), *weight.shape)


def quantized_linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
    input_zero: Tensor | None = None,
) -> Tensor:
    """x [..., K] times the quantized weight [N, K], transposed, plus bias [N]: [..., N] in x's dtype.

    input_scale and input_zero [1]: the calibrated grid of x where the scheme's activations are static. Activations
    under an 8-bit scheme are rounded on the way; the gradient to x passes straight through that rounding.
    """
    static = (input_scale, input_zero)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _QuantizedLinear.apply(x, bias, weight, static)
    return _call(x, bias, weight, static)
