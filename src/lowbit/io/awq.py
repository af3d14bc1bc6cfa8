"""AWQ checkpoints (AutoAWQ): 4-bit codes with zero-points, two layouts.

    GEMM   {m}.qweight int32 [K, N/8]   {m}.qzeros int32 [G, N/8]   {m}.scales float16 [G, N]      packed along N
           nibble i of word c holds column 8c + (0, 2, 4, 6, 1, 3, 5, 7)[i]
    GEMV   {m}.qweight int32 [N, K/8]   {m}.qzeros int32 [N, Z]     {m}.scales float16 [N, 8 Z]    packed along K and G
           in natural order; Z words hold the G = K / group_size zero-points, the rest is filling

    w_nk = scales_gn (q_kn - zero_gn), both unsigned as stored

Sources: AutoAWQ 0.2.9 modules/linear/gemm.py and gemv.py, utils/packing_utils.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import CheckpointError, InputError
from lowbit.io.stored import Reader, Stored, need, whole_number
from lowbit.numerics.pack import pack, unpack
from lowbit.numerics.scheme import QuantScheme
from lowbit.tensors import PackedWeight

_BITS = 4


class AwqReader(Reader):
    """Reads GEMM and GEMV."""

    endings = (".qweight", ".qzeros", ".scales")

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.version = str(self.config.get("version", "gemm")).lower()
        bits = self.config.get("bits", self.config.get("w_bit", _BITS))
        if self.version not in ("gemm", "gemv") or bits != _BITS or self.config.get("backend") == "llm-awq":
            raise CheckpointError(
                f"lowbit reads 4-bit AWQ of the versions gemm and gemv, not {bits} bits of {self.version!r}"
            )

    def read(self, module: str) -> Stored:
        tensors = self.tensors(module)
        for key in ("qweight", "qzeros", "scales"):
            need(key in tensors and tensors[key].dim() == 2, module, f"it has no matrix {key}")
        need(tensors["qweight"].dtype == tensors["qzeros"].dtype == torch.int32, module, "its words are not int32")
        need(tensors["scales"].is_floating_point(), module, "scales are no floating-point numbers")
        read = self._read_gemv if self.version == "gemv" else self._read_gemm
        codes, zero, scale, shape = read(module, **tensors)
        size = shape[1] // scale.shape[1]
        declared = self.config.get("group_size", self.config.get("q_group_size"))
        text = "w4a16" + f"-g{size}" * (scale.shape[1] > 1 or declared == size)
        if self.config.get("zero_point", True) is False and torch.equal(zero, torch.zeros_like(zero)):
            return Stored(PackedWeight(QuantScheme.parse(text), shape, codes, scale))
        packed_zero = pack(zero.T, _BITS).T.contiguous()  # [N, G] -> [N/8, G]
        return Stored(PackedWeight(QuantScheme.parse(text + "-asym"), shape, codes, scale, packed_zero))

    def describe(self, module: str) -> str:
        size = self.config.get("group_size", self.config.get("q_group_size", -1))
        asymmetric = self.config.get("zero_point", True) is not False
        return "w4a16" + (f"-g{size}" if size != -1 else "") + "-asym" * asymmetric

    def _read_gemm(
        self, module: str, qweight: Tensor, qzeros: Tensor, scales: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
        """(codes [N, K/8], zero-points int8 [N, G], scale [N, G], (N, K))."""
        (columns, words), (groups, rows) = qweight.shape, scales.shape
        fits = rows == 8 * words and tuple(qzeros.shape) == (groups, words) and groups > 0
        need(fits and columns % max(groups, 1) == 0 and columns % 8 == 0, module, _unfit(qweight, qzeros, scales))
        return _along_inputs(qweight), _by_column(qzeros).T, scales.T.contiguous(), (rows, columns)

    def _read_gemv(
        self, module: str, qweight: Tensor, qzeros: Tensor, scales: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
        rows, columns = qweight.shape[0], 8 * qweight.shape[1]
        size = whole_number(self.config, "group_size", self.config.get("q_group_size"))
        size = columns if size == -1 else size
        groups = columns // size if size > 0 else 0
        fits = groups > 0 and columns % size == 0 and qzeros.shape[0] == scales.shape[0] == rows
        fits = fits and scales.shape[1] >= groups and 8 * qzeros.shape[1] >= groups
        need(fits, module, _unfit(qweight, qzeros, scales))
        return qweight, unpack(qzeros, _BITS, groups), scales[:, :groups].contiguous(), (rows, columns)


def _unfit(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> str:
    shapes = (("qweight", qweight), ("qzeros", qzeros), ("scales", scales))
    return ", ".join(f"{key} {list(tensor.shape)}" for key, tensor in shapes) + " don't fit each other"


def _by_column(words: Tensor) -> Tensor:
    """int32 [R, N/8] in AWQ's order -> codes int8 [R, N] in the order of the columns."""
    return unpack(_spread(words) | (_spread(words >> 16) << 4), _BITS, 8 * words.shape[1])


def _by_nibble(q: Tensor) -> Tensor:
    """Codes int8 [R, N] -> int32 [R, N/8]; the inverse of `_by_column`."""
    words = pack(q, _BITS)
    return _gathered(words) | (_gathered(words >> 4) << 16)


