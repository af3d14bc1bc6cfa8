"""Which kernel runs an op: candidates in order of preference, each with its reason when it can't run.

A candidate's `refusal` looks at the arguments and answers None or a sentence: the wrong device, compute capability,
dtype or shape. `pick` takes the kernel that the measured table names (measured.py), if it does not refuse, else the
first in order that does not; `explain` tells what every candidate said; `use` names one, within a `with` block, and
then a refusal is an error instead of a silent second choice.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor

from lowbit.errors import InputError
from lowbit.kernels import cpu, fp8, int8_linear, int8_outlier, nibbles_triton, reference, wna16_triton
from lowbit.kernels.cuda import wna16_dequantize, wna16_mma, wna16_wgmma
from lowbit.kernels.measured import fastest, generation_of
from lowbit.tensors import PackedWeight


@dataclass(frozen=True)
class Candidate:
    """A kernel of one op: its name, the function, and why it can't run for given arguments."""

    name: str
    run: Callable[..., Tensor]
    refusal: Callable[..., str | None]


def _runs_anywhere(x: Tensor, weight: PackedWeight) -> None:
    return None


CANDIDATES: dict[str, tuple[Candidate, ...]] = {
    "wna16_linear": (
        Candidate("cuda_mma", wna16_mma.linear, wna16_mma.refusal),
        Candidate("cuda_dequantize", wna16_dequantize.linear, wna16_dequantize.refusal),
        # behind kernels that refuse less: measured.json says where it is faster
        Candidate("cuda_wgmma", wna16_wgmma.linear, wna16_wgmma.refusal),
        Candidate("triton_wna16", wna16_triton.linear, wna16_triton.refusal),
        Candidate("reference", reference.wna16_linear, _runs_anywhere),
    ),
    "dequantize": (
        # first, because it needs no fast layout: a model that is trained keeps its codes once
        Candidate("triton_nibbles", nibbles_triton.dequantize, nibbles_triton.refusal),
        Candidate("cuda_dequantize", wna16_dequantize.dequantize, wna16_dequantize.refusal),
        Candidate("reference", reference.dequantize, _runs_anywhere),
    ),
    "wa8_linear": (
        Candidate("hopper_int8", int8_linear.hopper_linear, int8_linear.hopper_refusal),
        Candidate("triton_int8", int8_linear.triton_linear, int8_linear.triton_refusal),
        Candidate("turing_int8", int8_linear.turing_linear, int8_linear.turing_refusal),
        Candidate("fp8_scaled_mm", fp8.scaled_mm_linear, fp8.refusal),
        Candidate("fp8_scaled_mm_static", fp8.scaled_mm_static, fp8.static_refusal),
        Candidate("fp8_scaled_mm_tiles", fp8.scaled_mm_tiles, fp8.tiles_refusal),
        Candidate("cpu_int8", cpu.int8_linear, cpu.int8_refusal),
        Candidate("int8_outlier", int8_outlier.linear, int8_outlier.refusal),
        Candidate("reference", reference.wa8_linear, _runs_anywhere),
    ),
}

_forced: ContextVar[str | None] = ContextVar("lowbit_kernel", default=None)


@contextmanager
def use(name: str) -> Iterator[None]:
    """Run every op that has a candidate called `name` by it, within the block. Raises InputError for unknown names."""
    known = sorted({candidate.name for candidates in CANDIDATES.values() for candidate in candidates})
    if name not in known:
        raise InputError(f"there is no kernel {name!r}; choose one of {', '.join(known)}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def pick(op: str, x: Tensor, weight: PackedWeight) -> Candidate:
    """The candidate that runs `op` for these arguments. Raises InputError when the one named by `use` refuses."""
    candidates = CANDIDATES[op]
    forced = next((candidate for candidate in candidates if candidate.name == _forced.get()), None)
    if forced is not None:
        if reason := forced.refusal(x, weight):
            raise InputError(f"kernel {forced.name!r} can't run {op}: {reason}")
        return forced
    winners = fastest(op, generation_of(x.device), weight.scheme.weights.format.name, x.shape[0], weight.shape)
    if not winners and op == "wa8_linear" and x.device.type == "cpu":
        winners = cpu.winners(x, weight)
    ranks = {name: rank for rank, name in reversed(list(enumerate(winners)))}
    ordered = sorted(candidates, key=lambda candidate: ranks.get(candidate.name, len(winners)))  # stable
    return next(candidate for candidate in ordered if candidate.refusal(x, weight) is None)


def explain(op: str, x: Tensor, weight: PackedWeight) -> dict[str, str]:
    """Candidate name -> "ready", or its reason for refusing, in order of preference."""
    return {candidate.name: candidate.refusal(x, weight) or "ready" for candidate in CANDIDATES[op]}
