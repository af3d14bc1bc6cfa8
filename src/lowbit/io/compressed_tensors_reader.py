"""Read the tensors of a compressed-tensors checkpoint, the config of which is compressed_tensors.py's.

It also takes what older versions wrote and 0.20 no longer reads, or misreads: 3, 5, 6 and 7 bits in whole codes a word
(before 0.17; told by the width of the rows, and 88 to 99 % of the values would be wrong), and groups that follow
weight_g_idx (before 0.20).
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import CheckpointError
from lowbit.io.compressed_tensors import parse_config
from lowbit.io.stored import Reader, Stored, need
from lowbit.numerics.formats import NVFP4
from lowbit.numerics.pack import pack, unpack, words_per_row
from lowbit.numerics.scheme import QuantScheme
from lowbit.numerics.storage import storage_of
from lowbit.tensors import PackedWeight

_WEIGHT_KEYS = ("weight_scale", "weight_zero_point", "weight_shape", "weight_global_scale", "weight_g_idx")
_INPUT_KEYS = ("input_scale", "input_zero_point", "input_global_scale")


class CompressedTensorsReader(Reader):
    """Reads every format of the table above."""

    endings = (".weight_packed", ".weight", *(f".{key}" for key in (*_WEIGHT_KEYS, *_INPUT_KEYS)))

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        sparsity = self.config.get("sparsity_config") or {}
        if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
            raise CheckpointError(f"lowbit does not read compressed-tensors' sparse format {sparsity['format']!r}")
        if isinstance(transform := self.config.get("transform_config") or {}, dict) and transform.get("config_groups"):
            raise CheckpointError("the checkpoint needs rotations at run time (transform_config), which lowbit lacks")
        self.schemes = parse_config(self.config, self.modules)

    def _modules(self) -> Iterable[str]:  # type: ignore[override]
        ends = (".weight_packed", ".weight_scale")
        return dict.fromkeys(name.removesuffix(end) for name in self.shapes for end in ends if name.endswith(end))

    def read(self, module: str) -> Stored:
        named, scheme = self.tensors(module), self.schemes[module]
        inputs = self._inputs(module, named, scheme)
        if "weight_packed" in named:
            named.pop("weight", None)
        codes = named.get("weight_packed", named.get("weight"))
        need(codes is not None and codes.dim() == 2, f"{module}.weight_packed", "it is missing or no matrix")
        assert codes is not None
        need("weight_scale" in named, f"{module}.weight_scale", "it is missing")
        shape = self._shape(module, named, codes, scheme)
        if scheme.weights.granularity == "tensor":
            named = {key: _one(value) if key != "weight_packed" and key != "weight" else value
                     for key, value in named.items()}  # fmt: skip
        named = self._as_ours(module, named, codes, scheme, shape)
        weight = PackedWeight.from_tensors(named, scheme, shape)
        order = named.get("weight_order")
        if scheme.weights.ordered and order is None:  # the file has no g_idx: nothing was reordered
            weight = replace(weight, scheme=replace(scheme, weights=replace(scheme.weights, ordered=False)))
        weight.check(module)
        return Stored(weight, inputs)

    def describe(self, module: str) -> str:
        return str(self.schemes[module])

    def _inputs(self, module: str, named: dict[str, Tensor], scheme: QuantScheme) -> dict[str, Tensor]:
        """The calibrated grid, taken out of `named`; only what the scheme calls for."""
        found = {key: _one(named.pop(key)) for key in _INPUT_KEYS if key in named}
        activations = scheme.activations
        if activations is None:
            return {}
        if activations.format == NVFP4:
            return {key: value for key, value in found.items() if key == "input_global_scale"}
        keys = () if activations.dynamic else _INPUT_KEYS[:1] if activations.symmetric else _INPUT_KEYS[:2]
        for key in keys:
            need(key in found, f"{module}.{key}", "it is missing, and quantization_config asks for it")
        return {key: found[key].to(torch.int8) if key == "input_zero_point" else found[key] for key in keys}

    def _shape(self, module: str, named: dict[str, Tensor], codes: Tensor, scheme: QuantScheme) -> tuple[int, int]:
        if "weight_packed" not in named:
            return codes.shape[0], codes.shape[1]
        if codes.dtype == torch.uint8:
            return codes.shape[0], 2 * codes.shape[1]
        if "weight_shape" in named:
            stored = named["weight_shape"]
            need(stored.numel() == 2 and not stored.is_floating_point(), module, "weight_shape is no pair of sizes")
            rows, columns = (int(size) for size in stored.reshape(-1).tolist())
        else:
            rows, columns = codes.shape[0], codes.shape[1] * 32 // scheme.weights.bits
        need(rows == codes.shape[0] and 0 < columns <= 32 * codes.shape[1], module,
             f"weight_shape [{rows}, {columns}] is not that of weight_packed {list(codes.shape)}")  # fmt: skip
        return rows, columns

    def _as_ours(
        self, module: str, named: dict[str, Tensor], codes: Tensor, scheme: QuantScheme, shape: tuple[int, int]
    ) -> dict[str, Tensor]:
        """The tensors as PackedWeight keeps them: codes packed where activations are not, or the other way round."""
        bits, storage = scheme.weights.bits, storage_of(scheme)
        if storage == "packed" and "weight_packed" not in named:
            need(codes.dtype == torch.int8, module, f"weight is {codes.dtype}, not int8")
            named["weight_packed"] = pack(named.pop("weight"), bits)
            if "weight_zero_point" in named and named["weight_zero_point"].dim() == 2:
                named["weight_zero_point"] = pack(named["weight_zero_point"].to(torch.int8).T, bits).T.contiguous()
        elif codes.dtype == torch.int32 and "weight_packed" in named:
            named = self._repacked(module, named, bits, shape)
            if storage == "int8":
                named["weight"] = unpack(named.pop("weight_packed"), bits, shape[1]).contiguous()
                if "weight_zero_point" in named and named["weight_zero_point"].dim() == 2:
                    named["weight_zero_point"] = unpack(named["weight_zero_point"].T, bits, shape[0]).T.contiguous()
        if storage == "packed":
            named["weight_shape"] = torch.tensor(shape)
        else:
            named.pop("weight_shape", None)
        if storage == "int8" and "weight_zero_point" in named:
            named["weight_zero_point"] = named["weight_zero_point"].to(torch.int8)
        if scheme.weights.symmetric:
            named.pop("weight_zero_point", None)
        if (g_idx := named.pop("weight_g_idx", None)) is not None and scheme.weights.ordered:
            named = self._ordered(module, named, g_idx, scheme, shape)
        return named

    def _repacked(self, module: str, named: dict[str, Tensor], bits: int, shape: tuple[int, int]) -> dict[str, Tensor]:
        """Codes and zero-points in dense words, where they were packed whole codes a word (before 0.17)."""
        (rows, columns), per_word = shape, 32 // bits
        codes, zero = named["weight_packed"], named.get("weight_zero_point")
        if codes.shape[1] == words_per_row(columns, bits):
            return named
        if codes.shape[1] != -(-columns // per_word):
            raise CheckpointError(
                f"{module}.weight_packed is {codes.dtype} {list(codes.shape)}, which packs no {rows} x {columns} of "
                f"{bits} bits; the checkpoint is damaged or its config describes another one"
            )
        self.say(f"{bits}-bit codes are packed as before compressed-tensors 0.17, whose successors misread them")
        named = named | {"weight_packed": pack(_whole_codes(codes, bits, columns), bits)}
        if zero is not None and zero.shape[0] == -(-rows // per_word):
            dense = pack(_whole_codes(zero.T.contiguous(), bits, rows), bits)
            named["weight_zero_point"] = dense.T.contiguous()
        return named

    def _ordered(
        self, module: str, named: dict[str, Tensor], g_idx: Tensor, scheme: QuantScheme, shape: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Columns sorted by group, with their inputs; where g_idx orders nothing, as they are."""
        bits, size = scheme.weights.bits, scheme.weights.group_size or shape[1]
        place = torch.arange(shape[1]) // size
        need(tuple(g_idx.shape) == (shape[1],), module, f"weight_g_idx {list(g_idx.shape)} is not [{shape[1]}]")
        if torch.equal(g_idx.long(), place):
            return named
        order = torch.argsort(g_idx.long(), stable=True)
        need(torch.equal(g_idx.long()[order], place), module, f"weight_g_idx does not put {size} inputs in each group")
        sorted_codes = pack(unpack(named["weight_packed"], bits, shape[1])[:, order], bits)
        return named | {"weight_packed": sorted_codes, "weight_order": order.to(torch.int32)}


def _one(value: Tensor) -> Tensor:
    """A lone number as [1]."""
    return value.reshape(1) if value.numel() == 1 else value


def _whole_codes(words: Tensor, bits: int, count: int) -> Tensor:
    """int32 [..., W] of 32 // bits whole codes each -> codes int8 [..., count]."""
    shifts = torch.arange(0, 32 // bits, dtype=torch.int32) * bits
    fields = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)  # [..., W, 32 // bits]
    return (fields - 2 ** (bits - 1)).to(torch.int8).flatten(-2)[..., :count].contiguous()