# AWQ's order holds the even columns in the low half of a word and the odd ones in the high half. Moving nibbles within
# words is eight operations a word; an index over the codes took as long as the rest of a conversion.


def _spread(words: Tensor) -> Tensor:
    """The four low nibbles of each word, moved to its even places."""
    low = words & 0xFFFF
    low = (low | (low << 8)) & 0x00FF00FF
    return (low | (low << 4)) & 0x0F0F0F0F


def _gathered(words: Tensor) -> Tensor:
    """The nibbles at even places, moved to the four low ones."""
    even = words & 0x0F0F0F0F
    even = (even | (even >> 4)) & 0x00FF00FF
    return (even | (even >> 8)) & 0xFFFF


# Packed along N or along K: between both lie squares of eight words, whose 8 x 8 nibbles are transposed in three steps
# of halves, quarters and eighths, without unpacking a code: 58.7 M of them in 27 ms to AWQ and 32 ms from it, where the
# way by int8 took 262 and 97.
_STEPS = ((4, 16, 0x0000FFFF), (2, 8, 0x00FF00FF), (1, 4, 0x0F0F0F0F))  # distance of the words, of the bits, mask
_SLOT = (0, 4, 1, 5, 2, 6, 3, 7)  # column 8c + j stands in nibble _SLOT[j]
_CHUNK_WORDS = 2**18  # stays in the processor's cache


def _transpose_nibbles(words: Tensor) -> None:
    """words int32 [8, X], in place: nibble j of word i becomes nibble i of word j."""
    for distance, bits, mask in _STEPS:
        pairs = words.view(8 // (2 * distance), 2, distance, -1)  # [8, X] -> [blocks, low or high, distance, X]
        low, high = pairs[:, 0], pairs[:, 1]
        moved = ((low >> bits) ^ high) & mask
        high ^= moved
        low ^= moved << bits


def _along_inputs(qweight: Tensor) -> Tensor:
    """AWQ's words int32 [K, N/8] -> ours [N, K/8]."""
    columns, width = qweight.shape
    words = torch.empty(width, 8, columns // 8, dtype=torch.int32)
    for part in _parts(width, columns):
        square = qweight[:, part].view(columns // 8, 8, -1).permute(1, 2, 0).contiguous()  # [K/8, 8, C] -> [8, C, K/8]
        _transpose_nibbles(square.view(8, -1))
        for column, slot in enumerate(_SLOT):
            words[part, column] = square[slot]
    return words.view(8 * width, columns // 8)


def _along_outputs(codes: Tensor) -> Tensor:
    """Our words int32 [N, K/8] -> AWQ's [K, N/8]."""
    rows, width = codes.shape
    words = torch.empty(width, 8, rows // 8, dtype=torch.int32)
    for part in _parts(rows // 8, 8 * width):
        square = torch.empty(8, width, part.stop - part.start, dtype=torch.int32)  # [8, K/8, C]
        for column, slot in enumerate(_SLOT):
            square[slot] = codes.view(-1, 8, width)[part, column].T
        _transpose_nibbles(square.view(8, -1))
        words[:, :, part] = square.transpose(0, 1)
    return words.view(8 * width, rows // 8)


def _parts(count: int, each: int) -> list[slice]:
    """0 to `count` in slices of about _CHUNK_WORDS words, `each` words a piece."""
    step = max(1, _CHUNK_WORDS // each)
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def refusal(weight: PackedWeight) -> str | None:
    """Why AWQ can't hold these very codes, or None."""
    weights = weight.scheme.weights
    if weights.format.kind != "int" or weights.bits != _BITS or weight.scheme.activations is not None:
        return f"AWQ holds 4-bit integers beside 16-bit activations, not {weight.scheme}"
    if weights.granularity == "tensor":
        return "AWQ has a scale per group or channel, not per tensor"
    if weight.order is not None:
        return "AWQ has no act-order"
    if weight.shape[0] % 8 or weight.shape[1] % 8:
        return f"AWQ packs eight rows a word, and {weight.shape[0]} x {weight.shape[1]} are no whole words"
    return None


def tensors_awq(name: str, weight: PackedWeight) -> dict[str, Tensor]:
    """The GEMM entries for module `name`. Raises InputError where AWQ can't hold these codes."""
    if why := refusal(weight):
        raise InputError(f"{name}: {why}")
    assert isinstance(weight.scale, Tensor)
    zero = weight.zero_points()
    if zero is None:
        zero = torch.zeros_like(weight.scale, dtype=torch.int8)
    return {
        f"{name}.qweight": _along_outputs(weight.codes),
        f"{name}.qzeros": _by_nibble(zero.T.contiguous()),
        f"{name}.scales": weight.scale.T.contiguous(),
    }


def config_awq(schemes: Mapping[str, QuantScheme], skip: Sequence[str]) -> dict[str, Any]:
    """The quantization_config; skip names linear modules that stay in 16 bits. Raises InputError for mixed groups."""
    sizes = {scheme.weights.group_size or -1 for scheme in schemes.values()}
    if len(sizes) > 1:
        raise InputError(f"AWQ has one group size for all layers, and this model has {sorted(sizes)}")
    return {
        "quant_method": "awq",
        "bits": _BITS,
        "group_size": sizes.pop(),
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": list(skip) or None,
    }
