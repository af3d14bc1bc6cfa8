"""The fast layout of a weight beside 16-bit activations: how codes, scales and zero-points are arranged for a warp.

cuda/wna16_record.cuh draws it: strips of 16 rows, records of 16 x 128, the records of 16 strips together; inside a
record the tensor core's operand order. It is derived from the canonical tensors on their device at first use, kept
beside the weight's code tensor and gone with it: moving or replacing the weight releases it, saving never sees it.

    "int2" "int4" "int8"   integers, stored as q + 2^(B-1); 3 bits become 4; 5, 6 and 7 become 8
    "lut"                  nf4 and fp4: codes of a 16-level table

Scales are kept as fp16 times a power of two (`factor`) chosen so that the largest lies in [2^14, 2^15): a bf16 or fp16
scale is exact unless it is 2^28 times smaller than the largest, a float32 one is rounded to 11 bits.
`records` here is the readable twin of cuda/wna16_layout.cu, and its oracle.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from lowbit.numerics.codebook import NestedAbsmax
from lowbit.numerics.storage import storage_of
from lowbit.tensors import PackedWeight

STRIP, RECORD, UNIT = 16, 128, 256
GROUPS = (128, 64, 32, 16)
FAST_BITS = {"int2": 2, "int4": 4, "int8": 8, "lut": 4}


@dataclass(frozen=True)
class FastForm:
    """Which kernel variant reads the records: the codes' form, columns under one scale, zero-points or not."""

    codes: str
    group: int
    has_zero: bool

    @property
    def bits(self) -> int:
        return FAST_BITS[self.codes]

    @property
    def record_bytes(self) -> int:
        groups = RECORD // self.group
        return STRIP * RECORD * self.bits // 8 + groups * STRIP * (2 + self.has_zero)


@dataclass(frozen=True)
class FastWeight:
    """records uint8 [units, records, 16 strips, record_bytes]; factor float32 [1]; levels [16] by dtype for "lut"."""

    form: FastForm
    records: Tensor
    factor: Tensor
    levels: dict[torch.dtype, Tensor] | None


def form_refusal(weight: PackedWeight) -> str | None:
    """Why `weight` has no fast layout, or None."""
    scheme = weight.scheme.weights
    if weight.order is not None:
        return "its columns are stored in another order than x's; the op sorts x first"
    if storage_of(weight.scheme) not in ("packed", "nibbles"):
        return f"{weight.scheme} is not a scheme for 16-bit activations"
    if scheme.group_size is not None and _group_of(weight) is None:
        return f"groups of {scheme.group_size} over {weight.shape[1]} columns don't fall on multiples of 16"
    return None


def form_of(weight: PackedWeight) -> FastForm:
    """The form that `weight` takes; it must not be refused."""
    scheme = weight.scheme.weights
    if scheme.format.kind == "codebook":
        codes = "lut"
    else:
        codes = "int2" if scheme.bits == 2 else "int4" if scheme.bits <= 4 else "int8"
    return FastForm(codes, _group_of(weight) or RECORD, weight.zero is not None)


def _group_of(weight: PackedWeight) -> int | None:
    """The most columns, of 128, 64, 32 and 16, that always lie under one scale."""
    scheme, columns = weight.scheme.weights, weight.shape[1]
    if scheme.group_size is None:
        return None
    whole = scheme.granularity == "group"  # groups divide the rows; blocks of the flattened weight may straddle them
    return next((g for g in GROUPS if scheme.group_size % g == 0 and (whole or columns % g == 0)), None)


def normalized_scales(weight: PackedWeight, form: FastForm) -> tuple[Tensor, Tensor, Tensor | None]:
    """(scales fp16 [N, C], factor float32 [1], zeros uint8 [N, C] or None), C = the row's groups padded to a record."""
    scale = weight.scale.decode() if isinstance(weight.scale, NestedAbsmax) else weight.scale.float()
    spread = _spread(scale, weight, form)
    largest = spread.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
    factor = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 15)  # largest / factor < 2^15
    zeros = None
    if (points := weight.zero_points()) is not None:
        zeros = _spread(points.int() + 2 ** (form.bits - 1), weight, form).to(torch.uint8)
    return (spread / factor).half(), factor.view(1), zeros


