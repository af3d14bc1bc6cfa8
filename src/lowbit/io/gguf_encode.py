"""Codes and floats -> GGUF's blocks: exactly where integers carry over, else by ggml's reference quantizers.

    exact        integers in groups of 32 or a multiple, whose scales (and minima -zero scale) are float16 numbers
    Q4_0         d = w_max / -8 with w_max the element of largest magnitude, signed;  q = min(15, int(w / d + 8.5))
    Q4_1         d = (max - min) / 15, m = min;  q = min(15, int((w - m) / d + 0.5))
    Q8_0         d = max|w| / 127;  q = round(w / d), halves away from zero
    Q4_K, Q6_K   a weighted search per sub-block, then 6- or 8-bit scales (make_qkx2_quants, make_qx_quants)

Source: ggml src/ggml-quants.c, quantize_row_*_ref. Q4_0, Q4_1 and Q8_0 are equal to gguf-py's bytes.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lowbit.io.gguf_blocks import BY_NAME, QK, Block
from lowbit.tensors import PackedWeight

Array = NDArray[Any]
_TINY = np.float32(1e-15)  # GROUP_MAX_EPS


def block_of(weight: PackedWeight) -> Block | str:
    """The block type that holds these very codes, or why none does."""
    scheme, (_, columns) = weight.scheme, weight.shape
    weights = scheme.weights
    if weights.format.kind != "int" or scheme.activations is not None:
        return f"GGUF holds integer weights beside 16-bit activations, not {scheme}"
    if weights.ordered:
        return "GGUF has no act-order"
    if weights.bits not in (4, 8) or (weights.bits == 8 and not weights.symmetric):
        return f"GGUF's blocks of 32 hold 4 bits, or 8 bits without zero-points, not {scheme}"
    if columns % 32 or (weights.group_size or 32) % 32:
        return f"GGUF's blocks are 32 columns, and {scheme} has groups of {weights.group_size} in {columns}"
    scale, minimum = _halves(weight)
    if scale is None:
        return "its scales are no float16 numbers"
    if not weights.symmetric and minimum is None:
        return "its minima, -zero-point times scale, are no float16 numbers"
    return BY_NAME["Q8_0" if weights.bits == 8 else "Q4_0" if weights.symmetric else "Q4_1"]


def _halves(weight: PackedWeight) -> tuple[Array | None, Array | None]:
    """(scale, minimum) as float16 [N, K/32], each None where it is not exact."""
    rows, columns = weight.shape
    assert isinstance(weight.scale, Tensor)
    scale = _spread(weight.scale.float().numpy(), rows, columns // 32)
    halved = scale.astype(np.float16)
    exact = np.array_equal(halved.astype(np.float32), scale)
    zero = weight.zero_points()
    if zero is None:
        return (halved if exact else None), None
    unsigned = _spread(zero.float().numpy(), rows, columns // 32) + 2 ** (weight.scheme.weights.bits - 1)
    minimum = -unsigned * scale
    with np.errstate(over="ignore"):
        low = minimum.astype(np.float16)
    fits = np.array_equal(low.astype(np.float32), minimum)
    return (halved if exact else None), (low if fits else None)


def _spread(parameter: Array, rows: int, blocks: int) -> Array:
    """A scale or zero-point per group, channel or tensor as one per block of 32: [N, K/32]."""
    parameter = np.broadcast_to(
        parameter.reshape(-1, 1) if parameter.ndim < 2 else parameter, (rows, parameter.shape[-1])
    )
    return np.repeat(parameter, blocks // parameter.shape[1], axis=1)


def encode_codes(weight: PackedWeight, block: Block) -> Array:
    """The codes as bytes of `block`, which block_of chose: uint8 [N, bytes of a row]."""
    (rows, _), scale, minimum = weight.shape, *_halves(weight)
    assert scale is not None
    q = weight.q().numpy()
    head = scale.reshape(-1, 1).view(np.uint8)
    if block.name == "Q8_0":
        return np.concatenate([head, q.reshape(-1, 32).view(np.uint8)], axis=1).reshape(rows, -1)
    if minimum is not None:
        head = np.concatenate([head, minimum.reshape(-1, 1).view(np.uint8)], axis=1)
    return _with_nibbles(head, (q + 8).astype(np.uint8).reshape(-1, 32)).reshape(rows, -1)


def _with_nibbles(head: Array, q: Array) -> Array:
    return np.concatenate([head, q[:, :16] | (q[:, 16:] << 4)], axis=1)


def _inverse(d: Array) -> Array:
    with np.errstate(divide="ignore"):
        return np.where(d == 0, np.float32(0), np.float32(1) / d)


def _head(*values: Array) -> Array:
    return np.concatenate([value.astype(np.float16).view(np.uint8) for value in values], axis=1)


def _encode_q4_0(w: Array) -> Array:
    x = w.reshape(-1, 32)
    d = np.take_along_axis(x, np.abs(x).argmax(1, keepdims=True), 1) / np.float32(-8)
    q = np.minimum(np.trunc(x * _inverse(d) + np.float32(8.5)), 15).astype(np.uint8)
    return _with_nibbles(_head(d), q)


def _encode_q4_1(w: Array) -> Array:
    x = w.reshape(-1, 32)
    low = x.min(1, keepdims=True)
    d = (x.max(1, keepdims=True) - low) / np.float32(15)
    q = np.minimum(np.trunc((x - low) * _inverse(d) + np.float32(0.5)), 15).astype(np.uint8)
    return _with_nibbles(_head(d, low), q)


def _encode_q8_0(w: Array) -> Array:
    x = w.reshape(-1, 32)
    d = np.abs(x).max(1, keepdims=True) / np.float32(127)
    scaled = x * _inverse(d)
    q = np.trunc(scaled + np.copysign(np.float32(0.5), scaled)).astype(np.int8)
    return np.concatenate([_head(d), q.view(np.uint8)], axis=1)


def _search_with_minimum(x: Array, weights: Array) -> tuple[Array, Array]:
    """(scale, minimum >= 0) of each row of x [R, 32] for codes 0 .. 15: ggml's make_qkx2_quants(rmin -1, 0.1, 20)."""
    low, high = np.minimum(x.min(1), 0), x.max(1)
    width = high - low
    inverse = np.where(width > 0, np.float32(15) / np.where(width > 0, width, 1), 0).astype(np.float32)
    scale, offset = _inverse(inverse), low.copy()
    best = _error(x, weights, np.clip(np.rint(inverse[:, None] * (x - low[:, None])), 0, 15), scale, offset)
    total, moment = weights.sum(1), (weights * x).sum(1)
    for step in range(21):
        factor = np.float32(-1 + 0.1 * step + 15) / np.where(width > 0, width, 1)
        q = np.clip(np.rint(factor[:, None] * (x - low[:, None])), 0, 15).astype(np.float32)
        first, second, mixed = (weights * q).sum(1), (weights * q * q).sum(1), (weights * q * x).sum(1)
        determinant = total * second - first * first
        solvable = determinant > 0
        safe = np.where(solvable, determinant, 1)
        this_scale, this_low = (total * mixed - moment * first) / safe, (second * moment - first * mixed) / safe
        through_zero = this_low > 0
        this_scale = np.where(through_zero, mixed / np.where(second > 0, second, 1), this_scale)
        this_low = np.where(through_zero, 0, this_low)
        error = _error(x, weights, q, this_scale, this_low)
        better = solvable & (error < best) & (width > 0)
        best = np.where(better, error, best)
        scale, offset = np.where(better, this_scale, scale), np.where(better, this_low, offset)
    return scale.astype(np.float32), -offset.astype(np.float32)


