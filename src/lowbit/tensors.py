"""PackedWeight: a quantized [N, K] weight as it lies in memory and on disk (numerics/storage.py).

Names, shapes and bytes of the first four are those of a compressed-tensors checkpoint (`tensors()`), so saving is
copying. nf4 and fp4 have no compressed-tensors form; io/bitsandbytes.py names their entries.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit.errors import CheckpointError
from lowbit.numerics import affine, codebook, microscale
from lowbit.numerics.pack import pack, unpack
from lowbit.numerics.scheme import QuantScheme
from lowbit.numerics.storage import storage_of, tensor_shapes


@dataclass(frozen=True)
class PackedWeight:
    """Codes, scales and zero-points of one [N, K] weight.

    scale: [1], [N, 1] or [N, K/G] in the checkpoint's dtype; for nf4 and fp4 the blocks' absmax, float32 or nested.
    zero: int32 packed along N as in compressed-tensors ([ceil(N B / 32), K/G]); int8 in the shape of the scale where
    the codes are not packed. global_scale: float32 [1], nvfp4's divisor. order: int32 [K] where the scheme is ordered:
    column j of the codes stands for input order[j].
    """

    scheme: QuantScheme
    shape: tuple[int, int]
    codes: Tensor
    scale: Tensor | codebook.NestedAbsmax
    zero: Tensor | None = None
    global_scale: Tensor | None = None
    order: Tensor | None = None

    @classmethod
    def from_codes(
        cls,
        q: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        scheme: QuantScheme,
        global_scale: Tensor | None = None,
    ) -> "PackedWeight":
        """Pack integer or fp8 codes q [N, K] with their scale and zero-point (numerics/affine.py).

        nvfp4 and mxfp4: q holds levels, scale their multipliers, global_scale nvfp4's divisor (algorithms/blocks.py).
        """
        rows, columns = q.shape
        if storage_of(scheme) == "pairs":
            stored = microscale.stored_scale(scale, scheme.weights.format, global_scale)
            codes = microscale.pack_pairs(microscale.codes_of_levels(q))
            return cls(scheme, (rows, columns), codes, stored, global_scale=global_scale)
        if storage_of(scheme) == "packed":
            bits = scheme.weights.bits
            if zero is not None and zero.dim() == 2:
                zero = pack(zero.T, bits).T.contiguous()  # [N, K/G] -> [N B / 32, K/G]
            q = pack(q, bits)
        return cls(scheme, (rows, columns), q, scale, zero)

    @classmethod
    def from_float(cls, w: Tensor, scheme: QuantScheme, scale_dtype: torch.dtype) -> "PackedWeight":
        """w [N, K] rounded to nearest under `scheme` with min/max scales; the baseline that needs no data."""
        weights = scheme.weights
        if weights.format.kind == "codebook":
            return cls._from_blocks(w, scheme)
        if storage_of(scheme) == "pairs":
            return cls._from_groups(w, scheme)
        scale, zero = affine.choose_scale(*affine.value_range(w, weights), weights, scale_dtype)
        return cls.from_codes(affine.encode(w, scale, zero, weights), scale, zero, scheme)

    @classmethod
    def _from_blocks(cls, w: Tensor, scheme: QuantScheme) -> "PackedWeight":
        weights = scheme.weights
        assert weights.group_size is not None
        levels = codebook.levels_of(weights.format.name)
        q, absmax = codebook.encode_blocks(w, levels, weights.group_size)
        scale = codebook.double_quantize(absmax) if weights.nested else absmax
        rows, columns = w.shape
        return cls(scheme, (rows, columns), codebook.pack_nibbles(q, codebook.zero_code(levels)), scale)

    @classmethod
    def _from_groups(cls, w: Tensor, scheme: QuantScheme) -> "PackedWeight":
        number_format = scheme.weights.format
        divisor = microscale.choose_global_scale(w) if number_format.name == "nvfp4" else None
        largest = affine.group_view(w.float(), scheme.weights).abs().amax(-1)  # [N, K] -> [N, K/G]
        scale = microscale.choose_scale(largest, number_format, divisor)
        codes = microscale.pack_pairs(microscale.encode(w, scale, divisor))
        return cls(scheme, (w.shape[0], w.shape[1]), codes, scale, global_scale=divisor)

    @property
    def bytes(self) -> int:
        """Bytes of codes, scales and zero-points together."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def q(self) -> Tensor:
        """The codes, unpacked: int8 (float8_e4m3fn for fp8; uint8 for the 4-bit floats and codebooks) [N, K].

        Columns stand as they are stored; `order` tells which input each of them is.
        """
        storage = storage_of(self.scheme)
        if storage == "pairs":
            return microscale.unpack_pairs(self.codes)
        if storage == "packed":
            return unpack(self.codes, self.scheme.weights.bits, self.shape[1])
        if storage == "nibbles":
            return codebook.unpack_nibbles(self.codes, self.shape[0] * self.shape[1]).view(self.shape)
        return self.codes

    def zero_points(self) -> Tensor | None:
        """The zero-points, unpacked: int8 in the shape of the scale, contiguous; or None."""
        if self.zero is None or self.zero.dtype == torch.int8:
            return self.zero
        return unpack(self.zero.T.contiguous(), self.scheme.weights.bits, self.shape[0]).T.contiguous()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K] that the codes stand for; computed in float32, then rounded to dtype."""
        if isinstance(self.scale, codebook.NestedAbsmax) or storage_of(self.scheme) == "nibbles":
            return self._dequantize_blocks(dtype)
        if storage_of(self.scheme) == "pairs":
            return microscale.decode(self.q(), self.scale, self.global_scale).to(dtype)
        w = affine.decode(self.q(), self.scale, self.zero_points(), self.scheme.weights).to(dtype)
        if self.order is None:
            return w
        ordered = torch.empty_like(w)
        ordered[:, self.order.long()] = w
        return ordered

    def _dequantize_blocks(self, dtype: torch.dtype) -> Tensor:
        weights = self.scheme.weights
        assert weights.group_size is not None
        absmax = self.scale.decode() if isinstance(self.scale, codebook.NestedAbsmax) else self.scale
        levels = codebook.levels_of(weights.format.name)
        return codebook.decode_blocks(self.q(), absmax, levels, weights.group_size, self.shape, dtype)

    def tensors(self) -> dict[str, Tensor]:
        """The named tensors that hold this weight: compressed-tensors' names, or ours for nf4 and fp4 in memory."""
        storage = storage_of(self.scheme)
        if isinstance(self.scale, codebook.NestedAbsmax):
            nested = self.scale
            return {
                "weight_packed": self.codes,
                "weight_absmax": nested.codes,
                "weight_nested_absmax": nested.absmax,
                "weight_nested_offset": nested.offset,
            }
        named = {"weight_packed" if storage in ("packed", "pairs", "nibbles") else "weight": self.codes}
        named["weight_absmax" if storage == "nibbles" else "weight_scale"] = self.scale
        if self.zero is not None:
            named["weight_zero_point"] = self.zero
        if self.global_scale is not None:
            named["weight_global_scale"] = self.global_scale
        if self.order is not None:
            named["weight_order"] = self.order
        if storage == "packed":
            named["weight_shape"] = torch.tensor(self.shape)
        return named

    def check(self, name: str) -> None:
        """Raise CheckpointError unless every tensor has the shape that the scheme asks for; name is the layer's."""
        scale_dtype = self.scale.dtype if isinstance(self.scale, Tensor) else torch.float32
        expected, named = tensor_shapes(self.scheme, self.shape, scale_dtype), self.tensors()
        for key, (shape, dtype) in expected.items():
            found = named.get(key)
            if found is None or tuple(found.shape) != shape or found.dtype != dtype:
                have = "missing" if found is None else f"{found.dtype} {list(found.shape)}"
                raise CheckpointError(
                    f"{name}.{key} is {have}, but {self.scheme} of {list(self.shape)} needs {dtype} {list(shape)}; "
                    "the checkpoint is damaged or its config describes another one"
                )

    def rows(self, start: int, stop: int) -> "PackedWeight":
        """Rows start to stop as a weight of their own; not for nf4 and fp4, whose blocks may straddle rows.

        Raises CheckpointError where a cut goes through tiles.
        """
        assert isinstance(self.scale, Tensor)
        if storage_of(self.scheme) == "pairs":
            return replace(
                self, shape=(stop - start, self.shape[1]), codes=self.codes[start:stop], scale=self.scale[start:stop]
            )
        if self.scheme.weights.granularity == "tile":
            return self._tile_rows(start, stop)
        zero = self.zero_points()
        per_row = self.scale.dim() == 2
        cut = PackedWeight.from_codes(
            self.q()[start:stop],
            self.scale[start:stop] if per_row else self.scale,
            zero[start:stop] if zero is not None and per_row else zero,
            self.scheme,
        )
        return replace(cut, order=self.order)

    def _tile_rows(self, start: int, stop: int) -> "PackedWeight":
        assert isinstance(self.scale, Tensor)
        size = self.scheme.weights.group_size or 1
        if start % size or (stop % size and stop != self.shape[0]):
            raise CheckpointError(f"rows {start} to {stop} cut through tiles of {size} rows, which share their scale")
        scale = self.scale[start // size : -(-stop // size)]
        return PackedWeight(self.scheme, (stop - start, self.shape[1]), self.codes[start:stop], scale)

    @classmethod
    def stack(cls, parts: Sequence["PackedWeight"]) -> "PackedWeight":
        """Weights of one scheme and K, one below the other.

        Raises CheckpointError where they have no common form: other scales per tensor, other orders, cut tiles.
        """
        if len(parts) == 1:
            return parts[0]
        _check_stackable(parts)
        if storage_of(parts[0].scheme) in ("pairs", "fp8") and parts[0].scheme.weights.granularity != "tensor":
            shape = (sum(part.shape[0] for part in parts), parts[0].shape[1])
            scale = torch.cat([part.scale for part in parts])  # type: ignore[misc]
            return replace(parts[0], shape=shape, codes=torch.cat([part.codes for part in parts]), scale=scale)
        scales = [part.scale for part in parts if isinstance(part.scale, Tensor)]
        zeros = [zero for part in parts if (zero := part.zero_points()) is not None]
        scale, zero = _stacked(scales), _stacked(zeros) if zeros else None
        stacked = cls.from_codes(torch.cat([part.q() for part in parts]), scale, zero, parts[0].scheme)
        return replace(stacked, order=parts[0].order)

    def in_order(self) -> "PackedWeight":
        """This weight for inputs that are sorted by `order` already; itself where it has none."""
        if self.order is None:
            return self
        weights = replace(self.scheme.weights, ordered=False)
        return replace(self, scheme=replace(self.scheme, weights=weights), order=None)

    @classmethod
    def from_tensors(cls, named: dict[str, Tensor], scheme: QuantScheme, shape: tuple[int, int]) -> "PackedWeight":
        """The inverse of `tensors()`."""
        codes = named["weight_packed"] if "weight_packed" in named else named["weight"]
        if "weight_nested_absmax" in named:
            nested = codebook.NestedAbsmax(
                named["weight_absmax"], named["weight_nested_absmax"], named["weight_nested_offset"]
            )
            return cls(scheme, shape, codes, nested)
        scale = named["weight_absmax"] if "weight_absmax" in named else named["weight_scale"]
        zero, divisor = named.get("weight_zero_point"), named.get("weight_global_scale")
        return cls(scheme, shape, codes, scale, zero, divisor, named.get("weight_order"))


def _check_stackable(parts: Sequence[PackedWeight]) -> None:
    """Raise CheckpointError unless these weights can be one."""
    first, size = parts[0], parts[0].scheme.weights.group_size or 1
    if any(part.scheme != first.scheme or part.shape[1] != first.shape[1] for part in parts):
        raise CheckpointError(
            "weights that are one in memory are quantized in different ways: "
            + ", ".join(f"{part.scheme} {list(part.shape)}" for part in parts)
        )
    for mine in ("order", "global_scale"):
        values = [getattr(part, mine) for part in parts]
        if values[0] is not None and any(not torch.equal(value, values[0]) for value in values[1:]):
            raise CheckpointError(f"weights that are one in memory have different {mine}s; lowbit can't join them")
    if first.scheme.weights.granularity == "tile" and any(part.shape[0] % size for part in parts[:-1]):
        raise CheckpointError(
            f"weights that are one in memory end within a tile of {size} rows; lowbit can't join them"
        )


def _stacked(parameters: Sequence[Tensor]) -> Tensor:
    """Scales or zero-points of weights that are stacked; one per tensor stays one, and must be the same for all."""
    if parameters[0].dim() == 2:
        return torch.cat(list(parameters))
    if any(not torch.equal(parameter, parameters[0]) for parameter in parameters):
        raise CheckpointError("weights that are one in memory have different scales per tensor; lowbit can't join them")
    return parameters[0]


def check_finite(w: Tensor, name: str) -> None:
    """Raise CheckpointError when w holds NaN or infinity, naming the tensor."""
    broken = w.numel() - int(w.isfinite().sum())
    if broken:
        raise CheckpointError(
            f"{name} holds {broken} values that are NaN or infinite; the checkpoint is damaged or training diverged: "
            "get a clean copy of the model"
        )
