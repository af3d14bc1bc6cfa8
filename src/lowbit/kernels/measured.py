"""Which kernel was fastest where, as `lowbit bench kernels` measured it: measured.json beside this file.

A row says: on this GPU generation, for this op and these weights, up to M tokens, this kernel won.

    {"op": "wna16_linear", "gpu": "sm_90", "weights": "int4", "M": 64, "kernel": "cuda_wgmma"}

Rows of one (op, gpu, weights) are read by rising M; the first with M at least x's rows speaks. Where a GPU or a kind of
weights has no row, the rows of gpu "any" or weights "any" are read: assumed, not measured. No row at all: the order of
the registry stands. The rows' timings, with their GPU and versions, are in bench/results.
"""

import json
from functools import cache
from pathlib import Path

import torch

ROWS = Path(__file__).with_name("measured.json")


def generation_of(device: torch.device) -> str:
    """ "cpu", or a CUDA device's compute capability as "sm_90"."""
    return _cuda_generation(device) if device.type == "cuda" else device.type


@cache
def _cuda_generation(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@cache
def fastest(op: str, gpu: str, weights: str, tokens: int) -> str | None:
    """The kernel that won for `tokens` rows of x, or None where nothing was measured."""
    by_key: dict[tuple[str, str, str], list[dict]] = {}
    for row in _rows():
        by_key.setdefault((row["op"], row["gpu"], row["weights"]), []).append(row)
    keys = ((op, gpu, weights), (op, gpu, "any"), (op, "any", "any")) if gpu != "cpu" else ((op, gpu, weights),)
    rows = next((by_key[key] for key in keys if key in by_key), [])
    fitting = [row for row in sorted(rows, key=lambda row: row["M"]) if row["M"] >= tokens]
    return fitting[0]["kernel"] if fitting else None


@cache
def _rows() -> tuple[dict, ...]:
    return tuple(json.loads(ROWS.read_text(encoding="utf-8")))
