"""Which kernel was fastest where, as `lowbit bench kernels` measured it: measured.json beside this file.

A row says: on this GPU generation, for this op and these weights, up to M tokens, this kernel won.

    {"op": "wna16_linear", "gpu": "sm_90", "weights": "int4", "M": 64, "kernel": "cuda_wgmma"}

Rows of one (op, gpu, weights) are read by rising M; the first with M at least x's rows speaks. No row: the order of the
registry stands. The rows' timings, with their GPU and versions, are in bench/results.
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
    rows = [row for row in _rows() if (row["op"], row["gpu"], row["weights"]) == (op, gpu, weights)]
    fitting = [row for row in sorted(rows, key=lambda row: row["M"]) if row["M"] >= tokens]
    return fitting[0]["kernel"] if fitting else None


@cache
def _rows() -> tuple[dict, ...]:
    return tuple(json.loads(ROWS.read_text(encoding="utf-8")))
