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
from lowbit.kernels.int8 import Quantized, Scaling, padded_columns

STEP = 128  # bytes along K in one box
TILE_M, STAGES = 128, 4  # of int8_wgmma.cu
MOST_TOKENS = 131072  # that prefill_quantizing counts
DECODE_TOKENS = (8, 16, 32, 64, 128)  # sizes of a token tile that int8_wgmma_decode.cu is compiled for
QUANTIZED_COLUMNS = 8192  # of a row in one block of int8_quantize.cu
_SLACK = 1024  # stages start at a multiple of 1024 bytes
_MULTIPROCESSOR_BYTES = 228 * 1024  # shared memory of sm_90
_BLOCK_BYTES = 2048  # of a decode block beside its stages: 1024 are the system's, columns and barriers


def sum_bytes(rows: int, tokens: int) -> int:
    """Of the int32 sums of a decode block, padded to where stages and codes may start."""
    return -(-rows * (tokens + 2) * 4 // 1024) * 1024


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
        """Of one block, for weights of so many columns: stages, the int32 sums of all, and codes that it makes."""
        sums = sum_bytes(self.rows, self.tokens)
        steps = -(-columns // (STEP * self.split))
        stages = self.stages * (self.rows + (0 if self.quantize else self.tokens)) * STEP
        stages = max(stages, sums) if self.split == 1 else stages + sums  # undivided, sums lie over the stages
        return stages + (steps * self.tokens * STEP if self.quantize else 0) + _SLACK

    @property
    def defines(self) -> tuple[tuple[str, int], ...]:
        return (
            *(("PREFETCH", self.prefetch), ("QUANTIZE", int(self.quantize)), ("ROWS", self.rows)),
            *(("SPLIT", self.split), ("STAGES", self.stages), ("TOKENS", self.tokens)),
        )


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

    Up to 64 tokens small blocks, some 200 of them: K is divided until there are as many. Where four and more stand on a
    multiprocessor, as many stages as just let all run at once: with more some wait (gate_up at M=64: 35.4 us with 3,
    41.5 with 4), with fewer they crowd (M=16: 32.5 with 5, 32.5 and 34.9 with 4 in two runs, 35.1 with 3). Above 64
    tokens, blocks of 128 x 128 outputs, one a multiprocessor. Measured on H200
    (bench/results/int8_decode_sweeps.json): 64 rows and 4 stages win or tie for every shape of Llama-3-8B; o (4096 x
    4096) at M=1 takes 6.4 us divided by 4, 7.1 by 2, 8.9 undivided, 9.4 by 8.
    """
    tile = next((size for size in DECODE_TOKENS if tokens <= size), DECODE_TOKENS[-1])
    rows = 64 if tile <= 64 else 128
    blocks = -(-width // rows) * -(-tokens // tile)
    enough = processors * 3 // 2 if tile < 64 else processors * 7 // 5 if tile == 64 else processors // 2 + 1
    split = 1
    while split < 8 and blocks * split < enough and columns >= split * 4 * STEP:
        split *= 2
    if tile > 64:
        return Decode(tile, rows, 4 if blocks * split <= processors else 3, split)
    most, needed = 6 if tile <= 8 else 4, -(-blocks * split // processors)  # blocks a multiprocessor
    taken = _SLACK + _BLOCK_BYTES + (sum_bytes(rows, tile) if split > 1 else 0)
    fitting = (_MULTIPROCESSOR_BYTES // needed - taken) // ((rows + tile) * STEP)
    return Decode(tile, rows, fitting if needed > 3 and fitting >= 3 else most, split)


def suits_decode(tokens: int, width: int, processors: int) -> bool:
    """Whether the decode kernel is faster: always up to 128 tokens, above while its tiles fit the chip at once."""
    return tokens <= 128 or -(-tokens // 128) * -(-width // 128) <= processors


def decode(q: Tensor, codes: Tensor, scaling: Scaling | None = None, config: Decode | None = None) -> Tensor:
    """q int8 [M, K] times codes int8 [N, K], transposed: int32 [M, N], or the floats of scaling."""
    (rows, columns), width = q.shape, codes.shape[0]
    config = config or choose(rows, width, columns, _processors(q.device))
    blocks = -(-width // config.rows) * config.split
    dtype = torch.int32 if scaling is None else scaling.dtype
    out = torch.empty(rows, width, dtype=dtype, device=q.device)
    maps = _map(q, config.tokens), _map(codes, config.rows)
    kernel = "int8_wgmma_decode", config.defines, config.shared_bytes(columns)
    size = (blocks, -(-rows // config.tokens), 1), config.rows * 2 + 32
    _launch(kernel, maps, (q, codes, scaling), out, size, ("Pi", 0, 0))
    return out


def decode_quantizing(x: Tensor, codes: Tensor, w_scale: Tensor, bias: Tensor | None, config: Decode) -> Tensor:
    """x [M, K] quantized per token, times codes int8 [N, K], transposed, scaled, plus bias [N]: [M, N] in x's dtype.

    x is one of those that `takes_floats` allows; config quantizes.
    """
    (rows, columns), width = x.shape, codes.shape[0]
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    kernel = "int8_wgmma_decode", config.defines, config.shared_bytes(columns)
    size = (-(-width // config.rows) * config.split, -(-rows // config.tokens), 1), config.rows * 2 + 32
    maps = bytes(128), _map(codes, config.rows)
    scaling = Scaling(x.dtype, w_scale, w_scale, bias=bias)  # of x's scale the kernel makes its own
    _launch(kernel, maps, (x, codes, scaling), out, size, ("Pi", x.data_ptr(), x.stride(0)))
    return out


def takes_floats(x: Tensor) -> bool:
    """Whether the kernels that quantize x [M, K] themselves can read it: 16-bit floats in rows of whole 16 bytes."""
    return (
        x.dtype in (torch.float16, torch.bfloat16)
        and x.stride(1) == 1
        and x.shape[1] % 16 == 0
        and x.stride(0) % 8 == 0
        and x.data_ptr() % 16 == 0
    )


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


def choose_columns(tokens: int, width: int, processors: int) -> int:
    """Columns of the prefill kernel's tiles: 256, or 192 where these fill the chip's last round so much better that a
    tenth of the time is saved (6144 columns, 1024 tokens: 42.2 us for 51.9).
    """
    pairs, clusters = -(-tokens // (2 * TILE_M)), processors // 2

    def cost(columns: int) -> int:
        return -(-pairs * -(-width // columns) // clusters) * columns

    return 192 if cost(192) < 0.9 * cost(256) else 256


def prefill_bytes(tile_n: int) -> int:
    """Shared memory of a prefill block: stages, three numbers a column for either warpgroup, barriers."""
    return STAGES * (TILE_M + tile_n) * STEP + 2 * 3 * tile_n * 4 + 2 * STAGES * 8


def prefill(q: Tensor, codes: Tensor, scaling: Scaling | None = None, tile_n: int | None = None) -> Tensor:
    """q int8 [M, K] times codes int8 [N, K], transposed: int32 [M, N], or the floats of scaling."""
    dtype = torch.int32 if scaling is None else scaling.dtype
    out = torch.empty(len(q), len(codes), dtype=dtype, device=q.device)
    tile_n = tile_n or choose_columns(len(q), len(codes), _processors(q.device))
    _launch_prefill(q, codes, scaling, out, (("TILE_N", tile_n),), ("PiPP", 0, 0, 0, 0))
    return out


def prefill_quantizing(
    x: Tensor, codes: Tensor, w_scale: Tensor, bias: Tensor | None, rows_first: int | None = None
) -> Tensor:
    """x [M, K] quantized per token, times codes int8 [N, K], transposed, scaled, plus bias [N]: [M, N] in x's dtype.

    x is one of those that `takes_floats` allows. rows_first: quantized before the first product, in units of 256; the
    others meanwhile.
    """
    tokens, columns = x.shape
    out = torch.empty(tokens, len(codes), dtype=x.dtype, device=x.device)
    q = torch.empty(tokens, columns, dtype=torch.int8, device=x.device)
    scaling = Scaling(x.dtype, torch.empty(tokens, dtype=torch.float32, device=x.device), w_scale, bias=bias)
    processors = _processors(x.device)
    tile_n = choose_columns(tokens, len(codes), processors)
    group = rows_first or choose_first(tokens, -(-len(codes) // tile_n), processors)
    warps = 1 if columns <= 4096 else 2 if columns <= 8192 else 4
    defines = (("GROUP", group), ("QUANTIZE", 1), ("TILE_N", tile_n), ("WARPS", warps))
    counters = _counters(x.device).address(current_stream(x.device))
    more = "PiPP", x.data_ptr(), x.stride(0), q.data_ptr(), counters
    _launch_prefill(q, codes, scaling, out, defines, more)
    return out


def choose_first(tokens: int, wide: int, processors: int) -> int:
    """Units of 256 rows to quantize before the first product, which are also those that stay in the L2 together: as few
    as fill the chip.
    """
    return min(-(-processors // 2 // wide), 8, -(-tokens // (2 * TILE_M)))


class _Counters:
    """For each stream zeros, which a launch leaves as zeros (int8_rows.cuh): the launches of one follow each other.

    All are made at once, by the first launch of a process: within a graph's capture nothing would make them zero.
    """

    STREAMS = 64

    def __init__(self, device: torch.device) -> None:
        self.values = torch.zeros(self.STREAMS, 16 + MOST_TOKENS // TILE_M, dtype=torch.int32, device=device)
        self.rows: dict[int, int] = {}

    def address(self, stream: int) -> int:
        row = self.rows.setdefault(stream, len(self.rows) % self.STREAMS)
        return self.values.data_ptr() + row * self.values.stride(0) * 4


_counters = lru_cache(_Counters)


def _launch_prefill(
    q: Tensor, codes: Tensor, scaling: Scaling | None, out: Tensor, defines: tuple[tuple[str, int], ...],
    more: tuple[str, *tuple[int, ...]],
) -> None:  # fmt: skip
    tile_n = dict(defines)["TILE_N"]
    tiles = -(-len(q) // (2 * TILE_M)) * -(-len(codes) // tile_n)
    defines = (("ALIGNED", int(out.shape[1] * out.itemsize % 16 == 0)), *defines)
    kernel = "int8_wgmma", defines, prefill_bytes(tile_n)
    size = (min(tiles, _processors(q.device) // 2) * 2, 1, 1), 384
    _launch(kernel, (_map(q, TILE_M), _map(codes, tile_n // 2)), (q, codes, scaling), out, size, more)


def product(q: Tensor, codes: Tensor, scaling: Scaling | None = None) -> Tensor:
    """q int8 [M, K] times codes int8 [N, K], transposed, by the kernel that suits M; rows padded (kernels/int8.py)."""
    if suits_decode(q.shape[0], codes.shape[0], _processors(q.device)):
        return decode(q, codes, scaling)
    return prefill(q, codes, scaling)


def _launch(
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


@lru_cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _map(matrix: Tensor, box_rows: int) -> bytes:
    return tensor_map(matrix.data_ptr(), *matrix.shape, box_rows)
