"""int8_matmul: q int8 [M, K] x codes int8 [N, K]^T -> int32 [M, N], exact; the op of every rung of the ladder."""

import torch
from torch import Tensor

from lowbit.kernels import reference
from lowbit.kernels.cuda import int8_hopper, int8_ladder
from lowbit.kernels.cuda.int8_ladder import RUNGS, Rung
from lowbit.kernels.int8 import pad_columns
from lowbit.kernels.registry import Candidate
from lowbit.optional import installed, late


def _rung(rung: Rung) -> Candidate:
    def run(q: Tensor, codes: Tensor) -> Tensor:
        if rung.multiple > 1:
            q, codes = pad_columns(q), pad_columns(codes)
        return int8_ladder.product(rung, q, codes)

    def refusal(q: Tensor, codes: Tensor) -> str | None:
        reason = int8_ladder.refusal(rung, q.device)
        return reason or (None if installed("cuda.bindings") else "cuda.bindings is not installed")

    return Candidate(rung.name, run, refusal)


def _wgmma(q: Tensor, codes: Tensor) -> Tensor:
    return int8_hopper.product(pad_columns(q), pad_columns(codes))


def _wgmma_refusal(q: Tensor, codes: Tensor) -> str | None:
    reason = int8_hopper.refusal(q)
    return reason or (None if installed("cuda.bindings") else "cuda.bindings is not installed")


def _triton(q: Tensor, codes: Tensor) -> Tensor:
    return late("lowbit.kernels.triton.int8_linear").product(pad_columns(q), pad_columns(codes))


def _triton_refusal(q: Tensor, codes: Tensor) -> str | None:
    if q.device.type != "cuda" or torch.cuda.get_device_capability(q.device) < (8, 0):
        return f"Triton's int8 dot needs a CUDA device of compute capability 8.0, not {q.device}"
    return None if installed("triton") else "triton is not installed"


def _never(q: Tensor, codes: Tensor) -> None:
    return None


CANDIDATES = (
    Candidate("wgmma", _wgmma, _wgmma_refusal),
    Candidate("triton", _triton, _triton_refusal),
    *(_rung(rung) for rung in reversed(RUNGS)),
    Candidate("reference", reference.int8_product, _never),
)
BY_NAME = {candidate.name: candidate for candidate in CANDIDATES}


def int8_matmul(q: Tensor, codes: Tensor, kernel: str | None = None) -> Tensor:
    """q int8 [M, K] times codes int8 [N, K], transposed: int32 [M, N], exact for K up to 131071.

    kernel: a name of CANDIDATES; None: the first that runs here. Rows whose length is no multiple of 16 are padded on
    the way, which QuantLinear does once, when its weight is first used.
    """
    if kernel is not None:
        return BY_NAME[kernel].run(q, codes)
    return next(candidate for candidate in CANDIDATES if candidate.refusal(q, codes) is None).run(q, codes)
