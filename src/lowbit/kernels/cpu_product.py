"""The int8 product on the CPU by the faster of torch's two exact ways, found by timing them on this machine.

    _int_mm      oneDNN's s8 x s8 -> s32; nothing to prepare, but from two tokens on it brings the weight into oneDNN's
                 own layout at every call: 4096 x 4096 takes 253 us at M=1 and 2273 at M=4 (EPYC, 1 thread)
    prepacked    oneDNN's u8 x s8 with the weight in that layout once and for all, a second copy of it: 245 and 290 us;
                 20 us more than _int_mm where a call is all there is to it (576 x 576 at M=1: 26 against 5)

The unsigned operand is q + 128, and oneDNN takes 128 times the weight's row sums away again, in integers. So both give
the same bits; but without VNNI u8 x s8 is emulated by sums of 16 bits, which overflow, and only _int_mm is exact.
"""

import time
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

MOST_TOKENS = 64  # above, the answer for 64 stands
_ready = WeakIdKeyDictionary()  # codes -> (their version, the weight as oneDNN lays it out)


def product(q: Tensor, codes: Tensor) -> Tensor:
    """q int8 [M, K] times codes int8 [N, K], transposed: the sums [M, N] in int32, or as float32 rounds them.

    K at least 2: torch._int_mm reads beyond a matrix of one column (torch 2.13).
    """
    if len(q) and torch.cpu._is_vnni_supported():
        tokens = min(1 << (len(q) - 1).bit_length(), MOST_TOKENS)  # M, up to a power of two
        if prepacked_is_faster(tokens, *codes.shape, torch.get_num_threads()):
            return prepacked(q, _in_layout(codes))
    return torch._int_mm(q, codes.T)


@cache
def prepacked_is_faster(tokens: int, rows: int, columns: int, threads: int) -> bool:
    """Whether `prepacked` beats torch._int_mm for q [tokens, columns] and codes [rows, columns] made for it.

    threads: those that torch uses, a part of the question.
    """
    q, codes = (torch.full((n, columns), 3, dtype=torch.int8) for n in (tokens, rows))  # the time is the same for all
    layout = torch.ops.onednn.qlinear_prepack(codes, None)
    return least_seconds(lambda: prepacked(q, layout)) < least_seconds(lambda: torch._int_mm(q, codes.T))


def prepacked(q: Tensor, layout: Tensor) -> Tensor:
    """q int8 [M, K] times a weight that oneDNN laid out, transposed: float32 [M, N] of the exact sums."""
    rows = layout.shape[-1]
    return torch.ops.onednn.qlinear_pointwise(
        (q ^ -128).view(torch.uint8), 1.0, 128, layout, *_unit(rows), None, 1.0, 0, torch.float32, "none", [], ""
    )


@cache
def _unit(rows: int) -> tuple[Tensor, Tensor]:
    """Scales of one and zero-points of zero for `rows` rows of a weight."""
    return torch.ones(rows), torch.zeros(rows, dtype=torch.int32)


def _in_layout(codes: Tensor) -> Tensor:
    """codes [N, K] as oneDNN lays them out; made at first use, and again when the codes were written to."""
    known = _ready.get(codes)
    if known is None or known[0] != codes._version:
        known = _ready[codes] = (codes._version, torch.ops.onednn.qlinear_prepack(codes, None))
    return known[1]


def least_seconds(call: Callable[[], Tensor]) -> float:
    """The least time of five calls after one."""
    call()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)
