"""Launches of wna16_wgmma.cu: 9 to some hundred tokens on sm_90."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lowbit.kernels.cuda.compiler import Kernel, current_stream, load_kernel
from lowbit.kernels.cuda.device import gpu_of, gpu_refusal, on_device_of
from lowbit.kernels.cuda.wna16_layout import Defines, fast, form_defines
from lowbit.kernels.cuda.wna16_mma import add_partial_sums
from lowbit.kernels.layout import FastForm, FastWeight, form_refusal
from lowbit.tensors import PackedWeight

WARPS, UNIT_ROWS = 16, 256
_STEP_US, _START_US, _SUM_US = 0.45, 3.0, 3.0  # H200: 128 columns of a unit; a block's start and end; the sum kernel
_SUM_BYTES_PER_US = 3e6  # partial sums written and read again, mostly in the L2


@dataclass(frozen=True)
class Plan:
    """One launch: the kernel, its grid (x: units times slices of K, y: token tiles), its shared memory."""

    kernel: Kernel
    grid: tuple[int, int, int]
    shared_bytes: int
    splits: int


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
    """x [M, K] times the weight [N, K], transposed, + bias [N]: [M, N] in x's dtype; float32 sums, deterministic."""
    return on_device_of(x, lambda: _linear(x.contiguous(), fast(weight), weight.shape, bias))


def _linear(x: Tensor, weight: FastWeight, shape: tuple[int, int], bias: Tensor | None) -> Tensor:
    tokens, (rows, columns) = x.shape[0], shape
    y = x.new_empty(tokens, rows)
    if tokens == 0:
        return y
    bias = None if bias is None else bias.to(x.dtype)
    plan = plan_of(weight.form, shape, tokens, x.dtype, x.device)
    partial = x.new_empty(plan.splits * tokens * rows, dtype=torch.float32) if plan.splits > 1 else None
    levels = weight.levels[x.dtype].data_ptr() if weight.levels is not None else 0
    tensors = (weight.records.data_ptr(), x.data_ptr(), levels, weight.factor.data_ptr())
    results = (0 if bias is None else bias.data_ptr(), y.data_ptr(), 0 if partial is None else partial.data_ptr())
    arguments = (*tensors, *results, tokens, rows, columns, plan.splits)
    plan.kernel.launch(plan.grid, (32 * WARPS, 1, 1), arguments, plan.shared_bytes, current_stream(x.device), True)
    if partial is not None:
        add_partial_sums(partial, weight, bias, y, plan.splits)
    return y


@cache
def plan_of(form: FastForm, shape: tuple[int, int], tokens: int, dtype: torch.dtype, device: torch.device) -> Plan:
    """The launch for a weight [N, K] of this form and `tokens` rows of x."""
    gpu, tile = gpu_of(device), tile_tokens(tokens)
    units, token_tiles, records = -(-shape[0] // UNIT_ROWS), -(-tokens // tile), -(-shape[1] // 128)

    def cost_us(splits: int) -> float:
        waves = -(-units * token_tiles * splits // gpu.processors)
        added = _SUM_US + splits * tokens * shape[0] * 8 / _SUM_BYTES_PER_US if splits > 1 else 0
        return waves * (-(-records // splits) * _STEP_US + _START_US) + added

    splits = min(range(1, min(records, 16) + 1), key=cost_us)
    defines, shared = wgmma_defines(form, dtype, tile), shared_bytes(form, tile)
    kernel = load_kernel("wna16_wgmma.cu", "wna16_wgmma", "PPPPPPPiiii", device, defines, shared)
    return Plan(kernel, (units * splits, token_tiles, 1), shared, splits)


def tile_tokens(tokens: int) -> int:
    """Tokens of a block's tile."""
    return 16 if tokens <= 16 else 32 if tokens <= 32 else 64


def stages_of(form: FastForm) -> tuple[int, int]:
    """(records, tiles of x) in flight: records of 8-bit codes are twice as large."""
    return (3 if form.codes == "int8" else 4), 4


def shared_bytes(form: FastForm, tile: int) -> int:
    """Shared memory as wna16_wgmma.cu lays it out: x, records, barriers, table; and y in the place of x at the end."""
    records, x_tiles = stages_of(form)
    ring = WARPS * records * (form.record_bytes + 8)
    return max(x_tiles * tile * 256, tile * (UNIT_ROWS + 8) * 2) + ring + 2048


def wgmma_defines(form: FastForm, dtype: torch.dtype, tile: int) -> Defines:
    """The defines that compile wna16_wgmma.cu."""
    records, x_tiles = stages_of(form)
    stages = (("TOKENS", tile), ("WEIGHT_STAGES", records), ("X_STAGES", x_tiles))
    return (*form_defines(form), ("XTYPE", int(dtype == torch.bfloat16)), *stages)
