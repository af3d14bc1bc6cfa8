"""W8A8 layers beside their peers in one run on one GPU: python bench/int8/peers.py OUT.json [SECONDS]

Microseconds of a call in a CUDA graph over rotated weights. Ours, gemlite and humming quantize bfloat16 activations
per token; cuBLAS takes them as they are; `_int_mm` and fp8 `_scaled_mm` are given quantized ones ("raw").
Peers that don't import are left out, and named in the file.
"""

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

from lowbit.kernels.timing import copies_of, graph_us
from lowbit.nn.linear import QuantLinear
from lowbit.numerics.scheme import QuantScheme
from lowbit.tensors import PackedWeight

SHAPES = {"8B.gate_up": (28672, 4096), "8B.o": (4096, 4096), "8B.down": (4096, 14336), "8B.qkv": (6144, 4096),
          "70B.gate_up": (57344, 8192), "70B.o": (8192, 8192), "70B.down": (8192, 28672)}  # fmt: skip
TOKENS = (1, 4, 16, 64, 1024, 4096, 8192)
Layer = Callable[[Tensor], object]


def ours(w: Tensor, scheme: str = "w8a8") -> Layer:
    layer = QuantLinear.from_packed(PackedWeight.from_float(w, QuantScheme.parse(scheme), torch.bfloat16))
    return torch.no_grad()(layer)


def int_mm(w: Tensor) -> Layer:
    q = (w / w.abs().amax(1, keepdim=True) * 127).round().to(torch.int8)
    given: dict[int, Tensor] = {}

    def call(x: Tensor) -> object:
        rows = max(32, len(x))
        if rows not in given:
            given[rows] = (torch.randn(rows, x.shape[1], device="cuda") * 30).clamp(-127, 127).to(torch.int8)
        return torch._int_mm(given[rows], q.T)

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
    from gemlite import helper  # noqa: PLC0415  only where it is installed

    return helper.A8W8_int8_dynamic(device="cuda", dtype=torch.bfloat16).from_weights(w)


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
    "lowbit fp8": (partial(ours, scheme="fp8"), 1, "lowbit"),
    "bf16 cuBLAS": (lambda w: partial(linear, weight=w), 2, "torch"),
    "_int_mm (raw, int32 out)": (int_mm, 1, "torch"),
    "fp8 _scaled_mm rowwise (raw)": (fp8, 1, "torch"),
    "gemlite A8W8 dynamic": (gemlite_layer, 1, "gemlite"),
    "humming W8A8 dynamic": (humming_layer, 1, "humming"),
}


def main(out: Path, seconds: float) -> None:
    end = time.monotonic() + seconds
    found = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": []}
    found["not installed"] = [name for name, (_, _, package) in PEERS.items() if find_spec(package) is None]
    for shape, (width, columns) in SHAPES.items():
        for name, (build, bytes_each, package) in PEERS.items():
            if find_spec(package) is None or time.monotonic() > end:
                continue
            count = min(20, copies_of(width * columns * bytes_each))
            layers = [
                build(torch.randn(width, columns, device="cuda", dtype=torch.bfloat16) * 0.02) for _ in range(count)
            ]
            for tokens in TOKENS:
                x = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
                us = graph_us([partial(layer, x) for layer in layers], least_ms=5.0)
                found["rows"].append({"shape": shape, "N": width, "K": columns, "M": tokens, "kernel": name, "us": us})
                print(shape, tokens, name, f"{us:.1f}", flush=True)
                out.write_text(json.dumps(found, indent=0) + "\n", encoding="utf-8")


if __name__ == "__main__":
    torch.manual_seed(0)
    main(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 600.0)
