"""The W8A8 product for few tokens on Hopper: how int8_wgmma_decode.cu is compiled, chosen and launched."""

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

    Up to 64 tokens small blocks, some 200 of them: K is divided until there are as many. Where four and more stand on a
    multiprocessor, as many stages as just let all run at once: with more some wait (gate_up at M=64: 35.4 us with 3,
    41.5 with 4), with fewer they crowd (M=16: 32.5 with 5, 32.5 and 34.9 with 4 in two runs, 35.1 with 3). Above 64
    tokens, blocks of 128 x 128 outputs, one a multiprocessor. Measured on H200
    (bench/results/int8_decode_sweeps.json): 64 rows and 4 stages win or tie for every shape of Llama-3-8B; o (4096 x
    4096) at M=1 takes 6.4 us divided by 4, 7.1 by 2, 8.9 undivided, 9.4 by 8.
    """
    tile = next((size for size in TOKEN_TILES if tokens <= size), TOKEN_TILES[-1])
    rows = 64 if tile <= 64 else 128
    blocks = -(-width // rows) * -(-tokens // tile)
    enough = processors * 3 // 2 if tile < 64 else processors * 7 // 5 if tile == 64 else processors // 2 + 1
    split = 1
    while split < 8 and blocks * split < enough and columns >= split * 4 * STEP:
        split *= 2
    if tile > 64:
        return Decode(tile, rows, 4 if blocks * split <= processors else 3, split)
    most, needed = 6 if tile <= 8 else 4, -(-blocks * split // processors)  # blocks a multiprocessor
    fitting = (_MULTIPROCESSOR_BYTES // needed - _SLACK - _BLOCK_BYTES) // ((rows + tile) * STEP)
    return Decode(tile, rows, fitting if needed > 3 and fitting >= 3 else most, split)


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
