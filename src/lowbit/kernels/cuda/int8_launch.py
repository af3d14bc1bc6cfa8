"""What the launchers of the int8 wgmma kernels share: tensor maps, the epilogue's parameters, early starts.

x and w are read through tensor maps (tensor_map.py): boxes of STEP bytes of a row.
"""

from torch import Tensor

from lowbit.kernels.cuda.compiler import current_stream, load_kernel
from lowbit.kernels.cuda.int8_ladder import EPILOGUE, KINDS, epilogue_arguments
from lowbit.kernels.cuda.tensor_map import tensor_map
from lowbit.kernels.int8 import Scaling

STEP = 128  # bytes along K in one box


def launch(
    kernel: tuple[str, tuple[tuple[str, int], ...], int],
    maps: tuple[bytes, ...],
    operands: tuple[Tensor, Tensor, Scaling | None],
    out: Tensor,
    size: tuple[tuple[int, int, int], int],
    more: tuple[str, *tuple[int, ...]] = ("",),
) -> None:
    """kernel: file, defines, shared bytes. size: the grid, threads of a block. more: layout and values of parameters
    behind the others.
    """
    (stem, defines, shared_bytes), (q, codes, scaling), (grid, threads) = kernel, operands, size
    defines = (("KIND", KINDS[out.dtype]), *defines)
    parameters = "128s" * len(maps) + EPILOGUE + "iii" + more[0]
    loaded = load_kernel(f"{stem}.cu", stem, parameters, q.device, defines, shared_bytes)
    loaded.launch(
        grid, (threads, 1, 1), (*maps, *epilogue_arguments(out, scaling), len(q), *codes.shape, *more[1:]),
        shared_bytes, current_stream(q.device), early=True,
    )  # fmt: skip


def map_of(matrix: Tensor, box_rows: int) -> bytes:
    """The tensor map of int8 codes: boxes of so many rows."""
    return tensor_map(matrix.data_ptr(), *matrix.shape, box_rows)
