"""W8A8 layers beside their peers in one run on one GPU: python bench/int8/peers.py OUT.json

Microseconds of a call in a CUDA graph over rotated weights. Ours, gemlite, humming and torch._int_mm between our
quantization and a Triton epilogue take bfloat16 activations and quantize them per token; cuBLAS takes them as they are;
those called "raw" are given quantized ones. Peers that don't import are left out, and named in the file.

All kernels of a shape and M take turns, ROUNDS times a few replays each, so that no one has the cooler chip: products
of many tokens draw all the power that it may, and the clock follows with some delay.

gemlite chooses tiles by its table for the H100, the same chip; its tuning would take an hour. Shapes and M that the
table lacks (70B; M=8192) get the row of 8B.gate_up (of M=4096). --warm calls each peer once, to compile: several
processes with a shape each do that in a fraction of the time.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear

from lowbit.kernels import int8_fused
from lowbit.kernels.cuda import int8_hopper
from lowbit.kernels.int8 import Scaling
from lowbit.kernels.timing import capture, copies_of, replay_us
from lowbit.nn.linear import QuantLinear
from lowbit.numerics.scheme import QuantScheme
from lowbit.tensors import PackedWeight

SHAPES = {"8B.gate_up": (28672, 4096), "8B.o": (4096, 4096), "8B.down": (4096, 14336), "8B.qkv": (6144, 4096),
          "70B.gate_up": (57344, 8192), "70B.o": (8192, 8192), "70B.down": (8192, 28672)}  # fmt: skip
TOKENS = (1, 4, 16, 64, 1024, 4096, 8192)
ROUNDS, TURN_US = 7, 2000.0  # turns of each kernel, and how long one takes at least
Layer = Callable[[Tensor], object]


def ours(w: Tensor, scheme: str = "w8a8") -> Layer:
    layer = QuantLinear.from_packed(PackedWeight.from_float(w, QuantScheme.parse(scheme), torch.bfloat16))
    return torch.no_grad()(layer)


def raw(w: Tensor) -> Layer:
    q, scale = (w / w.abs().amax(1, keepdim=True) * 127).round().to(torch.int8), torch.rand(len(w), device="cuda")
    given: dict[int, tuple[Tensor, Scaling]] = {}

    def call(x: Tensor) -> object:
        if len(x) not in given:
            a = (torch.randn(x.shape, device="cuda") * 30).clamp(-127, 127).to(torch.int8)
            given[len(x)] = a, Scaling(torch.bfloat16, torch.rand(len(x), device="cuda"), scale)
        return int8_hopper.product(given[len(x)][0], q, given[len(x)][1])

    return call


def int_mm(w: Tensor) -> Layer:
    q = (w / w.abs().amax(1, keepdim=True) * 127).round().to(torch.int8)
    given: dict[int, Tensor] = {}

    def call(x: Tensor) -> object:
        rows = max(32, len(x))
        if rows not in given:
            given[rows] = (torch.randn(rows, x.shape[1], device="cuda") * 30).clamp(-127, 127).to(torch.int8)
        return torch._int_mm(given[rows], q.T)

    return call


@triton.jit
def _scale_sums(sums, row_scale, column_scale, y, columns, BLOCK: tl.constexpr):  # noqa: N803
    row, at = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live, start = at < columns, row.to(tl.int64) * columns
    scale = tl.load(column_scale + at, mask=live) * tl.load(row_scale + row)
    tl.store(y + start + at, (tl.load(sums + start + at, mask=live) * scale).to(tl.bfloat16), mask=live)


def int_mm_layer(w: Tensor) -> Layer:
    """torch._int_mm, which takes no fewer than 17 rows, between two kernels."""
    packed = PackedWeight.from_float(w, QuantScheme.parse("w8a8"), torch.bfloat16)
    column_scale = packed.scale.float().flatten()

    def call(x: Tensor) -> object:
        made = int8_fused.quantize_tokens(x)
        q = torch.empty(32, x.shape[1], dtype=torch.int8, device=x.device) if len(x) < 32 else made.q
        if len(x) < 32:
            q[: len(x)] = made.q
        sums, y = torch._int_mm(q, packed.codes.T), torch.empty(len(x), len(w), dtype=x.dtype, device=x.device)
        _scale_sums[len(x), triton.cdiv(len(w), 1024)](sums, made.scale, column_scale, y, len(w), BLOCK=1024)
        return y

    return call


def fp8(w: Tensor) -> Layer:
    q, scale = w.to(torch.float8_e4m3fn), torch.rand(1, len(w), device="cuda")
    given: dict[int, tuple[Tensor, Tensor]] = {}

    def call(x: Tensor) -> object:
        rows = max(16, len(x))
        if rows not in given:
            a = torch.randn(rows, x.shape[1], device="cuda").to(torch.float8_e4m3fn)
            given[rows] = a, torch.rand(rows, 1, device="cuda")
        a, row_scale = given[rows]
        return torch._scaled_mm(a, q.T, scale_a=row_scale, scale_b=scale, out_dtype=torch.bfloat16, use_fast_accum=True)

    return call


def gemlite_layer(w: Tensor) -> Layer:
    import gemlite  # noqa: PLC0415  only where it is installed
    from gemlite import core, helper  # noqa: PLC0415

    table = core.GEMLITE_TRITON_CONFIG_CACHE
    if not table:
        gemlite.GemLiteLinear.load_config(str(Path(gemlite.__file__).parent / "configs" / "h100.json"))
        table = core.GEMLITE_TRITON_CONFIG_CACHE
    width, columns = w.shape
    for rows in table.values():
        for tokens in TOKENS:
            like = next((k for k in (_key(tokens, 28672, 4096), _key(4096, 28672, 4096)) if k in rows), None)
            own = _key(min(tokens, 4096), width, columns)
            if like is not None:
                rows.setdefault(_key(tokens, width, columns), rows.get(own, rows[like]))
    return helper.A8W8_int8_dynamic(device="cuda", dtype=torch.bfloat16).from_weights(w)


def _key(tokens: int, width: int, columns: int) -> str:
    return str((tokens, width, columns, columns, 1, 408))  # 408: int8 by int8


def humming_layer(w: Tensor) -> Layer:
    from humming.layer import HummingLayer  # noqa: PLC0415  only where it is installed

    layer = HummingLayer(
        shape_n=len(w), shape_k=w.shape[1], weight_config={"dtype": "int8"}, input_config={"dtype": "int8"},
        torch_dtype=torch.bfloat16,
    ).cuda()  # fmt: skip
    layer.load_from_unquantized(w)
    layer.transform()
    return layer


PEERS: dict[str, tuple[Callable[[Tensor], Layer], int, str]] = {
    "lowbit w8a8": (ours, 1, "lowbit"),
    "lowbit w8a8 (raw)": (raw, 1, "lowbit"),
    "lowbit fp8": (partial(ours, scheme="fp8"), 1, "lowbit"),
    "bf16 cuBLAS": (lambda w: partial(linear, weight=w), 2, "torch"),
    "_int_mm (raw, int32 out)": (int_mm, 1, "torch"),
    "_int_mm + epilogue": (int_mm_layer, 1, "torch"),
    "fp8 _scaled_mm rowwise (raw)": (fp8, 1, "torch"),
    "gemlite A8W8 dynamic": (gemlite_layer, 1, "gemlite"),
    "humming W8A8 dynamic": (humming_layer, 1, "humming"),
}


def weight(shape: str) -> Tensor:
    return torch.randn(*SHAPES[shape], device="cuda", dtype=torch.bfloat16) * 0.02


def warm(shapes: list[str], names: list[str], counts: list[int]) -> None:
    for shape in shapes:
        for name in names:
            layer = PEERS[name][0](weight(shape))
            for tokens in counts:
                layer(torch.randn(tokens, SHAPES[shape][1], device="cuda", dtype=torch.bfloat16))


def take_turns(graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]]) -> dict[str, float]:
    """Median microseconds of a call; graphs: kernel -> (graph, its calls). A turn's first replay is not counted."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    order = list(graphs)
    for turn in range(ROUNDS):
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            graph, calls = graphs[name]
            more = max(1, min(20, int(TURN_US / replay_us(graph))))
            times[name] += [replay_us(graph) / calls for _ in range(more)]
    return {name: median(of) for name, of in times.items()}