def _error(x: Array, weights: Array, q: Array, scale: Array, offset: Array) -> Array:
    difference = scale[:, None] * q + offset[:, None] - x
    return (weights * difference * difference).sum(1)


def _encode_q4_k(w: Array) -> Array:
    x = w.reshape(-1, 32)
    mean = np.sqrt((x * x).mean(1, keepdims=True))
    scale, minimum = _search_with_minimum(x, mean + np.abs(x))
    scale, minimum = scale.reshape(-1, 8), minimum.reshape(-1, 8)
    d, low = (part.max(1, keepdims=True) / np.float32(63) for part in (scale, minimum))
    s, m = (np.minimum(np.rint(part * _inverse(unit)), 63).astype(np.uint8)
            for part, unit in ((scale, d), (minimum, low)))  # fmt: skip
    step, shift = _halved(d) * s, _halved(low) * m  # as they will be read
    q = np.clip(np.rint((x.reshape(-1, 8, 32) + shift[..., None]) * _inverse(step)[..., None]), 0, 15).astype(np.uint8)
    packed = np.concatenate(
        [
            s[:, :4] | ((s[:, 4:] >> 4) << 6),
            m[:, :4] | ((m[:, 4:] >> 4) << 6),
            (s[:, 4:] & 15) | ((m[:, 4:] & 15) << 4),
        ],
        axis=1,
    )
    pairs = q.reshape(-1, 4, 2, 32)
    return np.concatenate([_head(d, low), packed, (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).reshape(-1, 128)], axis=1)


