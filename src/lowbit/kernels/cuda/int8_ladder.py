"""The int8 ladder: five ways to multiply int8 matrices on an NVIDIA GPU, each with another instruction.

    rung            instruction               since   per instruction (multiply-adds)
    naive           IMAD                      any     1 a lane
    dp4a            dp4a.s32.s32              sm_61   4 a lane
    wmma            wmma.mma.m16n16k16        sm_72   4096 a warp
    mma_m8n8k16     mma.sync.m8n8k16          sm_75   1024 a warp      fragments by ldmatrix
    mma_m16n8k32    mma.sync.m16n8k32         sm_80   4096 a warp      fragments by ldmatrix, copies by cp.async

The .cu files beside this one teach them; docs/int8.md walks up. Above stands wgmma (int8_hopper.py).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.kernels.cuda.compiler import current_stream, load_kernel
from lowbit.kernels.int8 import ROW_BYTES, Scaling

KINDS = {torch.int32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float32: 3}  # int8_epilogue.cuh
EPILOGUE = "PPPPPPiiii"  # the letters of EPILOGUE_PARAMETERS


@dataclass(frozen=True)
class Rung:
    """One kernel: the tile of outputs that a block makes, its threads, and what it asks of the device and of K."""

    name: str
    tile_m: int
    tile_n: int
    threads: tuple[int, int, int]
    least: tuple[int, int]
    multiple: int = ROW_BYTES  # of K, in bytes
    shared_bytes: int = 0
    scales: bool = False  # writes floats too
    flat: bool = False  # a one-dimensional grid

    @property
    def file(self) -> str:
        return f"int8_{self.name}.cu"


RUNGS = (
    Rung("naive", 16, 16, (16, 16, 1), (7, 0), multiple=1),
    Rung("dp4a", 128, 128, (256, 1, 1), (7, 0)),
    Rung("wmma", 128, 128, (256, 1, 1), (7, 2)),
    Rung("mma_m8n8k16", 128, 128, (256, 1, 1), (7, 5), scales=True),
    Rung("mma_m16n8k32", 128, 256, (256, 1, 1), (8, 0), shared_bytes=4 * (128 + 256) * 64, scales=True, flat=True),
)
BY_NAME = {rung.name: rung for rung in RUNGS}


def epilogue_arguments(out: Tensor, scaling: Scaling | None) -> tuple[int, ...]:
    """The values for EPILOGUE_PARAMETERS."""
    if scaling is None:
        return (out.data_ptr(), 0, 0, 0, 0, 0, 0, 0, 0, 0)
    bias = scaling.bias
    return (
        out.data_ptr(),
        scaling.x_scale.data_ptr(),
        0 if scaling.x_zero is None else scaling.x_zero.data_ptr(),
        scaling.w_scale.data_ptr(),
        0 if scaling.w_sum is None else scaling.w_sum.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        int(scaling.x_scale.numel() > 1),
        int(scaling.w_scale.numel() > 1),
        KINDS[scaling.w_scale.dtype],
        0 if bias is None else KINDS[bias.dtype],
    )


def refusal(rung: Rung, device: torch.device) -> str | None:
    """Why `rung` can't run on `device`, or None."""
    if device.type != "cuda":
        return f"x is on {device}, this kernel runs on CUDA devices"
    have = torch.cuda.get_device_capability(device)
    if have < rung.least:
        return f"compute capability is {have[0]}.{have[1]}, this kernel needs {rung.least[0]}.{rung.least[1]}"
    return None


def product(rung: Rung, q: Tensor, codes: Tensor, scaling: Scaling | None = None) -> Tensor:
    """q int8 [M, K] times codes int8 [N, K], transposed: int32 [M, N] where scaling is None, else its floats.

    Both contiguous with K a multiple of rung.multiple (`pad_columns`), on one CUDA device. Only rungs with `scales`
    take a scaling.
    """
    assert scaling is None or rung.scales
    (rows, columns), width = q.shape, codes.shape[0]
    assert columns == codes.shape[1]
    assert columns % rung.multiple == 0
    dtype = torch.int32 if scaling is None else scaling.dtype
    out = torch.empty(rows, width, dtype=dtype, device=q.device)
    pointers = "PP" + (EPILOGUE if rung.scales else "P")
    defines = (("KIND", KINDS[dtype]),) if rung.scales else ()
    kernel = load_kernel(rung.file, f"int8_{rung.name}", f"{pointers}iii", q.device, defines, rung.shared_bytes)
    down, across = -(-rows // rung.tile_m), -(-width // rung.tile_n)
    target = epilogue_arguments(out, scaling) if rung.scales else (out.data_ptr(),)
    kernel.launch(
        (down * across, 1, 1) if rung.flat else (across, down, 1),
        rung.threads,
        (q.data_ptr(), codes.data_ptr(), *target, rows, width, columns),
        rung.shared_bytes,
        current_stream(q.device),
    )
    return out
