"""Every plan of wna16_wgmma.cu worth a thought, timed and checked: python sweep.py OUT.json SECONDS SHAPES TOKENS

A plan is a tile and a number of workers. Rows: shape, M, tile, workers, spread, us, relative error against float64.
"""

import json
import sys
import time
from pathlib import Path

import torch

from lowbit.kernels import bench
from lowbit.kernels.cuda import wna16_wgmma
from lowbit.kernels.cuda.device import gpu_of
from lowbit.kernels.cuda.wna16_wgmma import Tile
from lowbit.kernels.layout import form_of
from lowbit.kernels.registry import Candidate
from lowbit.kernels.timing import copies_of, graph_us
from lowbit.numerics.scheme import QuantScheme

TILES = {
    16: (Tile(16, 4, 4, 1), Tile(16, 4, 4, 2), Tile(16, 2, 4, 2)),
    32: (Tile(32, 4, 4, 1), Tile(32, 4, 4, 2), Tile(32, 2, 4, 2)),
    64: (Tile(64, 4, 4, 1), Tile(64, 4, 4, 1, 2), Tile(64, 2, 4, 2)),
    128: (Tile(128, 4, 3, 1), Tile(128, 4, 3, 1, 2), Tile(128, 2, 3, 1), Tile(128, 4, 4, 1)),
}


def main() -> None:
    path, seconds, shapes, tokens = sys.argv[1:5]
    deadline, rows = time.time() + float(seconds), []
    scheme, plan_of = QuantScheme.parse("w4a16-g128"), wna16_wgmma.plan_of
    for shape in shapes.split(","):
        size = bench.SHAPES[shape]
        weights = [bench.random_weight(scheme, size, seed) for seed in range(copies_of(size[0] * size[1] // 2))]
        form = form_of(weights[0])
        for count in map(int, tokens.split(",")):
            x = torch.randn(count, size[1], device="cuda", dtype=torch.bfloat16)
            chosen = plan_of(form, size, count, x.dtype, x.device)
            candidate = Candidate("cuda_wgmma", wna16_wgmma.linear, wna16_wgmma.refusal)
            for tile in TILES[next((t for t in (16, 32, 64) if count <= t), 128)]:
                processors = gpu_of(x.device).processors
                worth = wna16_wgmma.workers_of(tile, size, count, processors)
                once = processors // tile.cluster
                for workers, spread in (n for n in worth if 0.8 * once < n[0] <= once or n[0] > 1.9 * once):
                    plan = wna16_wgmma.plan_for(tile, form, size, count, x.dtype, x.device, workers, spread)
                    wna16_wgmma.plan_of = lambda *arguments, plan=plan: plan
                    error = bench.relative_error(candidate, x, weights[0])
                    us = graph_us([lambda w=w, x=x: wna16_wgmma.linear(x, w, None) for w in weights], 8.0)
                    mark = "*" if (tile, workers) == (chosen.tile, chosen.workers) else ""
                    print(
                        f"{shape} M={count} {tile} workers {workers}{' spread' * spread}: {us:.2f} us error {error:.1e} {mark}",
                        flush=True,
                    )
                    rows.append(
                        {
                            "shape": shape,
                            "M": count,
                            **vars(tile),
                            "workers": workers,
                            "spread": spread,
                            "us": us,
                            "error": error,
                        }
                    )
                    Path(path).write_text(json.dumps(rows), encoding="utf-8")
                    if time.time() > deadline:
                        return
        wna16_wgmma.plan_of = plan_of


if __name__ == "__main__":
    main()
