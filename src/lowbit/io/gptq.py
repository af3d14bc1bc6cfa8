"""GPTQ checkpoints (AutoGPTQ, GPTQModel, optimum): how their tensors map to ours, both ways.

    {m}.qweight  int32 [K B / 32, N]    our packed codes (numerics/pack.py), transposed
    {m}.qzeros   int32 [G, N B / 32]    zero-points, packed along N; in v1 each is stored less one
    {m}.scales   float16 [G, N]
    {m}.g_idx    int32 [K]              the group of each input; k // group_size where nothing was reordered

    w_nk = scales_gn (q_kn - zero_gn)

Format names: "gptq" (v1) and "gptq_v2". v1 subtracts 0x11111111 from whole words (GPTQModel), so only adding it to
whole words gives back every zero-point: a zero-point of 0 borrows from its neighbour. 3 bits are shifted one by one.
A symmetric checkpoint tells by its values which of both it is, and its values are believed.
Sources: GPTQModel 7.7 nn_modules/qlinear/__init__.py (pack_original), utils/model.py; AutoGPTQ qlinear_cuda_old.py.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import CheckpointError, InputError
from lowbit.io.stored import Reader, Stored, need, whole_number
from lowbit.numerics.pack import pack, unpack
from lowbit.numerics.scheme import QuantScheme
from lowbit.tensors import PackedWeight

BITS = (2, 3, 4, 8)


class GptqReader(Reader):
    """Reads v1 and v2, with and without act-order."""

    endings = (".qweight", ".qzeros", ".scales", ".g_idx")

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        form = self.config.get("checkpoint_format") or self.config.get("format") or "gptq"
        if form not in ("gptq", "gptq_v2"):
            raise CheckpointError(f"lowbit reads the GPTQ formats gptq and gptq_v2, not {form!r}")
        if self.config.get("pack_dtype", "int32") != "int32":
            raise CheckpointError(f"lowbit reads GPTQ words of int32, not {self.config['pack_dtype']!r}")
        self.is_v2 = form == "gptq_v2"

    def settings(self, module: str) -> Mapping[str, Any]:
        """The config of one module: the common one under its `dynamic` rules ("+:regex" or "regex")."""
        dynamic = self.config.get("dynamic") or {}
        need(isinstance(dynamic, dict), module, "quantization_config.dynamic is no object")
        for pattern, overrides in dynamic.items():
            try:
                hit = not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), module)
            except re.error as error:
                raise CheckpointError(f"quantization_config.dynamic has the pattern {pattern!r}: {error}") from None
            if hit and isinstance(overrides, dict):
                return {**self.config, **overrides}
        return self.config

    def read(self, module: str) -> Stored:
        tensors, settings = self.tensors(module), self.settings(module)
        for key in ("qweight", "qzeros", "scales"):
            need(key in tensors and tensors[key].dim() == 2, module, f"it has no matrix {key}")
        qweight, scales = tensors["qweight"], tensors["scales"]
        need(qweight.dtype == tensors["qzeros"].dtype == torch.int32, module, "qweight and qzeros are not int32")
        need(scales.is_floating_point(), module, "scales are no floating-point numbers")
        bits = whole_number(settings, "bits")
        need(bits in BITS, module, f"{bits} bits are none of {', '.join(map(str, BITS))}")
        rows, (groups, columns) = qweight.shape[1], scales.shape
        inputs = qweight.shape[0] * 32 // bits
        fits = columns == rows and groups > 0 and inputs % max(groups, 1) == 0 and rows * bits % 32 == 0
        fits = fits and inputs * bits == qweight.shape[0] * 32
        fits = fits and tuple(tensors["qzeros"].shape) == (groups, rows * bits // 32)
        need(fits, module, _shapes(tensors, f"don't fit {bits} bits"))
        zero = self._zero(module, tensors["qzeros"], bits, rows, settings.get("sym", True) is not False)
        size = inputs // groups
        grouped = groups > 1 or settings.get("group_size") == size
        text = f"w{bits}a16" + f"-g{size}" * grouped + "-asym" * (zero is not None)
        codes, order = _ordered(module, qweight.T.contiguous(), tensors.get("g_idx"), bits, inputs, groups)
        scheme = QuantScheme.parse(text + "-order" * (order is not None))
        scale = scales.T.contiguous()
        return Stored(PackedWeight(scheme, (rows, inputs), codes, scale, zero, order=order))

    def describe(self, module: str) -> str:
        settings = self.settings(module)
        size = settings.get("group_size", -1)
        text = f"w{settings.get('bits')}a16" + (f"-g{size}" if size != -1 else "")
        return text + "-asym" * (settings.get("sym", True) is False) + "-order" * bool(settings.get("desc_act"))

    def _zero(self, module: str, qzeros: Tensor, bits: int, rows: int, symmetric: bool) -> Tensor | None:
        """Our zero-points [N B / 32, G], or None where all are the middle, which a symmetric layer's are."""
        is_v2 = self.is_v2
        if symmetric:
            middle = _word(0, bits, rows)
            if torch.equal(qzeros, middle.expand_as(qzeros)):
                self._believe(is_v2, True)
                return None
            if torch.equal(qzeros, _word(-1, bits, rows).expand_as(qzeros)):
                self._believe(is_v2, False)
                return None
            self.say(f"{module} has zero-points though the config says sym; they are kept")
        if not is_v2:
            qzeros = shift_zeros(qzeros, 1, bits, rows)
        return qzeros.T.contiguous()

    def _believe(self, declared: bool, found: bool) -> None:
        if declared != found:
            names = {True: "gptq_v2 (zero-points as they are)", False: "gptq (zero-points less one)"}
            self.say(f"the config says {names[declared]}, the symmetric zero-points are those of {names[found]}")


