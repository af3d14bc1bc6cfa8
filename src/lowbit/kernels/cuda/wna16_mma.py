"""Launches of wna16_mma.cu: few tokens, any NVIDIA GPU from Turing on.

A plan says which compiled variant runs a weight at M tokens, and how its blocks share the work. It is made once per
(form, shape, M, dtype, device); a call then costs a few look-ups, one allocation for y and one launch.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lowbit.kernels.cuda.compiler import Kernel, current_stream, load_kernel
from lowbit.kernels.cuda.device import Gpu, gpu_of, gpu_refusal, on_device_of
from lowbit.kernels.cuda.wna16_layout import Defines, fast, form_defines
from lowbit.kernels.cuda.wna16_plans import measured_plan
from lowbit.kernels.layout import FastForm, FastWeight, form_refusal
from lowbit.tensors import PackedWeight

_PARAMETERS = "PPPPPPPPiiiii"
_RESERVED_SHARED = 1024  # of every block, taken by the system on sm_90
_TABLE_BYTES = 32 * 1024  # of wna16_record.cuh, at the shared address of its size
_X_BYTES = 144 * 1024  # of x in one block's shared memory; more, and the blocks split K
_SPLITS = (1, 2, 4, 8, 16, 32, 64, 128)
_MOST_IN_CLUSTER = 8  # that every GPU with clusters can run


@dataclass(frozen=True)
class Tile:
    """Compile-time shape: warps in a block, strips a warp works on at once, tokens / 8, ring stages, blocks per SM."""

    warps: int
    rows: int
    tokens: int
    stages: int
    blocks: int

    def fixed_bytes(self, form: FastForm, major: int) -> int:
        """Shared memory before x, as wna16_mma.cu lays it out: rings, table, barriers."""
        ring = form.record_bytes * self.rows * self.stages if major >= 8 else 0
        barriers = (8 * self.stages * self.warps + 15) // 16 * 16
        if form.codes != "lut":
            return ring * self.warps + barriers
        front = min(self.warps, (_TABLE_BYTES - _RESERVED_SHARED) // ring) if ring else 0
        start = _RESERVED_SHARED if major >= 9 else 0  # dynamic shared memory begins behind it
        return 2 * _TABLE_BYTES - start + ring * (self.warps - front) + barriers

    def x_and_slot_bytes(self, form: FastForm, records: int, tokens: int, dtype: torch.dtype) -> tuple[int, int]:
        """Shared bytes of x with its sums, for a slice of so many records, and of one slot of sums."""
        tokens = min(tokens, 8 * self.tokens)
        has_offset = form.codes != "lut" and (form.has_zero or not (form.codes == "int8" and dtype == torch.bfloat16))
        sums = records * (128 // form.group) * 8 * self.tokens * 4 if has_offset else 0
        return tokens * (records * 128 + 8) * 2 + sums, tokens * (16 * self.rows + 4) * 4


@dataclass(frozen=True)
class Plan:
    """One launch: the kernel, its grid, its shared memory; slices of K, units per round, blocks in a cluster."""

    kernel: Kernel
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    splits: int
    per_round: int
    cluster: int


def refusal(x: Tensor, weight: PackedWeight) -> str | None:
    """Why this kernel can't run for these arguments, or None."""
    return gpu_refusal(x, weight.codes) or form_refusal(weight)


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """x [M, K] times the weight [N, K], transposed, + bias [N]: [M, N] in x's dtype; float32 sums, deterministic."""
    return on_device_of(x, lambda: _linear(x.contiguous(), fast(weight), weight.shape, bias))


def _linear(x: Tensor, weight: FastWeight, shape: tuple[int, int], bias: Tensor | None) -> Tensor:
    tokens, (rows, columns) = x.shape[0], shape
    y = x.new_empty(tokens, rows)
    if tokens == 0:
        return y
    bias = None if bias is None else bias.to(x.dtype)
    plan = plan_of(weight.form, shape, tokens, x.dtype, x.device)
    partial = None
    if plan.splits > plan.cluster:
        partial = x.new_empty(plan.splits * tokens * rows, dtype=torch.float32)
    levels = weight.levels[x.dtype].data_ptr() if weight.levels is not None else 0
    tensors = (weight.records.data_ptr(), x.data_ptr(), 0, levels, weight.factor.data_ptr())
    results = (_pointer(bias), y.data_ptr(), _pointer(partial))
    arguments = (*tensors, *results, tokens, rows, columns, plan.splits, plan.per_round)
    overlaps, stream = gpu_of(x.device).overlaps_launches, current_stream(x.device)
    plan.kernel.launch(plan.grid, plan.block, arguments, plan.shared_bytes, stream, overlaps, plan.cluster)
    if partial is not None:
        add_partial_sums(partial, weight, bias, y, plan.splits)
    return y


