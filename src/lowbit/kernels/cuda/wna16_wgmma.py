"""Launches of wna16_wgmma.cu: from a few tokens to some thousand, on sm_90.

A block multiplies 64 rows a warpgroup by a tile of tokens, over a slice of K. Slices of one unit of rows are a cluster,
so the plan asks the driver how many clusters of a size run at once, and takes the slices for which the longest chain of
blocks on a multiprocessor is shortest.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lowbit.kernels.cuda.compiler import Kernel, current_stream, load_kernel
from lowbit.kernels.cuda.device import gpu_of, gpu_refusal, on_device_of
from lowbit.kernels.cuda.tensor_map import tensor_map
from lowbit.kernels.cuda.wna16_layout import Defines, fast, form_defines
from lowbit.kernels.layout import FastForm, FastWeight, form_refusal
from lowbit.tensors import PackedWeight

_PARAMETERS = "P128sPPPPiiiii"
_MOST_SPLITS = 8  # blocks in a cluster that every GPU with clusters can run
_TABLE_BYTES = 32 * 1024


@dataclass(frozen=True)
class Tile:
    """Compile-time shape: tokens, warpgroups (64 rows each), records and stages of x in flight, blocks per SM.

    paired: two blocks share 7 x 64 rows, 448, where whole blocks would leave multiprocessors idle.
    """

    tokens: int
    warpgroups: int
    stages: int
    blocks: int
    paired: bool = False

    @property
    def rows(self) -> int:
        return 64 * self.warpgroups

    @property
    def unit_rows(self) -> int:
        """Rows of a cluster."""
        return 448 if self.paired else self.rows

    def shared_bytes(self, form: FastForm) -> int:
        """Shared memory as wna16_wgmma.cu lays it out: x and records, or the sums in their place; barriers, table."""
        warps = 4 * self.warpgroups
        work = self.stages * (self.tokens * 256 + warps * form.record_bytes)
        barriers = 8 * self.stages * (warps + 2)
        table = _TABLE_BYTES if form.codes == "lut" else 0
        return _aligned(_aligned(max(work, self.tokens * (self.rows + 4) * 4)) + barriers) + table


@dataclass(frozen=True)
class Plan:
    """One launch: the tile, its kernel, grid, threads and shared memory; slices of K (a cluster), tiles of tokens."""

    tile: Tile
    kernel: Kernel
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    splits: int
    token_tiles: int


def _aligned(size: int) -> int:
    return (size + 127) // 128 * 128


def refusal(x: Tensor, weight: PackedWeight) -> str | None:
    """Why this kernel can't run for these arguments, or None."""
    if reason := gpu_refusal(x, weight.codes) or form_refusal(weight):
        return reason
    major, minor = gpu_of(x.device).capability
    if (major, minor) != (9, 0):
        return f"compute capability {major}.{minor} is not 9.0, the only one with wgmma"
    if weight.shape[1] % 8 or x.data_ptr() % 16:
        return "rows of x don't start at multiples of 16 bytes"
    return None


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """x [M, K] times the weight [N, K], transposed, + bias [N]: [M, N] in x's dtype; float32 sums, deterministic.

    Weights are rounded to x's dtype, as a dequantized weight would be.
    """
    return on_device_of(x, lambda: _linear(x.contiguous(), fast(weight), weight.shape, bias))


def _linear(x: Tensor, weight: FastWeight, shape: tuple[int, int], bias: Tensor | None) -> Tensor:
    tokens, (rows, columns) = x.shape[0], shape
    y = x.new_empty(tokens, rows)
    if tokens == 0:
        return y
    bias = None if bias is None else bias.to(x.dtype)
    plan = plan_of(weight.form, shape, tokens, x.dtype, x.device)
    levels = weight.levels[x.dtype].data_ptr() if weight.levels is not None else 0
    x_map = tensor_map(x.data_ptr(), tokens, 2 * columns, plan.tile.tokens)
    tensors = (weight.records.data_ptr(), x_map, levels, weight.factor.data_ptr())
    results = (0 if bias is None else bias.data_ptr(), y.data_ptr())
    arguments = (*tensors, *results, tokens, rows, columns, plan.splits, plan.token_tiles)
    overlaps, stream = gpu_of(x.device).overlaps_launches, current_stream(x.device)
    plan.kernel.launch(plan.grid, plan.block, arguments, plan.shared_bytes, stream, overlaps, plan.splits)
    return y


