"""The second look at a conversion: modules decoded anew (decoders.py) from the old files and from the new ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowbit.errors import CheckpointError
from lowbit.io.decoded import Decoded, same
from lowbit.io.decoders import decode
from lowbit.io.reading import reader_of
from lowbit.io.source import Source
from lowbit.io.targets import FLOAT, TARGETS
from lowbit.io.tensorfile import Files
from lowbit.numerics.scheme import QuantScheme


@dataclass(frozen=True)
class Written:
    """What was written: the format, the scheme of each module, the model's dtype."""

    target: str
    schemes: Mapping[str, QuantScheme]
    dtype: torch.dtype

    def config(self, module: str) -> dict[str, Any]:
        """The quantization_config of this module alone."""
        return TARGETS[self.target].config({module: self.schemes[module]}, [], self.dtype)


def verify_shard(shard: Path, modules: Sequence[str], files: Files, before: Mapping[str, Any], written: Written) -> int:
    """How many `modules` of the new file `shard` are what `files` hold under the config `before`: all of them.

    Raises CheckpointError at a difference.
    """
    new = Files.open([shard])
    for module in modules:
        old = decode(files.get, before, module)
        if written.target == FLOAT:
            w = new.get(f"{module}.weight")
            equal = w.dtype == written.dtype and _is_rounded(old, w)
        else:
            equal = same(old, decode(new.get, written.config(module), module))
        if not equal:
            raise CheckpointError(
                f"{module} does not decode to the same numbers from {written.target} as from the source; nothing was "
                "written. Please report this with the checkpoint's config.json"
            )
    return len(modules)


def _is_rounded(old: Decoded, w: torch.Tensor) -> bool:
    """Whether w is the decoded weight in w's dtype."""
    parts = ((torch.from_numpy(old.weight(rows)).to(w.dtype), w[rows]) for rows in old.chunks())
    return tuple(w.shape) == old.shape and all(torch.equal(a, b) for a, b in parts)


def verify_config(folder: Path, source: Source, written: Written) -> None:
    """The new config must name the modules that were written. Raises CheckpointError."""
    if written.target == FLOAT:
        return
    files = Files.open(folder / shard for shard in source.shards)
    reader = reader_of(Source(str(folder), folder).quantization or {}, files)
    if set(reader.modules) != set(written.schemes):
        raise CheckpointError(f"the {written.target} config does not name the modules that were written; report this")
