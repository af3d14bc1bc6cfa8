"""The W8A8 product for few tokens on Hopper: how int8_wgmma_decode.cu is compiled, chosen and launched.

What is quantized before it, a few rows, by int8_quantize.cu, or inside.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit.kernels.cuda.compiler import current_stream, load_kernel
from lowbit.kernels.cuda.device import gpu_of
from lowbit.kernels.cuda.int8_ladder import KINDS
from lowbit.kernels.cuda.int8_launch import STEP, launch, map_of
from lowbit.kernels.int8 import Quantized, Scaling, padded_columns

TOKEN_TILES = (8, 16, 32, 64, 128)  # sizes of a token tile that int8_wgmma_decode.cu is compiled for
QUANTIZED_COLUMNS = 8192  # of a row in one block of int8_quantize.cu
MOST_COLUMNS = 8 * QUANTIZED_COLUMNS
_SLACK = 1024  # stages start at a multiple of 1024 bytes
_MULTIPROCESSOR_BYTES = 228 * 1024  # shared memory of sm_90
_BLOCK_BYTES = 2048  # of a block beside its stages: 1024 are the system's, columns and barriers


def sent_bytes(rows: int, tokens: int, split: int) -> int:
    """Of the int32 sums that blocks of a cluster send each other, up to 16 tokens; others lie over the stages."""
    return -(-rows * (tokens + 2) * 4 // 1024) * 1024 if split > 1 and tokens <= 16 else 0


@dataclass(frozen=True)
class Decode:
    """How int8_wgmma_decode.cu is compiled: tiles of `tokens` tokens, blocks of `rows` rows of w, K in split parts."""

    tokens: int
    rows: int
    stages: int
    split: int
    quantize: bool = False
    prefetch: int = 0

    def shared_bytes(self, columns: int) -> int:
        """Of one block, for weights of so many columns: stages, sums that are sent, and codes that it makes."""
        steps = -(-columns // (STEP * self.split))
        stages = self.stages * (self.rows + (0 if self.quantize else self.tokens)) * STEP
        behind = sent_bytes(self.rows, self.tokens, self.split) + self.quantize * steps * self.tokens * STEP
        return max(stages + behind, self.tokens * (self.rows + 4) * 4) + _SLACK

    @property
    def defines(self) -> tuple[tuple[str, int], ...]:
        return (
            *(("PREFETCH", self.prefetch), ("QUANTIZE", int(self.quantize)), ("ROWS", self.rows)),
            *(("SPLIT", self.split), ("STAGES", self.stages), ("TOKENS", self.tokens)),
        )


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
    taken = _SLACK + _BLOCK_BYTES + sent_bytes(rows, tile, split)
    fitting = (_MULTIPROCESSOR_BYTES // needed - taken) // ((rows + tile) * STEP)
    return Decode(tile, rows, fitting if needed > 3 and fitting >= 3 else most, split)


def inside(config: Decode, tokens: int, columns: int) -> Decode | None:
    """`config` with x quantized inside the kernel, or None where a kernel of its own is as fast (docs/int8.md).

    Of up to 4 tokens, where K is divided: 4096 x 4096 takes 6.3 and 7.1 us at M = 1 and 4 for 7.8 and 7.9. As many
    stages as let three blocks stand on a multiprocessor, at least 4 (4096 x 4096: 6 are 0.8 us faster than 4).
    """
    if config.split == 1 or tokens > 4:
        return None
    for stages in (6, 5, 4):
        quantizing = replace(config, stages=stages, quantize=True)
        if 3 * (quantizing.shared_bytes(columns) + _BLOCK_BYTES) <= _MULTIPROCESSOR_BYTES:
            return quantizing
    return None


def decode(q: Tensor, codes: Tensor, scaling: Scaling | None = None, config: Decode | None = None) -> Tensor:
    """q int8 [M, K] times codes int8 [N, K], transposed: int32 [M, N], or the floats of scaling."""
    (rows, columns), width = q.shape, codes.shape[0]
    config = config or choose(rows, width, columns, gpu_of(q.device).processors)
    blocks = -(-width // config.rows) * config.split
    dtype = torch.int32 if scaling is None else scaling.dtype
    out = torch.empty(rows, width, dtype=dtype, device=q.device)
    maps = map_of(q, config.tokens), map_of(codes, config.rows)
    kernel = "int8_wgmma_decode", config.defines, config.shared_bytes(columns)
    size = (blocks, -(-rows // config.tokens), 1), config.rows * 2 + 32
    launch(kernel, maps, (q, codes, scaling), out, size, ("Pi", 0, 0))
    return out


def decode_quantizing(x: Tensor, codes: Tensor, w_scale: Tensor, bias: Tensor | None, config: Decode) -> Tensor:
    """x [M, K] quantized per token, times codes int8 [N, K], transposed, scaled, plus bias [N]: [M, N] in x's dtype.

    x is one of those that `takes_floats` allows; config quantizes.
    """
    (rows, columns), width = x.shape, codes.shape[0]
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    kernel = "int8_wgmma_decode", config.defines, config.shared_bytes(columns)
    size = (-(-width // config.rows) * config.split, -(-rows // config.tokens), 1), config.rows * 2 + 32
    maps = bytes(128), map_of(codes, config.rows)
    scaling = Scaling(x.dtype, w_scale, w_scale, bias=bias)  # of x's scale the kernel makes its own
    launch(kernel, maps, (x, codes, scaling), out, size, ("Pi", x.data_ptr(), x.stride(0)))
    return out


def quantize_rows(x: Tensor) -> Quantized:
    """x [M, K] symmetric per token, a cluster of blocks a row (int8_quantize.cu): for few tokens.

    x is one of those that `takes_floats` allows, K at most 65536.
    """
    rows, columns = x.shape
    q = torch.empty(rows, padded_columns(columns), dtype=torch.int8, device=x.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    split = 1
    while split * QUANTIZED_COLUMNS < columns:
        split *= 2
    defines = (("KIND", KINDS[x.dtype]), ("SPLIT", split))
    loaded = load_kernel("int8_quantize.cu", "int8_quantize", "PPPiii", x.device, defines)
    loaded.launch(
        (rows * split, 1, 1), (256, 1, 1),
        (x.data_ptr(), q.data_ptr(), scale.data_ptr(), x.stride(0), columns, q.shape[1]),
        0, current_stream(x.device), early=True,
    )  # fmt: skip
    return Quantized(q, scale)
