"""Other libraries' kernels for the same product, to be timed beside ours in one run; each where it is installed.

    cublas bf16       torch.nn.functional.linear on the float weight
    tinygemm          torch's own int4 kernel (_weight_int4pack_mm), groups of 128
    humming           humming-kernels 0.1.19, int4 groups of 128
    gemlite           gemlite 0.6.0, A16W4, groups of 128
    bitsandbytes      Linear4bit, nf4, blocks of 64

A peer is built from random weights: what is compared is time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from lowbit.optional import installed, require

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """A library's product with a weight [N, K]: whose scheme it competes with ("" for all), how to build it."""

    name: str
    scheme: str
    module: str
    build: Callable[[int, int], Product]
    most_tokens: int = 1 << 30


def _cublas(rows: int, columns: int) -> Product:
    w = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) * 0.02
    return lambda x: linear(x, w)


def _tinygemm(rows: int, columns: int) -> Product:
    codes = torch.randint(0, 256, (rows, columns // 2), device="cuda", dtype=torch.uint8)
    packed = torch._convert_weight_to_int4pack(codes, 8)
    scales = torch.randn(columns // 128, rows, 2, device="cuda", dtype=torch.bfloat16)
    return lambda x: torch._weight_int4pack_mm(x, packed, 128, scales)


def _humming(rows: int, columns: int) -> Product:
    layers = require("humming.layer", "peers")
    config = {"dtype": "int4", "group_size": 128}
    layer = layers.HummingLayer(shape_n=rows, shape_k=columns, weight_config=config, torch_dtype=torch.bfloat16).cuda()
    layer.load_from_unquantized(torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) * 0.02)
    layer.transform()
    return lambda x: layer(x)


def _gemlite(rows: int, columns: int) -> Product:
    made = require("gemlite.helper", "peers").A16W4_HQQ_INT(device="cuda", dtype=torch.bfloat16)
    q = torch.randint(0, 16, (rows, columns), device="cuda", dtype=torch.uint8)
    scales = torch.rand(rows * columns // 128, 1, device="cuda", dtype=torch.bfloat16) * 0.01
    layer = made.from_weights(q, scales, torch.full_like(scales, 8.0))
    return lambda x: layer(x)


def _bitsandbytes(rows: int, columns: int) -> Product:
    modules = require("bitsandbytes.nn", "peers")
    layer = modules.Linear4bit(columns, rows, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer = layer.to("cuda").requires_grad_(False)
    return lambda x: layer(x)


PEERS: Sequence[Peer] = (
    Peer("cublas bf16", "", "torch", _cublas),
    Peer("tinygemm", "w4a16-g128", "torch", _tinygemm, most_tokens=64),
    Peer("humming", "w4a16-g128", "humming", _humming),
    Peer("gemlite", "w4a16-g128", "gemlite", _gemlite),
    Peer("bitsandbytes", "nf4-b64", "bitsandbytes", _bitsandbytes),
)


def peers_for(scheme: str, everyone: bool) -> list[Peer]:
    """The peers of a scheme that are installed; only cuBLAS unless `everyone`."""
    fitting = [peer for peer in PEERS if peer.scheme in ("", scheme) and installed(peer.module)]
    return fitting if everyone else fitting[:1]
