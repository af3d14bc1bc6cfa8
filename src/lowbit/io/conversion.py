"""What a conversion is asked for, and what it reports (convert.py)."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from lowbit.numerics.scheme import QuantScheme


@dataclass(frozen=True)
class Options:
    """lossy: None refuses what the target can't hold, "requantize" rounds it again under `scheme` (None: the target's).

    verify=False leaves the second decoding out. dtype is that of "float" (None: the model's). drop: tensors to leave
    out. progress: see model/quantize.py.
    """

    lossy: str | None = None
    scheme: QuantScheme | None = None
    verify: bool = True
    dtype: torch.dtype | None = None
    overwrite: bool = False
    drop: frozenset[str] = frozenset()
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None


@dataclass
class Conversion:
    """What was done: modules by scheme, those rounded again, how many were checked, and the reader's words."""

    source: str
    target: str
    schemes: dict[str, QuantScheme] = field(default_factory=dict)
    requantized: list[str] = field(default_factory=list)
    verified: int = 0
    warnings: list[str] = field(default_factory=list)


def verdict(result: Conversion) -> dict[str, Any]:
    """The conversion in numbers, for a person or JSON."""
    return {
        "source": result.source,
        "format": result.target,
        "modules": len(result.schemes),
        "schemes": sorted({str(scheme) for scheme in result.schemes.values()}),
        "verified": result.verified,
        "requantized": result.requantized,
        "warnings": result.warnings,
    }
