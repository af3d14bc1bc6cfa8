"""Time of GPU calls, as a model's decoding sees it: a CUDA graph of calls over different weights, replayed.

A graph takes the host out of the measurement, and weights that together are several times the L2 take the cache out:
most 4-bit matrices of an 8B model fit in an H200's L2, so one weight timed again and again would show the cache.
"""

from collections.abc import Callable, Sequence
from statistics import median

import torch

Call = Callable[[], object]
ROTATED_BYTES = 300_000_000  # five times the L2 of an H200


def copies_of(weight_bytes: int) -> int:
    """How many copies of a weight a measurement rotates through: ROTATED_BYTES of them, 2 to 64."""
    return max(2, min(64, ROTATED_BYTES // weight_bytes + 1))


def graph_us(calls: Sequence[Call], least_ms: float = 20.0, repeats: int = 200) -> float:
    """Median microseconds of one call, replaying a graph of them all for at least `least_ms` or `repeats` replays."""
    graph = capture(calls)
    once_us = replay_us(graph)
    times = [replay_us(graph) for _ in range(max(5, min(repeats, int(least_ms * 1e3 / once_us))))]
    return median(times) / len(calls)


def capture(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """A graph of the calls, one after the other; each ran once before (kernels load, layouts are derived)."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def replay_us(graph: torch.cuda.CUDAGraph) -> float:
    """Microseconds of one replay."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return max(start.elapsed_time(end) * 1e3, 1e-3)


def cold_us(calls: Sequence[Call]) -> float:
    """Median microseconds of single launches with the host between them, over the calls in turn."""
    times = []
    for call in [*calls, *calls]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return median(times)
