"""A GGUF file as a model with packed weights: blocks whose integers fit our grids become codes, the rest floats.

    Q4_0, Q5_0, Q8_0     w4a16-g32, w5a16-g32, w8a16-g32     float16 scales
    Q3_K, Q6_K           w3a16-g16, w6a16-g16                scale = d times the small scale, exact in float32
    Q4_1, Q5_1           with zero-points where every minimum is a whole number of steps (files made from such codes)
    the others           dequantized, with a word about it: their minima are no whole number of steps

Weights are equal to llama.cpp's to the last bit in float32 either way.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from lowbit.errors import CheckpointError
from lowbit.io.empty import empty_model
from lowbit.io.gguf_blocks import Grid
from lowbit.io.gguf_file import GgufFile
from lowbit.io.gguf_names import FACTORS, config_of, heads_of, rows_from_gguf, to_transformers
from lowbit.io.stored import Reader, Stored
from lowbit.io.tensorfile import Entry
from lowbit.numerics.scheme import QuantScheme
from lowbit.tensors import PackedWeight

_BITS = {"Q4_0": 4, "Q4_1": 4, "Q5_0": 5, "Q5_1": 5, "Q8_0": 8, "Q3_K": 3, "Q6_K": 6}
_MINIMA = ("Q2_K", "Q4_K", "Q5_K")


class GgufFiles:
    """The tensors of a file under transformers' names, dequantized; what `fill` copies into float parameters."""

    def __init__(self, file: GgufFile, config: dict[str, Any]) -> None:
        self.file, self.config = file, config
        self.names: dict[str, str] = {}
        self.skipped = []
        for name in file.tensors:
            if name == FACTORS:
                continue  # in the config
            if (ours := to_transformers(name)) is None:
                self.skipped.append(name)
            else:
                self.names[ours] = name

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def entry(self, name: str) -> Entry:
        return Entry(torch.float32, self.file.tensors[self.names[name]].shape, 0, 0)

    def get(self, name: str) -> Tensor:
        """float32, rows as transformers has them."""
        w = torch.from_numpy(self.file.floats(self.names[name]).copy())
        order = self.order(name, w.shape[0])
        return w if order is None else w[order]

    def order(self, name: str, rows: int) -> Tensor | None:
        """Where transformers' rows stand in the file, where they are permuted. Raises CheckpointError."""
        heads = heads_of(name, self.config)
        if heads is None:
            return None
        if rows % (2 * heads):
            raise CheckpointError(f"{name} has {rows} rows, which are not those of {heads} heads; download it again")
        return rows_from_gguf(rows, heads)


class GgufReader(Reader):
    """Linear weights whose integers fit our grids."""

    def __init__(self, files: GgufFiles) -> None:
        self.files, self.warnings, self.experts = files, [], ()
        self.stored: dict[str, Stored] = {}
        self.modules = [
            name.removesuffix(".weight")
            for name in files.names
            if name.endswith("_proj.weight") or name == "lm_head.weight"
            if self._fits(name)
        ]
        if files.skipped:
            self.say(f"{len(files.skipped)} tensors have no place in the model, the first is {files.skipped[0]}")

    def _fits(self, name: str) -> bool:
        tensor = self.files.file.tensors[self.files.names[name]]
        kind = tensor.block.name
        if kind in ("Q4_1", "Q5_1") and self._grid(name) is None:
            self.say(f"{kind} weights are dequantized where a minimum is no whole number of steps")
            return False
        if kind in _MINIMA:
            self.say(f"{kind} weights are dequantized: their minima are no whole numbers of steps")
        return len(tensor.shape) == 2 and kind in _BITS

    def names(self, module: str) -> tuple[str, ...]:
        return (f"{module}.weight",)

    def _grid(self, name: str) -> tuple[Grid, np.ndarray | None] | None:
        """The tensor's integers and unsigned zero-points [blocks, groups]; None where a minimum fits no zero-point."""
        tensor = self.files.file.tensors[self.files.names[name]]
        octets = self.files.file.read(tensor.name).reshape(-1, tensor.block.bytes)
        assert tensor.block.grid is not None
        grid = tensor.block.grid(octets)
        if grid.minimum is None:
            return grid, None
        with np.errstate(divide="ignore", invalid="ignore"):
            zero = np.nan_to_num(np.rint(grid.minimum / grid.scale), nan=0.0, posinf=-1.0, neginf=-1.0)
        fits = (zero * grid.scale == grid.minimum) & (zero >= 0) & (zero < 2 ** _BITS[tensor.block.name])
        return (grid, zero) if fits.all() else None

    def read(self, module: str) -> Stored:
        name = f"{module}.weight"
        tensor = self.files.file.tensors[self.files.names[name]]
        found, (rows, columns) = self._grid(name), tensor.shape
        assert found is not None
        grid, zero = found
        bits, size = _BITS[tensor.block.name], grid.q.shape[-1]
        q = torch.from_numpy(grid.q.reshape(rows, columns).astype(np.int16) - _offset(grid, bits)).to(torch.int8)
        scale = torch.from_numpy(np.ascontiguousarray(grid.scale.reshape(rows, -1)))
        if tensor.block.name[2] != "K" and tensor.block.name[3:] != "K":
            scale = scale.half()
        points = None if zero is None else torch.from_numpy(zero.reshape(rows, -1) - 2 ** (bits - 1)).to(torch.int8)
        if (order := self.files.order(name, rows)) is not None:
            q, scale, points = q[order], scale[order], None if points is None else points[order]
        scheme = QuantScheme.parse(f"w{bits}a16-g{size}" + "-asym" * (points is not None))
        return Stored(PackedWeight.from_codes(q, scale, points, scheme))


def _offset(grid: Grid, bits: int) -> int:
    """What makes the file's integers ours: its zero, or the middle of unsigned codes."""
    return grid.zero if grid.minimum is None else 2 ** (bits - 1)


def gguf_settings(file: GgufFile) -> dict[str, Any]:
    """The transformers config of a file. Raises CheckpointError as gguf_names.config_of does."""
    factors = torch.from_numpy(file.floats(FACTORS).copy()).reshape(-1) if FACTORS in file.tensors else None
    return config_of(file.metadata, "output.weight" in file.tensors, factors)


def empty_gguf_model(path: Path, dtype: torch.dtype | None) -> tuple[PreTrainedModel, GgufFiles, GgufReader]:
    """The model without weights, and what fills it. Raises CheckpointError for a damaged file or another family."""
    file = GgufFile.open(path)
    settings = gguf_settings(file)
    config = AutoConfig.for_model(**settings)
    model = empty_model(config, str(path), dtype or torch.float32, len(file.tensors), path.stat().st_size)
    files = GgufFiles(file, settings)
    return model, files, GgufReader(files)
