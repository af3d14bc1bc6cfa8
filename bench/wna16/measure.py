"""Rows of the weight-only kernels and their peers, most wanted first, until the time is up; written as they come.

    python measure.py OUT.json SECONDS COMMIT [SCHEMES SHAPES TOKENS PEERS]...

SCHEMES, SHAPES, TOKENS, PEERS: commas between them. Also what the layout, dequantize and a copy of the weight take.
`lowbit bench kernels` prints the same rows as tables.
"""

import sys
import time
from itertools import product
from pathlib import Path
from statistics import median

import torch

from lowbit.kernels import bench, layout, peers
from lowbit.kernels.cuda import wna16_dequantize, wna16_layout
from lowbit.kernels.timing import copies_of, graph_us
from lowbit.numerics.scheme import QuantScheme

KERNELS = ("cuda_mma", "cuda_wgmma", "cuda_dequantize")


def whole_weight_rows(shape: str, scheme: str) -> list[bench.Row]:
    """GB/s (read and written) of making the fast layout, and of dequantizing beside a copy that moves as much.

    The layout's time is the device's, from its first launch to its last, gaps between them included.
    """
    (rows, columns), parsed = bench.SHAPES[shape], QuantScheme.parse(scheme)
    weights = [bench.random_weight(parsed, (rows, columns), seed) for seed in range(copies_of(rows * columns * 3))]
    found = []

    def add(kernel: str, us: float, moved: int) -> None:
        found.append(bench.Row(shape, rows, columns, scheme, 0, kernel, us, None, moved / us / 1e3, 0.0, 0.0, None))

    like = torch.empty(1, columns, device="cuda", dtype=torch.bfloat16)
    moved = weights[0].bytes + 2 * rows * columns
    add("dequantize", graph_us([lambda w=w: wna16_dequantize.dequantize(like, w) for w in weights]), moved)
    source = torch.empty(moved // 2, device="cuda", dtype=torch.uint8).random_()
    targets = [torch.empty_like(source) for _ in weights]
    add("copy of as many bytes", graph_us([lambda t=t: t.copy_(source) for t in targets]), moved)
    times = []
    for weight in weights * 2:
        layout.release(weight)
        torch.cuda.synchronize()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        wna16_layout.fast(weight)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    add("layout", median(times), 2 * weights[0].bytes)
    return found


def main() -> None:
    path, seconds, commit, *groups = sys.argv[1:]
    deadline, rows, known = time.time() + float(seconds), [], peers.PEERS
    ceilings = bench.measure_ceilings()
    print(ceilings, flush=True)
    wanted = [group for at in range(0, len(groups), 4) for group in product(*parts_of(groups[at : at + 4]))]
    for shape, scheme, tokens, names in wanted:
        peers.PEERS = tuple(peer for peer in known if peer.name in names)
        for row in bench.rows_for(shape, scheme, tokens, ceilings, True, KERNELS):
            rows.append(row)
            error = f" error {row.error:.1e} cold {row.cold_us:.1f}" if row.error is not None else ""
            print(f"{shape} {scheme} M={row.M} {row.kernel}: {row.us:.1f} us {row.gbps:.0f} GB/s{error}", flush=True)
            if time.time() > deadline:
                break
        if shape == "8B.gate_up":
            for row in whole_weight_rows(shape, scheme):
                rows.append(row)
                print(f"{scheme} {row.kernel}: {row.us:.1f} us {row.gbps:.0f} GB/s", flush=True)
        bench.write_results(Path(path), ceilings, rows, commit)
        if time.time() > deadline:
            print("time is up at", shape, scheme)
            return


def parts_of(group: list[str]) -> tuple[list[str], list[str], list[list[int]], list[list[str]]]:
    """(shapes, schemes, [tokens], [peers]) of one group of arguments."""
    schemes, shapes, tokens, names = (part.split(",") for part in group)
    return shapes, schemes, [[int(count) for count in tokens]], [names]


if __name__ == "__main__":
    main()
