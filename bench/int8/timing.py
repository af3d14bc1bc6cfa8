"""Microseconds of a call as it runs in a model: replayed from a CUDA graph, over weights that don't fit the L2."""

from collections.abc import Callable, Sequence

import torch

L2_BYTES = 300e6  # five times the H200's 60 MB: what a rotation must exceed


def graph_us(calls: Sequence[Callable[[], object]], least_ms: float = 20.0) -> float:
    """Median microseconds of one call, replaying a graph that makes every call in turn."""
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
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def once() -> float:
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)

    once()
    repeats = max(5, min(100, int(least_ms / max(once(), 1e-3))))
    times = sorted(once() for _ in range(repeats))
    return times[len(times) // 2] * 1e3 / len(calls)


def copies(weight_bytes: float) -> int:
    """How many weights of this size a rotation needs."""
    return max(2, min(64, int(L2_BYTES // weight_bytes) + 1))
