"""Which launch of a weight-only kernel was fastest where: wna16_plans.json, which bench/wna16/sweep.py writes.

    {"kernel": "wgmma", "processors": 132, "codes": "int4", "N": 28672, "K": 4096, "tokens": 16, "us": 21.4, ...}

tokens: of the tile, or of the tiles beside each other; up to so many rows of x the row speaks, down to the next smaller
number of tokens that tiles have. The rest is the plan, in the kernel's own words. A shape without a row is left to the
kernel's estimate.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

ROWS = Path(__file__).parents[1] / "wna16_plans.json"


def measured_plan(
    kernel: str, processors: int, codes: str, shape: tuple[int, int], tokens: int
) -> dict[str, Any] | None:
    """The row for a weight [N, K] on a GPU with so many processors, or None."""
    return _plans().get((kernel, processors, codes, *shape, tokens))


@cache
def _plans() -> dict[tuple[str, int, str, int, int, int], dict[str, Any]]:
    rows = json.loads(ROWS.read_text(encoding="utf-8"))
    keys = ("kernel", "processors", "codes", "N", "K", "tokens")
    return {tuple(row[key] for key in keys): row for row in rows}  # type: ignore[misc]
