"""Which kernel was fastest where, as `lowbit bench kernels` measured it: measured.json beside this file.

A row says: on this GPU generation, for this op and these weights, up to M tokens, this kernel won.

    {"op": "wna16_linear", "gpu": "sm_90", "weights": "int4", "M": 64, "kernel": "cuda_wgmma"}

Rows of one (op, gpu, weights) are read by rising M; the first with M at least x's rows speaks. Rows that also name N
and K speak for that shape, before the others. Where a GPU or a kind of weights has no row, or its kernel refuses, the
rows of weights "any" and then of gpu "any" are read: assumed, not measured. No row at all: the order of the registry
stands. The rows' timings, with their GPU and versions, are in bench/results.
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
def fastest(op: str, gpu: str, weights: str, tokens: int, shape: tuple[int, int] | None = None) -> tuple[str, ...]:
    """The kernel that won for `tokens` rows of x, then those of the more general rows, for where it refuses."""
    by_key: dict[tuple[str, str, str, tuple[int, int] | None], list[dict]] = {}
    for row in _rows():
        of_shape = (row["N"], row["K"]) if "N" in row else None
        by_key.setdefault((row["op"], row["gpu"], row["weights"], of_shape), []).append(row)
    keys: list[tuple[str, str, str, tuple[int, int] | None]] = [(op, gpu, weights, shape)] if shape else []
    keys.append((op, gpu, weights, None))
    if gpu != "cpu":
        keys += [(op, gpu, "any", None), (op, "any", "any", None)]
    found = []
    for key in keys:
        fitting = [row for row in by_key.get(key, []) if row["M"] >= tokens]
        if fitting:
            found.append(min(fitting, key=lambda row: row["M"])["kernel"])
        elif key in by_key:
            break  # measured, but not so far: the order of the registry stands
    return tuple(found)


@cache
def _rows() -> tuple[dict, ...]:
    return tuple(json.loads(ROWS.read_text(encoding="utf-8")))
