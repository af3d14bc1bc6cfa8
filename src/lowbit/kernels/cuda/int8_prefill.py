"""The W8A8 product for many tokens on Hopper: how int8_wgmma.cu is compiled, chosen and launched."""

from functools import lru_cache

import torch
from torch import Tensor

from lowbit.kernels.cuda.compiler import current_stream
from lowbit.kernels.cuda.device import gpu_of
from lowbit.kernels.cuda.int8_launch import STEP, launch, map_of
from lowbit.kernels.int8 import Scaling

TILE_M, STAGES = 128, 4
MOST_TOKENS = 131072  # that prefill_quantizing counts


def choose_columns(tokens: int, width: int, processors: int) -> int:
    """Columns of the prefill kernel's tiles: 256, or 192 where these fill the chip's last round so much better that a
    tenth of the time is saved (6144 columns, 1024 tokens: 42.2 us for 51.9).
    """
    pairs, clusters = -(-tokens // (2 * TILE_M)), processors // 2

    def cost(columns: int) -> int:
        return -(-pairs * -(-width // columns) // clusters) * columns

    return 192 if cost(192) < 0.9 * cost(256) else 256


def prefill_bytes(tile_n: int) -> int:
    """Shared memory of a prefill block: stages, three numbers a column for either warpgroup, barriers."""
    return STAGES * (TILE_M + tile_n) * STEP + 2 * 3 * tile_n * 4 + 2 * STAGES * 8


def prefill(q: Tensor, codes: Tensor, scaling: Scaling | None = None, tile_n: int | None = None) -> Tensor:
    """q int8 [M, K] times codes int8 [N, K], transposed: int32 [M, N], or the floats of scaling."""
    dtype = torch.int32 if scaling is None else scaling.dtype
    out = torch.empty(len(q), len(codes), dtype=dtype, device=q.device)
    tile_n = tile_n or choose_columns(len(q), len(codes), gpu_of(q.device).processors)
    _launch_prefill(q, codes, scaling, out, (("TILE_N", tile_n),), ("PiPP", 0, 0, 0, 0))
    return out


def prefill_quantizing(
    x: Tensor, codes: Tensor, w_scale: Tensor, bias: Tensor | None, rows_first: int | None = None
) -> Tensor:
    """x [M, K] quantized per token, times codes int8 [N, K], transposed, scaled, plus bias [N]: [M, N] in x's dtype.

    x is one of those that `takes_floats` allows. rows_first: quantized before the first product, in units of 256; the
    others meanwhile.
    """
    tokens, columns = x.shape
    out = torch.empty(tokens, len(codes), dtype=x.dtype, device=x.device)
    q = torch.empty(tokens, columns, dtype=torch.int8, device=x.device)
    scaling = Scaling(x.dtype, torch.empty(tokens, dtype=torch.float32, device=x.device), w_scale, bias=bias)
    processors = gpu_of(x.device).processors
    tile_n = choose_columns(tokens, len(codes), processors)
    first, group = choose_order(-(-len(codes) // tile_n), processors)
    warps = 1 if columns <= 4096 else 2 if columns <= 8192 else 4
    defines = (("FIRST", rows_first or first), ("GROUP", group), ("QUANTIZE", 1), ("TILE_N", tile_n), ("WARPS", warps))
    counters = _counters(x.device).address(current_stream(x.device))
    more = "PiPP", x.data_ptr(), x.stride(0), q.data_ptr(), counters
    _launch_prefill(q, codes, scaling, out, defines, more)
    return out


def choose_order(wide: int, processors: int) -> tuple[int, int]:
    """(FIRST, GROUP) for so many tiles beside each other: units of 256 rows that are quantized, and multiplied, before
    the others, and how many follow at a time.

    First as few as give each pair of processors a tile; then 4, or 8 of wide weights, which would be read too often.
    """
    first = next(first for first in range(1, 9) if first == 8 or first * wide >= 0.95 * (processors // 2))
    return first, 4 if wide <= 32 else 8


class _Counters:
    """For each stream zeros, which a launch leaves as zeros (int8_rows.cuh): the launches of one follow each other.

    All are made at once, by the first launch of a process: within a graph's capture nothing would make them zero.
    """

    STREAMS = 64

    def __init__(self, device: torch.device) -> None:
        self.values = torch.zeros(self.STREAMS, 16 + MOST_TOKENS // TILE_M, dtype=torch.int32, device=device)
        self.rows: dict[int, int] = {}

    def address(self, stream: int) -> int:
        row = self.rows.setdefault(stream, len(self.rows) % self.STREAMS)
        return self.values.data_ptr() + row * self.values.stride(0) * 4


_counters = lru_cache(_Counters)


def _launch_prefill(
    q: Tensor, codes: Tensor, scaling: Scaling | None, out: Tensor, defines: tuple[tuple[str, int], ...],
    more: tuple[str, *tuple[int, ...]],
) -> None:  # fmt: skip
    tile_n = dict(defines)["TILE_N"]
    tiles = -(-len(q) // (2 * TILE_M)) * -(-len(codes) // tile_n)
    defines = (("ALIGNED", int(out.shape[1] * out.itemsize % 16 == 0)), *defines)
    kernel = "int8_wgmma", defines, prefill_bytes(tile_n)
    size = (min(tiles, gpu_of(q.device).processors // 2) * 2, 1, 1), 384
    launch(kernel, (map_of(q, TILE_M), map_of(codes, tile_n // 2)), (q, codes, scaling), out, size, more)
