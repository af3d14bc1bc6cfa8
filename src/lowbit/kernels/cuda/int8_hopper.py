"""The W8A8 product on Hopper: int8_prefill.py for many tokens, int8_decode.py for few, and who takes what."""

from typing import Any

import torch
from torch import Tensor

from lowbit.kernels.cuda.device import gpu_of
from lowbit.kernels.cuda.int8_decode import MOST_COLUMNS, choose, decode, decode_quantizing, inside, quantize_rows
from lowbit.kernels.cuda.int8_prefill import MOST_TOKENS, prefill, prefill_quantizing
from lowbit.kernels.int8 import Scaling
from lowbit.optional import late

# From here the prefill kernel quantizes x itself (4096 x 14336: 328 us for 338 at M=4096, 644 for 686 at 8192). Of
# fewer tokens all rows are among the first, and nothing overlaps (8192 x 8192 at M=1024: 100 us for 94).
MANY_TOKENS = 2048
FEW_TOKENS = 128  # always by the decode kernel; and their rows are quantized by small blocks


def refusal(q: Tensor) -> str | None:
    """Why these kernels can't run on q's device, or None."""
    if q.device.type != "cuda":
        return f"x is on {q.device}, this kernel runs on CUDA devices"
    have = torch.cuda.get_device_capability(q.device)
    if have != (9, 0):
        return f"compute capability is {have[0]}.{have[1]}, wgmma exists on 9.0 alone"
    return None


def takes_floats(x: Tensor) -> bool:
    """Whether the kernels that quantize x [M, K] themselves can read it: 16-bit floats in rows of whole 16 bytes."""
    return (
        x.shape[0] <= MOST_TOKENS
        and x.shape[1] <= MOST_COLUMNS
        and x.dtype in (torch.float16, torch.bfloat16)
        and x.stride(1) == 1
        and x.shape[1] % 16 == 0
        and x.stride(0) % 8 == 0
        and x.data_ptr() % 16 == 0
    )


def suits_decode(tokens: int, width: int, processors: int) -> bool:
    """Whether the decode kernel is faster: always up to 128 tokens, above while its tiles fit the chip at once."""
    return tokens <= FEW_TOKENS or -(-tokens // 128) * -(-width // 128) <= processors


def product(q: Tensor, codes: Tensor, scaling: Scaling | None = None) -> Tensor:
    """q int8 [M, K] times codes int8 [N, K], transposed, by the kernel that suits M; rows padded (kernels/int8.py)."""
    if suits_decode(q.shape[0], codes.shape[0], gpu_of(q.device).processors):
        return decode(q, codes, scaling)
    return prefill(q, codes, scaling)


def linear(x: Tensor, codes: Tensor, w_scale: Tensor, bias: Tensor | None) -> Tensor:
    """x [M, K] quantized per token, symmetric, times codes int8 [N, K], transposed, scaled, plus bias: [M, N] like x.

    x is one of those that `takes_floats` allows. Quantized by the product's own kernel where that pays.
    """
    (tokens, columns), width, processors = x.shape, len(codes), gpu_of(x.device).processors
    few = suits_decode(tokens, width, processors)
    if not few and tokens >= MANY_TOKENS:
        return prefill_quantizing(x, codes, w_scale, bias)
    config = choose(tokens, width, columns, processors)
    if few and (quantizing := inside(config, tokens, columns)) is not None:
        return decode_quantizing(x, codes, w_scale, bias, quantizing)
    rows: Any = late("lowbit.kernels.triton.int8_quantize")
    made = quantize_rows(x) if tokens <= FEW_TOKENS else rows.quantize_rows(x)
    scaling = Scaling(x.dtype, made.scale, w_scale, bias=bias)
    return decode(made.q, codes, scaling, config) if few else prefill(made.q, codes, scaling)