def _shapes(tensors: Mapping[str, Tensor], why: str) -> str:
    return ", ".join(f"{key} {list(tensor.shape)}" for key, tensor in tensors.items()) + f" {why}"


def _word(code: int, bits: int, rows: int) -> Tensor:
    """A row of packed zero-points that are all `code` (signed as ours): int32 [1, N B / 32]."""
    return pack(torch.full((1, rows), code, dtype=torch.int8), bits)


def shift_zeros(qzeros: Tensor, by: int, bits: int, rows: int) -> Tensor:
    """Packed zero-points [G, N B / 32] plus `by`, 1 (v1 -> v2) or -1: whole words at 2, 4, 8 bits, fields at 3."""
    if bits == 3:
        fields = unpack(qzeros, bits, rows) + (by + 4)  # signed -4 .. 3 -> 0 .. 7, and one
        return pack((fields & 7) - 4, bits)
    ones = _word(1 - 2 ** (bits - 1), bits, rows)
    return qzeros + by * ones  # int32 wraps as GPTQModel's does


def _ordered(
    module: str, codes: Tensor, g_idx: Tensor | None, bits: int, inputs: int, groups: int
) -> tuple[Tensor, Tensor | None]:
    """(codes with the columns of a group side by side, the input of each column); unchanged and None without order."""
    size = inputs // groups
    if g_idx is None:
        return codes, None
    need(tuple(g_idx.shape) == (inputs,), module, f"g_idx {list(g_idx.shape)} is not [{inputs}]")
    place = torch.arange(inputs, dtype=torch.int64) // size
    if torch.equal(g_idx.long(), place):
        return codes, None
    order = torch.argsort(g_idx.long(), stable=True)
    need(
        torch.equal(g_idx.long()[order], place), module, f"g_idx does not put {size} inputs in each of {groups} groups"
    )
    return pack(unpack(codes, bits, inputs)[:, order], bits), order.to(torch.int32)


def refusal(weight: PackedWeight, version: int) -> str | None:
    """Why GPTQ (version 1 or 2) can't hold these very codes, or None."""
    weights = weight.scheme.weights
    if weights.format.kind != "int" or weight.scheme.activations is not None:
        return f"GPTQ holds integer weights beside 16-bit activations, not {weight.scheme}"
    if weights.bits not in BITS:
        return f"GPTQ holds {', '.join(map(str, BITS))} bits, not {weights.bits}"
    if weights.granularity == "tensor":
        return "GPTQ has a scale per group or channel, not per tensor"
    rows, columns = weight.shape
    if rows * weights.bits % 32 or columns * weights.bits % 32:
        return f"GPTQ packs whole words, and {rows} x {columns} of {weights.bits} bits are none"
    zero = weight.zero_points()
    if version == 1 and zero is not None and int(zero.min()) == -(2 ** (weights.bits - 1)):
        return "its lowest zero-points are 0, which GPTQ v1 can't store; write gptq-v2"
    return None


def tensors_gptq(name: str, weight: PackedWeight, version: int) -> dict[str, Tensor]:
    """The checkpoint's entries for module `name`. Raises InputError where GPTQ can't hold these codes."""
    if why := refusal(weight, version):
        raise InputError(f"{name}: {why}")
    assert isinstance(weight.scale, Tensor)
    bits, (rows, columns) = weight.scheme.weights.bits, weight.shape
    codes, groups = weight.codes, weight.scale.shape[1]
    place = torch.arange(columns, dtype=torch.int32) // (columns // groups)
    g_idx = place
    if weight.order is not None:
        back = torch.argsort(weight.order)
        codes, g_idx = pack(unpack(codes, bits, columns)[:, back], bits), place[back]
    qzeros = _word(0, bits, rows).expand(groups, -1) if weight.zero is None else weight.zero.T
    if version == 1:
        qzeros = shift_zeros(qzeros.contiguous(), -1, bits, rows)
    return {
        f"{name}.qweight": codes.T.contiguous(),
        f"{name}.qzeros": qzeros.contiguous(),
        f"{name}.scales": weight.scale.T.contiguous(),
        f"{name}.g_idx": g_idx,
    }


def config_gptq(schemes: Mapping[str, QuantScheme], version: int, tool: str) -> dict[str, Any]:
    """The quantization_config for modules under `schemes`; modules unlike the first get a `dynamic` rule each."""
    settings = {name: _settings(scheme) for name, scheme in schemes.items()}
    first = next(iter(settings.values()))
    dynamic = {
        f"+:^{re.escape(name)}$": {key: value for key, value in own.items() if value != first[key]}
        for name, own in settings.items()
        if own != first
    }
    config = {
        "quant_method": "gptq",
        **first,
        "checkpoint_format": "gptq_v2" if version == 2 else "gptq",
        "true_sequential": True,
        "static_groups": False,
        "damp_percent": 0.1,
        "pack_dtype": "int32",
        "lm_head": "lm_head" in schemes,
        "meta": {"quantizer": [tool]},
    }
    return config | ({"dynamic": dynamic} if dynamic else {})


def _settings(scheme: QuantScheme) -> dict[str, Any]:
    weights = scheme.weights
    return {
        "bits": weights.bits,
        "group_size": weights.group_size or -1,
        "desc_act": weights.ordered,
        "sym": weights.symmetric,
    }