def _spread(parameter: Tensor, weight: PackedWeight, form: FastForm) -> Tensor:
    """A scale or zero-point for every row and every `form.group` columns: [N, C], zeros where K is padded."""
    rows, columns = weight.shape
    scheme = weight.scheme.weights
    chunks = -(-columns // form.group)
    if scheme.granularity == "block":
        assert scheme.group_size is not None
        starts = torch.arange(rows * chunks, device=parameter.device) * form.group  # chunks * group = K here
        spread = parameter[starts // scheme.group_size].view(rows, chunks)
    elif scheme.granularity == "group":
        assert scheme.group_size is not None
        spread = parameter.repeat_interleave(scheme.group_size // form.group, dim=1)
    else:
        spread = parameter.reshape(-1, 1).expand(rows, chunks)
    padded = -(-columns // RECORD) * RECORD // form.group
    return torch.nn.functional.pad(spread, (0, padded - chunks)).contiguous()


def unsigned_codes(weight: PackedWeight, form: FastForm) -> Tensor:
    """Codes [N, K] as the records store them: uint8, offset by 2^(bits-1) where they are integers."""
    q = weight.q()
    return q if form.codes == "lut" else (q.int() + 2 ** (form.bits - 1)).to(torch.uint8)


def records(weight: PackedWeight) -> Tensor:
    """The records of `weight`, uint8 [units, records, 16 strips, record_bytes], in plain torch on any device."""
    form = form_of(weight)
    scales, _, zeros = normalized_scales(weight, form)
    parts = [_code_bytes(unsigned_codes(weight, form), form), _pair_rows(scales, form)]
    if zeros is not None:
        parts.append(_pair_rows(zeros, form))
    strips = torch.cat(parts, dim=-1)  # [strips, records, record_bytes]
    return strips.unflatten(0, (-1, UNIT // STRIP)).transpose(1, 2).contiguous()


def _code_bytes(codes: Tensor, form: FastForm) -> Tensor:
    """uint8 codes [N, K] in operand order: [strips, records, 256 bits]."""
    rows, columns = codes.shape
    padding = (0, -columns % RECORD, 0, -rows % UNIT)
    filler = 0 if form.codes == "lut" else 2 ** (form.bits - 1)
    padded = torch.nn.functional.pad(codes, padding, value=filler).long()
    # [N, K] -> [strip, r, g, record, half, j, q, c, p]: row = 8 r + g, column = 64 half + 16 j + 8 q + 2 c + p
    tiles = padded.view(-1, 2, 8, padded.shape[1] // RECORD, 2, 4, 2, 4, 2)
    lanes = tiles.permute(0, 3, 4, 2, 7, 5, 6, 1, 8)  # [strip, record, half, g, c, j, q, r, p]
    q, r, p = (torch.arange(2, device=codes.device).view(shape) for shape in ((2, 1, 1), (1, 2, 1), (1, 1, 2)))
    if form.codes == "int8":  # a word per (j, q)
        words = (lanes << (8 * r + 16 * p)).sum((-1, -2)).flatten(-2)
        words = words.unflatten(-1, (2, 4)).movedim(-2, 3)  # two vectors of four words: [.., half, part, g, c, 4]
    elif form.codes == "int2":  # a word per two steps j
        odd = torch.arange(2, device=codes.device).view(2, 1, 1, 1)
        words = (lanes.unflatten(5, (2, 2)) << (2 * (4 * odd + 2 * q + r) + 16 * p)).sum((-1, -2, -3, -4))
    else:  # a word per step
        shifts = 8 * (2 * q + r) + 4 * p if form.codes == "lut" else 4 * (2 * q + r) + 16 * p
        words = (lanes << shifts).sum((-1, -2, -3))
    signed = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    return signed.flatten(2).contiguous().view(torch.uint8)


def _pair_rows(parameter: Tensor, form: FastForm) -> Tensor:
    """[N, C] -> bytes [strips, records, ...], rows g and g + 8 of a strip side by side."""
    padded = torch.nn.functional.pad(parameter, (0, 0, 0, -parameter.shape[0] % UNIT))
    groups = RECORD // form.group
    pairs = padded.view(-1, 2, 8, padded.shape[1] // groups, groups).permute(
        0, 3, 4, 2, 1
    )  # [strip, record, group, g, r]
    return pairs.flatten(2).contiguous().view(torch.uint8)


_fast: WeakIdKeyDictionary = WeakIdKeyDictionary()


def fast_weight(weight: PackedWeight, derive: Callable[[PackedWeight], FastWeight]) -> FastWeight:
    """The fast form of `weight`, made by `derive(weight)` at first use and again after the codes were written to."""
    known = _fast.get(weight.codes)
    if known is None or known[0] != weight.codes._version:
        known = _fast[weight.codes] = (weight.codes._version, derive(weight))
    return known[1]


def release(weight: PackedWeight) -> None:
    """Free the fast form of `weight`, if it has one; its next use derives it again."""
    _fast.pop(weight.codes, None)
