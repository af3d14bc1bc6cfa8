"""Time the rungs of the int8 ladder on one GPU: what `lowbit bench int8-ladder` prints."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.errors import InputError
from lowbit.kernels.int8_matmul import BY_NAME, int8_matmul
from lowbit.kernels.timing import copies_of, graph_us

RUNGS = ("naive", "dp4a", "wmma", "mma_m8n8k16", "mma_m16n8k32", "triton", "wgmma")
# The datasheets' dense int8 TOPS at boost clock. Other GPUs: no share is told.
CEILINGS = {"NVIDIA H200": 1979.0, "NVIDIA H100 80GB HBM3": 1979.0, "NVIDIA A100-SXM4-80GB": 624.0, "Tesla T4": 130.0}


@dataclass(frozen=True)
class RungTime:
    """One rung: microseconds, TOPS (2 M N K / time), share of the ceiling, and how much faster than the rung before."""

    kernel: str
    us: float | None
    tops: float | None
    share: float | None
    gain: float | None
    refusal: str | None = None


def ladder(tokens: int, width: int, columns: int, device: torch.device) -> list[RungTime]:
    """Every rung's time for [tokens, columns] x [width, columns]^T on `device`, lowest first.

    Raises InputError without a CUDA device. Each result is compared with the first rung's, bit by bit.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        raise InputError("bench int8-ladder times CUDA kernels, and this machine shows no CUDA device to torch")
    q = _codes(tokens, columns, device)
    weights = [_codes(width, columns, device) for _ in range(min(4, copies_of(width * columns)))]
    ceiling = CEILINGS.get(torch.cuda.get_device_name(device))
    rows: list[RungTime] = []
    first: Tensor | None = None
    before: float | None = None
    for name in RUNGS:
        if reason := BY_NAME[name].refusal(q, weights[0]):
            rows.append(RungTime(name, None, None, None, None, reason))
            continue
        made = int8_matmul(q, weights[0], name)
        first = made if first is None else first
        if not torch.equal(made, first):
            raise RuntimeError(f"rung {name} computes another product than {RUNGS[0]}")
        us = graph_us([lambda w=w, name=name: int8_matmul(q, w, name) for w in weights], least_ms=10.0)  # type: ignore[misc]
        tops = 2e-6 * tokens * width * columns / us
        rows.append(RungTime(name, us, tops, tops / ceiling if ceiling else None, before / us if before else None))
        before = us
    return rows


def _codes(rows: int, columns: int, device: torch.device) -> Tensor:
    """Codes as quantization makes them: normal, a third of the range per standard deviation."""
    return (torch.randn(rows, columns, device=device) * 42).clamp(-127, 127).to(torch.int8)
