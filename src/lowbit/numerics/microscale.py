"""Microscaling: E2M1 codes under small scales, as OCP MX and NVIDIA's NVFP4 define them.

    mxfp4    w = level * 2^(scale - 127)                 one scale, an exponent in uint8, per 32 columns
    nvfp4    w = level * scale / global_scale            one scale in e4m3 per 16 columns, one divisor per tensor

A code is sign << 3 | index into 0, 1/2, 1, 3/2, 2, 3, 4, 6; two codes a byte, the even column in the low nibble.
Sources: OCP Microscaling Formats 1.0, sections 5.3.3 and 6.3; compressed-tensors 0.20, compressors/nvfp4 and mxfp4,
with which codes and scales agree bit for bit (a tie goes to the even code).
"""

import torch
from torch import Tensor

from lowbit.numerics.formats import FP8_E4M3, NumberFormat

_LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_SHARED_BIAS = 127
_LARGEST_EXPONENT = 2  # 6 = 1.5 * 2^2


def round_to_levels(x: Tensor) -> Tensor:
    """E2M1 codes of x, values already divided by their scale: uint8, shape of x; out of range saturates."""
    size = x.abs()
    index = (size > 0.25).to(torch.uint8)
    for threshold, even_above in ((0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False)):
        index += size >= threshold if even_above else size > threshold
    return index | ((x < 0).to(torch.uint8) << 3)


def nearest_levels(x: Tensor) -> Tensor:
    """The E2M1 levels nearest to x, values already divided by their scale: float32; those of `round_to_levels`.

    Levels are half-integers up to 2, integers up to 4, even up to 6, so a tie to even of x / step is a tie to the even
    code.
    """
    size = x.float().abs().clamp(max=_LEVELS[-1])
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return ((size / step).round() * step).copysign(x.float())


def codes_of_levels(levels: Tensor) -> Tensor:
    """The E2M1 codes uint8 of levels (any float dtype), the sign of a negative zero with them."""
    return round_to_levels(levels.float().abs()) | (levels.float().signbit().to(torch.uint8) << 3)


def levels_of_codes(codes: Tensor) -> Tensor:
    """The float32 values of E2M1 codes uint8, any shape."""
    table = torch.tensor([*_LEVELS, *(-level for level in _LEVELS)], device=codes.device)
    return table[codes.int()]


def pack_pairs(codes: Tensor) -> Tensor:
    """Codes uint8 [..., K] -> uint8 [..., K/2], the even column in the low nibble."""
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def unpack_pairs(packed: Tensor) -> Tensor:
    """uint8 [..., K/2] -> codes uint8 [..., K]."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)  # [..., K/2, 2] -> [..., K]


def scale_values(scale: Tensor, global_scale: Tensor | None) -> Tensor:
    """What stored scales multiply by, float32: uint8 exponents, or e4m3 over the tensor's divisor."""
    if scale.dtype == torch.uint8:
        return torch.ldexp(torch.ones_like(scale, dtype=torch.float32), scale.int() - _SHARED_BIAS)
    return scale.float() if global_scale is None else scale.float() / global_scale.float()


def choose_scale(largest: Tensor, number_format: NumberFormat, global_scale: Tensor | None) -> Tensor:
    """The stored scale for groups whose largest magnitude is `largest` [..., K/G] (float32).

    mxfp4: floor(log2) of the largest, rounded as if to three significant bits, less the exponent of 6; uint8.
    nvfp4: largest / 6 times global_scale, rounded to e4m3; a scale of zero becomes e4m3's epsilon.
    """
    if number_format.name == "mxfp4":
        rounded = (largest.float().view(torch.int32) + (1 << 21)) & ~((1 << 23) - 1)  # up from 1.75 * 2^n
        exponent = (rounded >> 23) - _LARGEST_EXPONENT
        return exponent.clamp(0, 254).to(torch.uint8)
    assert global_scale is not None
    scale = (largest.float() / number_format.high * global_scale.float()).clamp(max=FP8_E4M3.high)
    stored = scale.to(torch.float8_e4m3fn)
    epsilon = torch.full((), torch.finfo(torch.float8_e4m3fn).eps, device=scale.device).to(torch.float8_e4m3fn)
    return torch.where(stored.float() == 0, epsilon.float(), stored.float()).to(torch.float8_e4m3fn)


def scale_pair(largest: Tensor, number_format: NumberFormat, global_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Two stored scales for groups whose largest magnitude is `largest`, of which the better one should be taken.

    nvfp4: the largest on level 6, or on level 4, where the levels around it lie closer. mxfp4: the exponent under which
    it may saturate, and the next.
    """
    if number_format.name == "mxfp4":
        exponent = (largest.float().view(torch.int32) >> 23) - _LARGEST_EXPONENT
        return exponent.clamp(0, 254).to(torch.uint8), (exponent + 1).clamp(0, 254).to(torch.uint8)
    on_four = choose_scale(largest * 1.5, number_format, global_scale)
    return choose_scale(largest, number_format, global_scale), on_four


def snap(scale: Tensor, number_format: NumberFormat, global_scale: Tensor | None) -> Tensor:
    """The multipliers that a checkpoint can store nearest to `scale` float32, any shape, positive."""
    return scale_values(stored_scale(scale, number_format, global_scale), global_scale)


def stored_scale(scale: Tensor, number_format: NumberFormat, global_scale: Tensor | None) -> Tensor:
    """What is stored for multipliers float32, exact for those that `snap` returned: uint8 or e4m3."""
    if number_format.name == "mxfp4":
        exponent = scale.float().clamp(min=2.0**-_SHARED_BIAS).log2().round().int() + _SHARED_BIAS
        return exponent.clamp(0, 254).to(torch.uint8)
    return choose_scale(scale.float() * number_format.high, number_format, global_scale)


def choose_global_scale(x: Tensor) -> Tensor:
    """nvfp4's divisor for a tensor: 448 * 6 over its largest magnitude, float32 [1]; 1 for a tensor of zeros."""
    largest = x.abs().amax().float().reshape(1)
    return torch.where(largest > 0, FP8_E4M3.high * _LEVELS[-1] / largest, 1.0)


def encode(x: Tensor, scale: Tensor, global_scale: Tensor | None) -> Tensor:
    """E2M1 codes of x [..., K] under stored scales [..., K/G]: uint8 [..., K]."""
    size = x.shape[-1] // scale.shape[-1]
    values = scale_values(scale, global_scale).repeat_interleave(size, -1)
    return round_to_levels(x.float() / values)


def decode(codes: Tensor, scale: Tensor, global_scale: Tensor | None) -> Tensor:
    """The float32 values of codes [..., K] under stored scales [..., K/G]."""
    size = codes.shape[-1] // scale.shape[-1]
    return levels_of_codes(codes) * scale_values(scale, global_scale).repeat_interleave(size, -1)