@cache
def plan_of(form: FastForm, shape: tuple[int, int], tokens: int, dtype: torch.dtype, device: torch.device) -> Plan:
    """The launch for a weight [N, K] of this form and `tokens` rows of x."""
    plans = [
        plan_for(tile, form, shape, tokens, dtype, device, splits)
        for tile in tiles_of(form, tokens)
        for splits in ([2] if tile.paired else range(1, min(_MOST_SPLITS, -(-shape[1] // 128)) + 1))
    ]
    return min(plans, key=lambda plan: _cost_us(plan, -(-shape[1] // 128), gpu_of(device).processors))


def plan_for(
    tile: Tile, form: FastForm, shape: tuple[int, int], tokens: int, dtype: torch.dtype, device: torch.device,
    splits: int,
) -> Plan:  # fmt: skip
    """The launch with a given tile and number of slices."""
    shared = tile.shared_bytes(form)
    defines = wgmma_defines(form, dtype, tile)
    kernel = load_kernel("wna16_wgmma.cu", "wna16_wgmma", _PARAMETERS, device, defines, shared)
    token_tiles = -(-tokens // tile.tokens)
    grid = (-(-shape[0] // tile.unit_rows) * token_tiles * splits, 1, 1)
    return Plan(tile, kernel, grid, (128 * tile.warpgroups, 1, 1), shared, splits, token_tiles)


# A step of 128 columns of a multiprocessor's blocks, by tokens and warpgroups; fitted, as _cost_us' other numbers, to
# bench/results/wna16_tiles_h200.json, where the plan that this picks is within 7% of the best at every shape and M
_STEP_US = {
    (16, 4): 0.69, (32, 4): 0.77, (64, 4): 0.97, (128, 4): 1.35,
    (16, 2): 0.92, (32, 2): 1.03, (64, 2): 0.97, (128, 2): 0.76,
}  # fmt: skip


def _cost_us(plan: Plan, records: int, processors: int) -> float:
    """Microseconds that a plan should take on an H200: rounds of clusters, each a start, a slice of K and the sums."""
    tile, at_once = plan.tile, processors * plan.tile.blocks
    if plan.splits > 1:
        at_once = plan.kernel.clusters_at_once(plan.block, plan.shared_bytes, plan.splits)
    rounds = -(-plan.grid[0] // plan.splits // max(at_once, 1))
    step = _STEP_US[tile.tokens, tile.warpgroups]
    if tile.paired:
        return rounds * (records * step * 0.9 + 6.0)
    added = 0.017 * tile.tokens * tile.rows / 256 * (plan.splits - 1)
    return rounds * (-(-records // plan.splits) * step + 3.5 + added)


def tiles_of(form: FastForm, tokens: int) -> tuple[Tile, ...]:
    """Tiles worth trying for `tokens` rows of x. Records of 8-bit codes are twice as large: fewer are in flight."""
    wanted = next((size for size in (16, 32, 64) if tokens <= size), 128)
    stages = 3 if wanted == 128 or form.codes == "int8" else 4
    half = Tile(wanted, 2, stages, 1 if wanted == 128 or form.codes == "lut" else 2)
    whole = (Tile(wanted, 4, stages, 1), half)
    return (*whole, Tile(wanted, 4, stages, 1, paired=True)) if wanted >= 64 else whole


def wgmma_defines(form: FastForm, dtype: torch.dtype, tile: Tile) -> Defines:
    """The defines that compile wna16_wgmma.cu."""
    tiles = (("TOKENS", tile.tokens), ("WARPGROUPS", tile.warpgroups), ("PAIRED", int(tile.paired)))
    shape = (*tiles, ("STAGES", tile.stages), ("BLOCKS", tile.blocks))
    return (*form_defines(form), ("XTYPE", int(dtype == torch.bfloat16)), *shape)
