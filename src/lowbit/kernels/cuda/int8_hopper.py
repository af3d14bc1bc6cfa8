"""The W8A8 product on Hopper: int8_wgmma.cu for many tokens, int8_wgmma_decode.cu for few, and who takes what.

Both read x and w through tensor maps (tensor_map.py).
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lowbit.kernels.cuda.compiler import current_stream, load_kernel
from lowbit.kernels.cuda.int8_ladder import EPILOGUE, KINDS, epilogue_arguments
from lowbit.kernels.cuda.tensor_map import tensor_map
from lowbit.kernels.int8 import Scaling

STEP = 128  # bytes along K in one box
TILE_M, TILE_N, STAGES = 128, 256, 4  # of int8_wgmma.cu
DECODE_TOKENS = (8, 16, 32, 64, 128)  # sizes of a token tile that int8_wgmma_decode.cu is compiled for
_SLACK = 1024  # stages start at a multiple of 1024 bytes


@dataclass(frozen=True)
class Decode:
    """How int8_wgmma_decode.cu is compiled: tiles of `tokens` tokens, blocks of `rows` rows of w, K in split parts."""

    tokens: int
    rows: int
    stages: int
    split: int

    @property
    def shared_bytes(self) -> int:
        """Of one block: the stages, over which the int32 sums come to lie."""
        return max(self.stages * (self.rows + self.tokens) * STEP, self.tokens * (self.rows + 4) * 4) + _SLACK

    @property
    def defines(self) -> tuple[tuple[str, int], ...]:
        return (("ROWS", self.rows), ("SPLIT", self.split), ("STAGES", self.stages), ("TOKENS", self.tokens))


def refusal(q: Tensor) -> str | None:
    """Why these kernels can't run on q's device, or None."""
    if q.device.type != "cuda":
        return f"x is on {q.device}, this kernel runs on CUDA devices"
    have = torch.cuda.get_device_capability(q.device)
    if have != (9, 0):
        return f"compute capability is {have[0]}.{have[1]}, wgmma exists on 9.0 alone"
    return None


def choose(tokens: int, width: int, columns: int, processors: int) -> Decode:
    """The decode kernel for `tokens` tokens and w [width, columns], on a chip with so many multiprocessors.

    Up to 64 tokens small blocks, some 200 of them: K is divided until there are as many. Above, blocks of 128 x 128
    outputs, one a multiprocessor. Measured on H200 (bench/results/int8_decode_sweeps.json): 64 rows and 4 stages win or
    tie for every shape of Llama-3-8B; o (4096 x 4096) at M=1 takes 6.4 us divided by 4, 7.1 by 2, 8.9 undivided, 9.4
    by 8.
    """
    tile = next((size for size in DECODE_TOKENS if tokens <= size), DECODE_TOKENS[-1])
    rows = 64 if tile <= 64 else 128
    blocks = -(-width // rows) * -(-tokens // tile)
    enough = processors * 3 // 2 if tile <= 64 else processors // 2 + 1
    split = 1
    while split < 8 and blocks * split < enough and columns >= split * 4 * STEP:
        split *= 2
    stages = 6 if tile <= 8 else 4 if tile <= 64 or blocks * split <= processors else 3
    return Decode(tile, rows, stages, split)


def suits_decode(tokens: int, width: int, processors: int) -> bool:
    """Whether the decode kernel is faster: always up to 128 tokens, above while its tiles fit the chip at once."""
    return tokens <= 128 or -(-tokens // 128) * -(-width // 128) <= processors


def decode(q: Tensor, codes: Tensor, scaling: Scaling | None = None, config: Decode | None = None) -> Tensor:
    """q int8 [M, K] times codes int8 [N, K], transposed: int32 [M, N], or the floats of scaling."""
    (rows, columns), width = q.shape, codes.shape[0]
    config = config or choose(rows, width, columns, _processors(q.device))
    blocks = -(-width // config.rows) * config.split
    maps = _map(q, config.tokens), _map(codes, config.rows)
    return _launch(
        ("int8_wgmma_decode", config.defines, config.shared_bytes), maps, (q, codes, scaling),
        (blocks, -(-rows // config.tokens), 1), config.rows * 2 + 32,
    )  # fmt: skip


def prefill(q: Tensor, codes: Tensor, scaling: Scaling | None = None) -> Tensor:
    """q int8 [M, K] times codes int8 [N, K], transposed: int32 [M, N], or the floats of scaling."""
    pairs, across = -(-q.shape[0] // (2 * TILE_M)), -(-codes.shape[0] // TILE_N)
    clusters = min(pairs * across, _processors(q.device) // 2)
    maps = _map(q, TILE_M), _map(codes, TILE_N // 2)
    return _launch(
        ("int8_wgmma", (), STAGES * (TILE_M + TILE_N) * STEP + _SLACK), maps, (q, codes, scaling),
        (clusters * 2, 1, 1), 384,
    )  # fmt: skip


def product(q: Tensor, codes: Tensor, scaling: Scaling | None = None) -> Tensor:
    """q int8 [M, K] times codes int8 [N, K], transposed, by the kernel that suits M; rows padded (kernels/int8.py)."""
    if suits_decode(q.shape[0], codes.shape[0], _processors(q.device)):
        return decode(q, codes, scaling)
    return prefill(q, codes, scaling)


def _launch(
    kernel: tuple[str, tuple[tuple[str, int], ...], int],
    maps: tuple[bytes, bytes],
    operands: tuple[Tensor, Tensor, Scaling | None],
    grid: tuple[int, int, int],
    threads: int,
) -> Tensor:
    (stem, defines, shared_bytes), (q, codes, scaling) = kernel, operands
    dtype = torch.int32 if scaling is None else scaling.dtype
    (rows, columns), width = q.shape, codes.shape[0]
    out = torch.empty(rows, width, dtype=dtype, device=q.device)
    defines = (("KIND", KINDS[dtype]), *defines)
    loaded = load_kernel(f"{stem}.cu", stem, f"128s128s{EPILOGUE}iii", q.device, defines, shared_bytes)
    loaded.launch(
        grid, (threads, 1, 1), (*maps, *epilogue_arguments(out, scaling), rows, width, columns), shared_bytes,
        current_stream(q.device), early=True,
    )  # fmt: skip
    return out


@lru_cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _map(matrix: Tensor, box_rows: int) -> bytes:
    return tensor_map(matrix.data_ptr(), *matrix.shape, box_rows)
