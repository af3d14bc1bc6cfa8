"""The W8A8 product for few tokens on Hopper: how int8_wgmma_decode.cu is compiled, chosen and launched."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.kernels.cuda.device import gpu_of
from lowbit.kernels.cuda.int8_launch import STEP, launch, map_of
from lowbit.kernels.int8 import Scaling

TOKEN_TILES = (8, 16, 32, 64, 128)  # sizes of a token tile that int8_wgmma_decode.cu is compiled for
_SLACK = 1024  # stages start at a multiple of 1024 bytes
_MULTIPROCESSOR_BYTES = 228 * 1024  # shared memory of sm_90
_BLOCK_BYTES = 2048  # of a block beside its stages: 1024 are the system's, columns and barriers


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


def choose(tokens: int, width: int, columns: int, processors: int) -> Decode:
    """The decode kernel for `tokens` tokens and w [width, columns], on a chip with so many multiprocessors.

    Above 64 tokens blocks of 128 x 128 outputs, one a multiprocessor. Else K is divided until there are some 200 blocks
    of 64 rows, of rows not too long 400 where a tile has 8 tokens (4096 x 4096 at M=1: 7.5 us divided by 8, 7.9 by 4).
    """
    tile = next((size for size in TOKEN_TILES if tokens <= size), TOKEN_TILES[-1])
    rows = 64 if tile <= 64 else 128
    blocks = -(-width // rows) * -(-tokens // tile)
    enough = {8: 3 if columns <= 16384 else 1.5, 64: 1.4, 128: 0.5}.get(tile, 1.5) * processors
    split = 1
    while split < 8 and blocks * split < enough and columns >= split * 4 * STEP:
        split *= 2
    if tile > 64:
        return Decode(tile, rows, 4 if blocks * split <= processors else 3, split)
    return Decode(tile, rows, choose_stages(tile, blocks * split, columns // (split * STEP), processors), split)


def choose_stages(tile: int, blocks: int, steps: int, processors: int) -> int:
    """Stages of blocks of 64 rows that take so many steps each.

    A multiprocessor shall have room for its share of the blocks and not for more: where a block is long, more on one
    than on another cost more than they hide (8192 x 28672 at M=64: 71 us for two a multiprocessor, 83 where three fit).
    Of short blocks a fifth more fit, so that those of the next kernel can ask for their weights early (4096 x 4096 at
    M=16: 7.7 us where three fit for two, 11.5 where two do). bench/results/int8_decode_forms.json
    """
    is_long = steps >= 32
    a_processor = math.ceil(blocks * (1 if is_long else 1.2) / processors)
    fitting = (_MULTIPROCESSOR_BYTES // a_processor - _SLACK - _BLOCK_BYTES) // ((64 + tile) * STEP)
    return min(fitting, 8 if is_long and tile > 8 else 6) if fitting >= 3 else 3 if tile == 64 else 4


def decode(q: Tensor, codes: Tensor, scaling: Scaling | None = None, config: Decode | None = None) -> Tensor:
    """q int8 [M, K] times codes int8 [N, K], transposed: int32 [M, N], or the floats of scaling."""
    (rows, columns), width = q.shape, codes.shape[0]
    config = config or choose(rows, width, columns, gpu_of(q.device).processors)
    blocks = -(-width // config.rows) * config.split
    dtype = torch.int32 if scaling is None else scaling.dtype
    out = torch.empty(rows, width, dtype=dtype, device=q.device)
    maps = map_of(q, config.tokens), map_of(codes, config.rows)
    kernel = "int8_wgmma_decode", config.defines, config.shared_bytes
    size = (blocks, -(-rows // config.tokens), 1), config.rows * 2 + 32
    launch(kernel, maps, (q, codes, scaling), out, size)
    return out
