"""Sweeps of the int8 kernels' configurations on one GPU: python bench/int8/tune.py PART OUT.json"""

import json
import sys
import time

import torch
from timing import copies, graph_us

from lowbit.kernels.cuda import int8_hopper as hopper
from lowbit.kernels.cuda import int8_ladder as ladder
from lowbit.kernels.int8 import Scaling
from lowbit.kernels.triton import int8_linear, int8_quantize

SHAPES = {"gate_up": (28672, 4096), "o": (4096, 4096), "down": (4096, 14336)}
ROWS: list[dict] = []
START = time.time()


def note(**row: object) -> None:
    ROWS.append(row)
    print(
        f"{time.time() - START:5.0f}s",
        *(f"{k}={v:.2f}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()),
        flush=True,
    )


def codes(rows: int, columns: int) -> torch.Tensor:
    return torch.randint(-127, 128, (rows, columns), device="cuda", dtype=torch.int8)


def scaling(M: int, N: int, dtype: torch.dtype = torch.bfloat16) -> Scaling:
    return Scaling(dtype, torch.rand(M, device="cuda") * 0.01, (torch.rand(N, device="cuda") * 0.01).to(dtype))


def decode() -> None:
    for name, (N, K) in SHAPES.items():
        weights = [codes(N, K) for _ in range(copies(N * K))]
        for M in (1, 16, 64):
            x = torch.randn(M, K, device="cuda", dtype=torch.bfloat16)
            quantized = int8_quantize.quantize_rows(x)
            s = scaling(M, N)
            base = hopper.choose(M, N, K, 132)
            tried = {base}
            for rows, stages in {
                8: ((64, 6), (64, 12), (128, 6)),
                16: ((64, 5), (64, 10), (128, 5)),
                64: ((128, 4), (64, 6), (256, 5)),
            }[base.tokens]:
                for split in sorted({max(1, base.split // 2), base.split, min(8, base.split * 2)}):
                    tried.add(hopper.Decode(base.tokens, rows, stages, split))
            for config in sorted(tried, key=str):
                us = graph_us([lambda w=w: hopper.decode(quantized.q, w, s, config) for w in weights], 4)
                note(
                    op="decode",
                    shape=name,
                    M=M,
                    rows=config.rows,
                    stages=config.stages,
                    split=config.split,
                    base=config == base,
                    us=us,
                    TBps=N * K / us / 1e6,
                )
            us = graph_us(
                [
                    lambda w=w: hopper.decode(
                        (qq := int8_quantize.quantize_rows(x)).q, w, Scaling(torch.bfloat16, qq.scale, s.w_scale)
                    )
                    for w in weights
                ],
                4,
            )
            note(op="decode+quantize", shape=name, M=M, us=us)
        del weights


def prefill() -> None:
    for name, (N, K) in SHAPES.items():
        weights = [codes(N, K) for _ in range(3)]
        for M in (256, 1024, 4096):
            q, s = codes(M, K), scaling(M, N)
            x = torch.randn(M, K, device="cuda", dtype=torch.bfloat16)
            for tile in (256, 128):
                us = graph_us([lambda w=w: hopper.prefill(q, w, s, tile) for w in weights], 8)
                note(op="prefill", shape=name, M=M, tile_n=tile, us=us, TOPS=2e-6 * M * N * K / us)
            us = graph_us([lambda: int8_quantize.quantize_rows(x)] * 3, 3)
            note(op="quantize_rows", M=M, K=K, us=us, TBps=3 * M * K / us / 1e6)
            f8 = [w.float().to(torch.float8_e4m3fn) for w in weights]
            a = torch.randn(M, K, device="cuda").to(torch.float8_e4m3fn)
            sa, sb = torch.rand(M, 1, device="cuda"), torch.rand(1, N, device="cuda")
            us = graph_us(
                [
                    lambda w=w: torch._scaled_mm(
                        a, w.t(), scale_a=sa, scale_b=sb, out_dtype=torch.bfloat16, use_fast_accum=True
                    )
                    for w in f8
                ],
                8,
            )
            note(op="fp8", shape=name, M=M, us=us, TOPS=2e-6 * M * N * K / us)
            us = graph_us([lambda w=w: torch._int_mm(q, w.t()) for w in weights], 8)
            note(op="_int_mm", shape=name, M=M, us=us, TOPS=2e-6 * M * N * K / us)


def rungs() -> None:
    M = N = K = 4096
    q, w = codes(M, K), [codes(N, K) for _ in range(2)]
    for rung in ladder.RUNGS:
        us = graph_us([lambda w=w: ladder.product(rung, q, w) for w in w], 10)
        note(op="rung", name=rung.name, us=us, TOPS=2e-6 * M * N * K / us)
    us = graph_us([lambda w=w: hopper.prefill(q, w) for w in w], 10)
    note(op="rung", name="wgmma", us=us, TOPS=2e-6 * M * N * K / us)


def triton() -> None:
    tile = int8_linear.Tile
    N, K = SHAPES["gate_up"]
    w = [codes(N, K) for _ in range(3)]
    for M, tiles in {
        16: (tile(0, 16, 32, 256, 4, 4), tile(0, 16, 64, 256, 4, 4)),
        64: (tile(0, 64, 64, 128, 4, 5),),
        4096: (
            tile(0, 128, 256, 128, 8, 3),
            tile(0, 128, 256, 128, 8, 4),
            tile(0, 128, 128, 128, 4, 4),
            tile(0, 128, 128, 128, 8, 4),
        ),
    }.items():
        q, s = codes(M, K), scaling(M, N)
        for t in tiles:
            us = graph_us([lambda w=w: int8_linear.product(q, w, s, t) for w in w], 8)
            note(op="triton", M=M, tile=str(tuple(t)), us=us, TOPS=2e-6 * M * N * K / us, TBps=N * K / us / 1e6)


def quantize() -> None:
    big = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    other = torch.empty_like(big)
    us = graph_us([lambda: other.copy_(big)], 5)
    note(op="copy", TBps=2 * big.numel() / us / 1e6)
    for M, K in ((8192, 4096), (8192, 14336), (16384, 8192), (4096, 28672)):
        x, r = (torch.randn(M, K, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        weight = torch.randn(K, device="cuda", dtype=torch.bfloat16)
        for warps in (4, 8, 16, 32):
            int8_quantize.WARPS = ((65536, warps),)
            us = graph_us([lambda: int8_quantize.quantize_rows(x)] * 2, 3)
            silu = graph_us([lambda: int8_quantize.silu_product_quantize(x, r)] * 2, 3)
            norm = graph_us([lambda: int8_quantize.rms_norm_quantize(x, weight, 1e-5, r)] * 2, 3)
            note(
                op="quantize",
                M=M,
                K=K,
                warps=warps,
                rows_TBps=3 * M * K / us / 1e6,
                silu_TBps=5 * M * K / silu / 1e6,
                norm_TBps=7 * M * K / norm / 1e6,
            )
        us = graph_us([lambda: torch.nn.functional.rms_norm(x.add_(r), (K,), weight, 1e-5)] * 2, 3)
        note(op="torch add + rms_norm", M=M, K=K, us=us)


if __name__ == "__main__":
    torch.manual_seed(0)
    {"decode": decode, "prefill": prefill, "rungs": rungs, "triton": triton, "quantize": quantize}[sys.argv[1]]()
    with open(sys.argv[2], "w") as file:
        json.dump({"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": ROWS}, file, indent=0)