def _halved(value: Array) -> Array:
    return value.astype(np.float16).astype(np.float32)


def _search_symmetric(x: Array) -> Array:
    """The scale of each row of x [R, 16] for codes -32 .. 31: ggml's make_qx_quants(rmse_type 1), weights x^2."""
    largest = np.take_along_axis(x, np.abs(x).argmax(1, keepdims=True), 1)[:, 0]
    usable = np.abs(largest) >= _TINY
    safe, weights = np.where(usable, largest, 1), x * x
    best, scale = np.full(len(x), -1, np.float32), np.zeros(len(x), np.float32)
    for step in (0, *range(-9, 0), *range(1, 10)):
        inverse = -np.float32(32 + 0.1 * step) / safe
        q = np.clip(np.rint(inverse[:, None] * x), -32, 31).astype(np.float32)
        mixed, squares = (weights * x * q).sum(1), (weights * q * q).sum(1)
        solvable = squares > 0
        gain = np.where(solvable, mixed * mixed / np.where(solvable, squares, 1), 0)
        better = solvable & (gain > best)
        scale = np.where(better, mixed / np.where(solvable, squares, 1), scale)
        best = np.where(better, gain, best)
    return np.where(usable, scale, 0).astype(np.float32)


def _encode_q6_k(w: Array) -> Array:
    x = w.reshape(-1, 16)
    scale = _search_symmetric(x).reshape(-1, 16)
    largest = np.take_along_axis(scale, np.abs(scale).argmax(1, keepdims=True), 1)
    d = largest / np.float32(-128)
    s = np.minimum(np.rint(scale * _inverse(d)), 127).astype(np.int8)
    step = _halved(d) * s.astype(np.float32)
    q = np.clip(np.rint(x.reshape(-1, 16, 16) * _inverse(step)[..., None]), -32, 31).astype(np.int8)
    unsigned = (q + 32).astype(np.uint8).reshape(-1, 2, 4, 32)  # [blocks, half, quarter, 32]
    low = (unsigned[:, :, :2] & 15) | ((unsigned[:, :, 2:] & 15) << 4)
    high = np.zeros((len(unsigned), 2, 32), np.uint8)
    for quarter in range(4):
        high |= (unsigned[:, :, quarter] >> 4) << (2 * quarter)
    return np.concatenate([low.reshape(-1, 128), high.reshape(-1, 64), s.view(np.uint8), _head(d)], axis=1)


ENCODERS: dict[str, Callable[[Array], Array]] = {
    **{"Q4_0": _encode_q4_0, "Q4_1": _encode_q4_1, "Q8_0": _encode_q8_0},
    **{"Q4_K": _encode_q4_k, "Q6_K": _encode_q6_k},
}


def encode_floats(w: Array, block: Block) -> Array:
    """float32 [R, K] as bytes of `block`: uint8 [R, bytes of a row]. K must hold whole blocks."""
    if block.name in ENCODERS:
        return ENCODERS[block.name](np.ascontiguousarray(w, np.float32)).reshape(len(w), -1)
    if block.name == "F16":
        return w.astype(np.float16).view(np.uint8)
    if block.name == "BF16":  # exact: w holds bfloat16 numbers
        return (np.ascontiguousarray(w, np.float32).view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    assert block.name == "F32", block.name
    return np.ascontiguousarray(w, np.float32).view(np.uint8)


def fitting(block: Block, columns: int) -> Block:
    """`block`, or Q8_0 or F16 where rows of `columns` hold no whole blocks of it."""
    if columns % block.size == 0:
        return block
    return BY_NAME["Q8_0" if columns % 32 == 0 else "F16"]


assert BY_NAME["Q4_K"].size == QK