def measure(out: Path, shapes: list[str], names: list[str], counts: list[int], seconds: float) -> None:
    end = time.monotonic() + seconds
    found: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "rows": [],
    }
    found["not installed"] = [name for name, (_, _, package) in PEERS.items() if find_spec(package) is None]
    for shape in shapes:
        width, columns = SHAPES[shape]
        copies = {name: min(8, copies_of(width * columns * PEERS[name][1])) for name in names}
        layers = {name: [PEERS[name][0](weight(shape)) for _ in range(copies[name])] for name in names}
        for tokens in counts:
            if time.monotonic() > end:
                return
            x = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
            graphs = {name: (capture([partial(layer, x) for layer in layers[name]]), copies[name]) for name in names}
            taken = take_turns(graphs)
            found["rows"] += [
                {"shape": shape, "N": width, "K": columns, "M": tokens, "kernel": name, "us": us}
                for name, us in taken.items()
            ]
            print(shape, tokens, *(f"{us:.1f}" for us in taken.values()), flush=True)
            out.write_text(json.dumps(found, indent=0) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--peers", default="", help="names that hold one of these words, between commas")
    parser.add_argument("--warm", action="store_true")
    given = parser.parse_args()
    words, counts = given.peers.split(","), [int(count) for count in given.tokens.split(",")]
    names = [n for n, (_, _, package) in PEERS.items() if find_spec(package) and any(word in n for word in words)]
    if given.warm:
        warm(given.shapes.split(","), names, counts)
    else:
        measure(given.out, given.shapes.split(","), names, counts, given.seconds)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
