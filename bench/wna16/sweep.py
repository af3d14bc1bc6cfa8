"""Every plan of the weight-only kernels worth a thought, timed and checked; the best first plan of each line last.

    python sweep.py OUT.json SECONDS SCHEMES SHAPES TOKENS [PLANS.json]

PLANS.json gets the best plan of each shape and tile, as lowbit.kernels.cuda.wna16_plans reads them. A plan of
wna16_wgmma.cu is a tile and how its work is shared; to 8 tokens, also tiles of wna16_mma.cu. Rows: shape, M, the plan,
us in a graph over rotated weights, relative error against float64, whether two runs gave the same bits.
"""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from lowbit.kernels import bench
from lowbit.kernels.cuda import wna16_mma, wna16_wgmma
from lowbit.kernels.cuda.device import gpu_of
from lowbit.kernels.cuda.wna16_wgmma import Tile, tile_for
from lowbit.kernels.layout import FastForm, form_of
from lowbit.kernels.timing import copies_of, graph_us
from lowbit.numerics.scheme import QuantScheme
from lowbit.tensors import PackedWeight

SHARES = {  # warpgroups, blocks, whether sums are scaled; by tokens
    8: ((4, 1, True), (4, 2, True), (2, 2, True)),
    16: ((4, 1, False), (4, 1, True), (4, 2, True), (2, 2, True)),
    32: ((4, 1, False), (4, 1, True), (4, 2, True), (2, 2, False), (2, 2, True)),
    64: ((4, 1, False), (2, 2, False)),
    128: ((4, 1, False), (2, 1, False)),
}
MMA_TILES = ((16, 2, 1, 2, 1), (16, 2, 1, 2, 2), (16, 2, 1, 3, 2), (16, 1, 1, 2, 2), (16, 1, 1, 4, 1), (16, 1, 1, 4, 2))
Plans = Iterator[tuple[dict[str, Any], Any]]


def tiles(form: FastForm, tokens: int) -> list[Tile]:
    """Tiles of wna16_wgmma worth a try; sums of groups that are scaled want at least 32 columns."""
    shares = SHARES[wna16_wgmma.tokens_of_tile(tokens)]
    made = [tile_for(form, wna16_wgmma.tokens_of_tile(tokens), *share) for share in shares]
    return [tile for tile in made if tile.stages >= 3]


def wgmma_plans(x: Tensor, form: FastForm, size: tuple[int, int]) -> Plans:
    """(what it is, plan) of wna16_wgmma."""
    count, processors = x.shape[0], gpu_of(x.device).processors
    for tile in tiles(form, count):
        worth = wna16_wgmma.workers_of(tile, size, count, processors)
        limits = {processors, processors * tile.blocks}
        spread = {max((n for n, spread in worth if spread and n <= most), default=0) for most in limits}
        alone = {n for n, spread in worth if not spread and n > 0.6 * processors}
        for workers, together in [*((n, False) for n in sorted(alone)), *((n, True) for n in sorted(spread) if n)]:
            plan = wna16_wgmma.plan_for(tile, form, size, count, x.dtype, x.device, workers, together)
            yield {**asdict(tile), "workers": workers, "spread": together}, plan


def mma_plans(x: Tensor, form: FastForm, size: tuple[int, int]) -> Plans:
    """(what it is, plan) of wna16_mma; tiles that do not fit are left out."""
    strips = (-(-size[0] // 16), -(-size[1] // 128))
    for numbers in MMA_TILES:
        tile = wna16_mma.Tile(*numbers)
        share = gpu_of(x.device).shared_bytes // tile.blocks - 1024
        if tile.fixed_bytes(form, 9) < share - 8 * 1024:
            yield asdict(tile), wna16_mma.plan_for(tile, form, strips, x.shape[0], x.dtype, x.device)


def main() -> None:
    path, seconds, schemes, shapes, tokens, *plans_path = sys.argv[1:]
    deadline, rows = time.time() + float(seconds), []
    for shape, text in product(shapes.split(","), schemes.split(",")):
        size, scheme = bench.SHAPES[shape], QuantScheme.parse(text)
        copies = copies_of(size[0] * size[1] * scheme.weights.bits // 8)
        weights = [bench.random_weight(scheme, size, seed) for seed in range(copies)]
        w, form = weights[0].dequantize().double(), form_of(weights[0])
        for count in map(int, tokens.split(",")):
            x = torch.randn(count, size[1], device="cuda", dtype=torch.bfloat16)
            exact = linear(x[:64].double(), w)
            for name, module, plans in KERNELS[count == 1 : 2 if count <= 8 else 1]:
                found = list(timed(module, plans(x, form, size), x, weights, exact, deadline))
                at = {"kernel": name, "processors": gpu_of(x.device).processors, "codes": form.codes, "N": size[0]}
                rows += [{**at, "K": size[1], "shape": shape, "M": count, **row} for row in found]
                if plans_path:
                    Path(plans_path[0]).write_text(best_plans(rows), encoding="utf-8")
                Path(path).write_text(json.dumps(rows), encoding="utf-8")
                for row in sorted(found, key=lambda row: row["us"])[:4]:
                    print(f"{shape} {text} M={count} {name} {row['us']:.2f} us", row, flush=True)
                wrong = [row for row in found if not row["error"] < 3e-3 or not row["same"]]
                print(f"{len(found)} plans, wrong: {wrong}", flush=True)
            if time.time() > deadline:
                return


def best_plans(rows: list[dict[str, Any]]) -> str:
    """JSON of the fastest right plan for each kernel, shape and tile."""
    best: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        size = wna16_wgmma.tokens_of_tile(row["M"])
        tokens = row["M"] if row["M"] == 1 else -(-row["M"] // size) * size
        key = row["kernel"], row["codes"], row["N"], row["K"], tokens
        right = row["error"] < 3e-3 and row["same"]
        if right and (key not in best or row["us"] < best[key]["us"]):
            kept = {name: row[name] for name in row if name not in ("shape", "M", "error", "same", "chosen")}
            best[key] = {**kept, "us": round(row["us"], 2), "tokens": tokens}
    return "[\n" + ",\n".join(json.dumps(row) for row in best.values()) + "\n]\n"


def timed(
    module: ModuleType, plans: Plans, x: Tensor, weights: list[PackedWeight], exact: Tensor, deadline: float
) -> Iterator[dict[str, Any]]:
    """Rows of one kernel's plans; exact: the product of the first 64 tokens with the first weight."""
    plan_of = module.plan_of
    chosen = plan_of(form_of(weights[0]), weights[0].shape, x.shape[0], x.dtype, x.device)
    for what, plan in plans:
        if time.time() > deadline:
            break
        module.plan_of = lambda *arguments, plan=plan: plan  # type: ignore[attr-defined]
        torch.full((x.shape[0], exact.shape[1]), torch.nan, device="cuda", dtype=x.dtype)
        y = module.linear(x, weights[0], None)
        error = float((y[:64].double() - exact).norm() / exact.norm())
        same = torch.equal(y, module.linear(x, weights[0], None))
        us = graph_us([lambda w=w: module.linear(x, w, None) for w in weights], 5.0)
        yield {**what, "us": us, "error": error, "same": same, "chosen": plan == chosen}
    module.plan_of = plan_of  # type: ignore[attr-defined]


KERNELS = (("wgmma", wna16_wgmma, wgmma_plans), ("mma", wna16_mma, mma_plans))


if __name__ == "__main__":
    main()
