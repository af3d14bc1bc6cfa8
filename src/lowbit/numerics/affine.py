"""Uniform grids: the group view, the choice of scale and zero-point, encode and decode.

    q = clamp(round(x / scale + zero), low, high)        x ~ (q - zero) * scale

    symmetric    scale = 2 max|x| / (2^B - 1),  zero = 0                       (GPTQ, compressed-tensors)
    asymmetric   scale = (max - min) / (2^B - 1),  zero = round(low - min / scale), with min <= 0 <= max
    fp8          scale = max|x| / 448, the rounding is that of the format

Integers are rounded in this file and nowhere else, ties to even. The addition stands inside the rounding, as in
compressed-tensors: our codes are bitwise equal to theirs.

Shapes: a scale is [1] per tensor, [N, 1] per channel, [N, K/G] per group, [..., 1] per token,
[ceil(N/G), ceil(K/G)] per tile of G x G.
"""

import torch
from torch import Tensor

from lowbit.numerics.formats import NumberFormat
from lowbit.numerics.microscale import nearest_levels
from lowbit.numerics.scheme import TensorScheme


def group_view(x: Tensor, scheme: TensorScheme) -> Tensor:
    """x with the elements that share a scale in its last dimension.

    x [..., K] -> group [..., K/G, G], channel and token [..., 1, K], tensor [1, numel]; tiles have a scale per element
    and range over `tiles`.
    """
    if scheme.granularity == "tile":
        return x.unsqueeze(-1)
    if scheme.granularity == "tensor":
        return x.reshape(1, -1)
    if scheme.granularity == "group":
        assert scheme.group_size is not None
        return x.unflatten(-1, (-1, scheme.group_size))  # [..., K] -> [..., K/G, G]
    return x.unsqueeze(-2)  # [..., K] -> [..., 1, K]


def value_range(x: Tensor, scheme: TensorScheme) -> tuple[Tensor, Tensor]:
    """(smallest, largest) value under each scale of `scheme`, in the shape of that scale, x's dtype."""
    if scheme.granularity == "tile":
        assert scheme.group_size is not None
        grouped = tiles(x, scheme.group_size)
    else:
        grouped = group_view(x, scheme)
    return grouped.amin(-1), grouped.amax(-1)  # aminmax is a scalar loop on the CPU: 590 us for 26 at [64, 4096]


def tiles(x: Tensor, size: int) -> Tensor:
    """x [N, K] in squares of size x size, those at the edge filled with zeros: [ceil(N/size), ceil(K/size), size^2]."""
    rows, columns = x.shape
    filled = torch.nn.functional.pad(x, (0, -columns % size, 0, -rows % size))
    squares = filled.unflatten(1, (-1, size)).unflatten(0, (-1, size))  # [N, K] -> [N/size, size, K/size, size]
    return squares.transpose(1, 2).flatten(2)


def _spread(parameter: Tensor, x: Tensor, scheme: TensorScheme) -> Tensor:
    """A parameter as it broadcasts against group_view(x): [..., 1]; for tiles one per element of x."""
    if scheme.granularity == "tile":
        assert scheme.group_size is not None
        rows, columns = x.shape
        wide = parameter.repeat_interleave(scheme.group_size, 0).repeat_interleave(scheme.group_size, 1)
        parameter = wide[:rows, :columns]
    return parameter.unsqueeze(-1)


def choose_scale(low: Tensor, high: Tensor, scheme: TensorScheme, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """(scale, zero) of the grid that covers [low, high]; zero is None where the scheme is symmetric.

    low and high have the shape of the scale. Computed in float32; the scale is then rounded to `dtype`, in which it
    will be stored, and zero is int8. A range of zero width gets the smallest step that `dtype` tells from 1, so that
    zeros encode as zeros.
    """
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    bound = scheme.format
    if scheme.symmetric:
        steps = bound.high if bound.kind == "float" else (bound.high - bound.low) / 2
        scale = stored_scale(torch.maximum(-low, high) / steps, dtype)
        return scale, None
    scale = stored_scale((high - low) / (bound.high - bound.low), dtype)
    zero = (bound.low - low / scale.float()).clamp(bound.low, bound.high).round().to(torch.int8)
    return scale, zero


def stored_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """scale in `dtype`, in which it is stored, no element zero: an exact or underflowed zero becomes its epsilon."""
    scale = scale.to(dtype)
    return torch.where(scale == 0, torch.finfo(dtype).eps, scale)


def per_element(parameter: Tensor, scheme: TensorScheme) -> Tensor:
    """A scale or zero-point that broadcasts against x [..., K]."""
    if scheme.granularity != "group":
        return parameter
    assert scheme.group_size is not None
    return parameter.repeat_interleave(scheme.group_size, dim=-1)  # [..., K/G] -> [..., K]


def per_column(parameter: Tensor, scheme: TensorScheme, shape: tuple[int, ...]) -> Tensor:
    """A scale or zero-point of a weight [N, K] for solvers that walk along K: float32 [K, N], contiguous."""
    return per_element(parameter.float(), scheme).expand(shape).T.contiguous()  # [N, K] -> [K, N]


def encode(x: Tensor, scale: Tensor, zero: Tensor | None, scheme: TensorScheme) -> Tensor:
    """Nearest codes of x [..., K] under scale: int8 [..., K] (float8_e4m3fn where the format is fp8)."""
    grouped, like = group_view(x.float(), scheme), _spread(scale.float(), x, scheme)
    scaled = grouped / like
    if zero is not None:
        scaled = scaled + zero.unsqueeze(-1)
    return round_to(scaled, scheme.format).reshape(x.shape)


def round_to(scaled: Tensor, number_format: NumberFormat) -> Tensor:
    """The nearest codes of values already divided by their scale (float32, any shape); out of range saturates.

    int8, or float8_e4m3fn, which holds the levels of E2M1 exactly: there the code stands as its level.
    """
    return nearest(scaled, number_format).to(torch.int8 if number_format.kind == "int" else torch.float8_e4m3fn)


def nearest(scaled: Tensor, number_format: NumberFormat) -> Tensor:
    """The codes of `round_to` in float32."""
    if number_format.kind == "float" and number_format.bits == 4:
        return nearest_levels(scaled)
    clamped = scaled.clamp(number_format.low, number_format.high)
    return clamped.to(torch.float8_e4m3fn).float() if number_format.kind == "float" else clamped.round_()


def where_codes(condition: Tensor, q: Tensor, other: Tensor) -> Tensor:
    """torch.where for codes of one dtype; float8 goes as its bytes, for which torch has no such kernel on CUDA."""
    return torch.where(condition, q.view(torch.int8), other.view(torch.int8)).view(q.dtype)


def decode(q: Tensor, scale: Tensor, zero: Tensor | None, scheme: TensorScheme) -> Tensor:
    """(q - zero) * scale in float32, shape of q [..., K]."""
    grouped = group_view(q.float(), scheme)
    if zero is not None:
        grouped = grouped - zero.unsqueeze(-1)
    return (grouped * _spread(scale.float(), q, scheme)).reshape(q.shape)


def quantize_dequantize(x: Tensor, scheme: TensorScheme, dtype: torch.dtype = torch.float32) -> Tensor:
    """x after a trip through `scheme` with min/max scales rounded to `dtype`: float32, shape of x."""
    scale, zero = choose_scale(*value_range(x, scheme), scheme, dtype)
    return decode(encode(x, scale, zero, scheme), scale, zero, scheme)
