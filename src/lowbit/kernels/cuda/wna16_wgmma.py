"""Launches of wna16_wgmma.cu: from a few tokens to some thousand, on sm_90.

A worker is a block; it multiplies tiles of 64 rows a warpgroup by some tokens. All workers get the
same number of steps along K, so a tile may be split anywhere; then its sums pass from worker to worker through memory.
A plan says which tile, how many workers, and how many whole tiles each does besides.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lowbit.kernels.cuda.compiler import Kernel, current_stream, load_kernel
from lowbit.kernels.cuda.device import gpu_of, gpu_refusal, on_device_of
from lowbit.kernels.cuda.tensor_map import tensor_map
from lowbit.kernels.cuda.wna16_layout import Defines, fast, form_defines
from lowbit.kernels.cuda.wna16_plans import measured_plan
from lowbit.kernels.layout import FastForm, FastWeight, form_refusal
from lowbit.tensors import PackedWeight

_LEAST_STAGES = 3
_PARAMETERS = "P128sPPPPPiiiiii"
_TABLE_BYTES = 32 * 1024
_SHARED_BYTES = 228 * 1024  # of a multiprocessor of sm_90; the system takes 1 KB a block
_MOST_PIECES, _PIECES_BYTES = 96, 1920  # of tiles in one block; a list of them lies in shared memory


@dataclass(frozen=True)
class Tile:
    """Compile-time shape: tokens, warpgroups (64 rows each), records and stages of x in flight, blocks per SM.

    scales_sums: scales meet the sums of a group, not the weights.
    """

    tokens: int
    warpgroups: int
    stages: int
    blocks: int
    scales_sums: bool = False

    @property
    def rows(self) -> int:
        """Rows of a tile."""
        return 64 * self.warpgroups

    def stage_bytes(self, form: FastForm) -> int:
        """Shared memory of a stage: 128 columns of x and of the records."""
        return self.tokens * 256 + 4 * self.warpgroups * form.record_bytes

    def shared_bytes(self, form: FastForm) -> int:
        """Shared memory as wna16_wgmma.cu lays it out: stages, barriers, pieces, table."""
        barriers = _aligned(16 * self.stages) + _PIECES_BYTES
        return _aligned(self.stages * self.stage_bytes(form)) + barriers + _table_bytes(form)


def tile_for(form: FastForm, tokens: int, warpgroups: int, blocks: int = 1, scales_sums: bool = False) -> Tile:
    """The tile with as many stages as its share of a multiprocessor's shared memory holds, 8 at most."""
    share = _SHARED_BYTES // blocks - 1024 - _PIECES_BYTES - _table_bytes(form) - 256
    bytes_each = Tile(tokens, warpgroups, 0, blocks).stage_bytes(form)
    return Tile(tokens, warpgroups, min(8, share // bytes_each), blocks, scales_sums)


def _table_bytes(form: FastForm) -> int:
    return _TABLE_BYTES if form.codes == "lut" else 0


@dataclass(frozen=True)
class Plan:
    """One launch: tile, kernel, workers, tiles of tokens.

    waves: whole tiles that each worker does besides its share of the rest. parts: 0, or how many workers a tile has, of
    which those of the next tile finish it. partial_bytes: of sums that pass from worker to worker, 0 where none do.
    """

    tile: Tile
    kernel: Kernel
    workers: int
    shared_bytes: int
    waves: int
    token_tiles: int
    parts: int
    partial_bytes: int


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
    partial = x.new_empty(plan.partial_bytes, dtype=torch.uint8) if plan.partial_bytes else None
    tensors = (weight.records.data_ptr(), x_map, levels, weight.factor.data_ptr())
    results = (0 if bias is None else bias.data_ptr(), y.data_ptr(), 0 if partial is None else partial.data_ptr())
    arguments = (*tensors, *results, tokens, rows, columns, plan.waves, plan.token_tiles, plan.parts)
    overlaps, stream = gpu_of(x.device).overlaps_launches, current_stream(x.device)
    grid, block = (plan.workers, 1, 1), (128 * plan.tile.warpgroups, 1, 1)
    plan.kernel.launch(grid, block, arguments, plan.shared_bytes, stream, overlaps)
    return y


@cache
def plan_of(form: FastForm, shape: tuple[int, int], tokens: int, dtype: torch.dtype, device: torch.device) -> Plan:
    """The launch for a weight [N, K] of this form and `tokens` rows of x."""
    processors = gpu_of(device).processors
    if known := _known(form, shape, tokens, processors):
        return plan_for(known[0], form, shape, tokens, dtype, device, *known[1:])
    choices = [
        (_cost_us(tile, shape, tokens, workers, spread, processors), index, workers, spread, tile)
        for index, tile in enumerate(tiles_of(form, tokens))
        for workers, spread in workers_of(tile, shape, tokens, processors)
    ]
    _, _, workers, spread, tile = min(choices)
    return plan_for(tile, form, shape, tokens, dtype, device, workers, spread)


def _known(form: FastForm, shape: tuple[int, int], tokens: int, processors: int) -> tuple[Tile, int, bool] | None:
    """(tile, workers, spread) that was measured for these codes, else for int4, or None."""
    size = tokens_of_tile(tokens)
    of_tiles = -(-tokens // size) * size
    for codes in (form.codes, "int4"):
        if row := measured_plan("wgmma", processors, codes, shape, of_tiles):
            scales_sums = row["scales_sums"] if codes == form.codes else scales_sums_of(form, size)
            tile = tile_for(form, size, row["warpgroups"], row["blocks"], scales_sums)
            if tile.stages >= _LEAST_STAGES:
                return tile, row["workers"], row["spread"]
    return None


def plan_for(
    tile: Tile, form: FastForm, shape: tuple[int, int], tokens: int, dtype: torch.dtype, device: torch.device,
    workers: int, spread: bool,
) -> Plan:  # fmt: skip
    """The launch with a given tile and number of workers, of which there are at most as many as steps.

    spread: the workers, a multiple of the tiles, finish each tile together.
    """
    shared = tile.shared_bytes(form)
    kernel = load_kernel("wna16_wgmma.cu", "wna16_wgmma", _PARAMETERS, device, wgmma_defines(form, dtype, tile), shared)
    tiles, token_tiles = tiles_in(tile, shape, tokens), -(-tokens // tile.tokens)
    if spread:
        assert workers % tiles == 0, (workers, tiles)
        parts, waves, whole = workers // tiles, 0, False
        workers += parts
    else:
        parts, (waves, whole) = 0, waves_of(tiles, workers)
    partial = 0 if whole else workers * tile.rows * tile.tokens * 4 * 65 // 64  # sums, and flags behind them
    return Plan(tile, kernel, workers, shared, waves, token_tiles, parts, partial)


def tiles_in(tile: Tile, shape: tuple[int, int], tokens: int) -> int:
    """Tiles of the product of a weight [N, K] with `tokens` rows of x."""
    return -(-shape[0] // tile.rows) * -(-tokens // tile.tokens)


def waves_of(tiles: int, workers: int) -> tuple[int, bool]:
    """How many whole tiles each worker does, at least a tile's work each left to share; or all, and True."""
    return (tiles // workers, True) if tiles % workers == 0 else (max(tiles // workers - 1, 0), False)


def workers_of(tile: Tile, shape: tuple[int, int], tokens: int, processors: int) -> list[tuple[int, bool]]:
    """(workers, spread) worth trying: all workers that run at once, and those that split each tile evenly."""
    tiles, steps = tiles_in(tile, shape, tokens), -(-shape[1] // 128)
    most = processors * tile.blocks
    even = [(tiles * parts, True) for parts in range(2, min(steps, most // max(tiles, 1)) + 1)]
    least = -(-tiles // (_MOST_PIECES - 4))  # beyond thousands of tokens more workers than run at once
    whole = -(-tiles // -(-tiles // processors))  # as few as finish whole tiles in as many rounds as all would
    alone = {max(least, min(workers, tiles * steps)) for workers in (processors, most, whole)}
    return [*((workers, False) for workers in sorted(alone)), *even]


def tokens_of_tile(tokens: int) -> int:
    """Tokens of the smallest tile that holds `tokens` of them, or of the largest."""
    return next((size for size in (8, 16, 32, 64) if tokens <= size), 128)


def scales_sums_of(form: FastForm, tokens: int) -> bool:
    """Whether scaling a group's sums takes fewer instructions than its weights: a table's scale costs two a pair."""
    return form.group >= 32 and tokens <= (64 if form.codes == "lut" else 16)


def tiles_of(form: FastForm, tokens: int) -> tuple[Tile, ...]:
    """Tiles worth trying for `tokens` rows of x, where no plan has been measured."""
    size = tokens_of_tile(tokens)
    return (tile_for(form, size, 4, scales_sums=scales_sums_of(form, size)),)


# A step of 128 columns of a block with four warpgroups, by tokens, where all multiprocessors are busy. At 128 tokens
# the chip as a whole is the limit: 1.43 with 112 of 132 (bench/results/wna16_sweep_h200.json)
_STEP_US = {8: 0.64, 16: 0.66, 32: 0.75, 64: 0.95, 128: 1.68}


def _cost_us(tile: Tile, shape: tuple[int, int], tokens: int, workers: int, spread: bool, processors: int) -> float:
    """Microseconds that a launch should take on an H200: a start, the longest worker's steps, sums handed on."""
    tiles, steps = tiles_in(tile, shape, tokens), -(-shape[1] // 128)
    waves, whole = waves_of(tiles, workers)
    shared = (tiles - waves * workers) * steps
    longest = -(-shared // workers) + waves * steps
    others = -(-workers * steps // max(shared, 1))  # that a tile's last worker takes sums over from
    handed = 0.0 if whole else 2.0 + tile.tokens / 64 if spread else 1.5 + others * (0.7 + tile.tokens / 32)
    at_once = -(-workers // processors)
    busy = min(max(workers / processors, 0.84), 1.0) if tile.tokens == 128 else 1.0
    return longest * _STEP_US[tile.tokens] * busy * at_once + 3.5 + handed


def wgmma_defines(form: FastForm, dtype: torch.dtype, tile: Tile) -> Defines:
    """The defines that compile wna16_wgmma.cu."""
    tiles = (("TOKENS", tile.tokens), ("WARPGROUPS", tile.warpgroups))
    shape = (
        *tiles,
        ("STAGES", tile.stages),
        ("BLOCKS", tile.blocks),
        ("SCALED", int(tile.scales_sums)),
    )
    return (*form_defines(form), ("XTYPE", int(dtype == torch.bfloat16)), *shape)