def add_partial_sums(partial: Tensor, weight: FastWeight, bias: Tensor | None, y: Tensor, splits: int) -> None:
    """y [M, N] = the partial sums float32 [splits, M, N], added in order, times the weight's factor, + bias."""
    gpu = gpu_of(y.device)
    pointers = (partial.data_ptr(), weight.factor.data_ptr(), _pointer(bias), y.data_ptr())
    grid = (min(-(-y.numel() // 256), 8 * gpu.processors), 1, 1)
    kernel = sum_kernel(weight.form, y.dtype, y.device)
    arguments = (*pointers, *y.shape, splits)
    kernel.launch(grid, (256, 1, 1), arguments, 0, current_stream(y.device), gpu.overlaps_launches)


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@cache
def sum_kernel(form: FastForm, dtype: torch.dtype, device: torch.device) -> Kernel:
    """wna16_sum, out of a compilation of wna16_mma.cu that is needed anyway."""
    defines = mma_defines(form, dtype, tile_of(form, 1, (4096, 4096), gpu_of(device)))
    return load_kernel("wna16_mma.cu", "wna16_sum", "PPPPiii", device, defines)


@cache
def plan_of(form: FastForm, shape: tuple[int, int], tokens: int, dtype: torch.dtype, device: torch.device) -> Plan:
    """The launch for a weight [N, K] of this form and `tokens` rows of x."""
    gpu, size = gpu_of(device), (-(-shape[0] // 16), -(-shape[1] // 128))
    row = measured_plan("mma", gpu.processors, form.codes, shape, 1 if tokens == 1 else 8) if tokens <= 8 else None
    tile = tile_of(form, tokens, size, gpu)
    if row:
        tile = Tile(row["warps"], row["rows"], 1, row["stages"], row["blocks"])
    return plan_for(tile, form, size, tokens, dtype, device)


def plan_for(
    tile: Tile, form: FastForm, size: tuple[int, int], tokens: int, dtype: torch.dtype, device: torch.device
) -> Plan:
    """The launch with a given tile; size = (strips, records per strip). As few slices of K as fit."""
    gpu, (strips, records) = gpu_of(device), size
    clusters, units = gpu.capability >= (9, 0), -(-strips // tile.rows)
    fixed = tile.fixed_bytes(form, gpu.capability[0])
    for splits in (s for s in _SPLITS if s <= records):
        x_bytes, slot_bytes = tile.x_and_slot_bytes(form, -(-records // splits), tokens, dtype)
        slots = (gpu.shared_bytes - fixed - x_bytes) // slot_bytes
        last = 2 * splits > records or (clusters and splits == _MOST_IN_CLUSTER)
        if slots > tile.warps and (x_bytes <= _X_BYTES or last):
            break
    kernel = load_kernel(
        "wna16_mma.cu", "wna16_mma", _PARAMETERS, device, mma_defines(form, dtype, tile), gpu.shared_bytes
    )
    workers = max(1, gpu.processors // splits)
    if tile.blocks == 1 or 2 * units < workers:  # else all: two blocks of the next launch would share an empty place
        workers = min(units, workers)
    per_round = min(-(-units // workers), slots - tile.warps)
    shared = fixed + x_bytes + (per_round + tile.warps) * slot_bytes
    block, cluster = (32 * tile.warps, 1, 1), splits if clusters and splits <= _MOST_IN_CLUSTER else 1
    if cluster > 1:
        workers = min(workers, kernel.clusters_at_once(block, shared, cluster))
    grid = (workers * splits, -(-tokens // (8 * tile.tokens)), 1)
    return Plan(kernel, grid, block, shared, splits, per_round, cluster)


def tile_of(form: FastForm, tokens: int, size: tuple[int, int], gpu: Gpu) -> Tile:
    """The tile for `tokens` rows of x and (strips, records per strip).

    Two strips a warp, unless one fills the processors better by a third. Small matrices take a block of half the
    registers, beside which the next kernel's block can start: o at M=1 on an H200 6.0 us instead of 7.1, qkv 7.5
    instead of 8.2; a long K gains nothing (down: 13.6 instead of 13.2).
    """
    (strips, records), token_tiles = size, 1 if tokens <= 8 else 2
    if gpu.capability < (8, 0):
        return Tile(8, 1, token_tiles, 1, 1)
    if gpu.overlaps_launches and tokens <= 8 and strips <= 4 * gpu.processors and records <= 64:
        return Tile(16, 1, 1, 2 if form.codes == "int8" else 4, 2)

    def filled(rows: int) -> float:
        units = -(-strips // rows)
        return units / (-(-units // gpu.processors) * gpu.processors)

    rows = 1 if form.codes == "int8" or filled(1) > 1.3 * filled(2) else 2
    warps = 16 if gpu.shared_bytes > 128 * 1024 else 8
    return Tile(warps, rows, token_tiles, 2 if rows == 2 or form.codes == "int8" else 4, 1)


def mma_defines(form: FastForm, dtype: torch.dtype, tile: Tile) -> Defines:
    """The defines that compile wna16_mma.cu for a form, a type of activations and a tile."""
    shape = (("WARPS", tile.warps), ("ROW_TILES", tile.rows), ("TOKEN_TILES", tile.tokens), ("STAGES", tile.stages))
    return (*form_defines(form), ("XTYPE", int(dtype == torch.bfloat16)), *shape, ("BLOCKS", tile.blocks))
