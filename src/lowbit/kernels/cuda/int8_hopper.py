"""The W8A8 product on Hopper: int8_prefill.py for many tokens, int8_decode.py for few, and who takes what."""

import torch
from torch import Tensor

from lowbit.kernels.cuda.device import gpu_of
from lowbit.kernels.cuda.int8_decode import decode
from lowbit.kernels.cuda.int8_prefill import MOST_TOKENS, prefill
from lowbit.kernels.int8 import Scaling

# From here on, and of rows longer than LONG_ROW from half as many, the prefill that quantizes x itself is faster
# (bench/results/int8_quantize_within.json: 8192 x 28672 at M=1024 332 us for 353, but 4096 x 4096 35 for 30).
MANY_TOKENS, LONG_ROW = 2048, 8192


def refusal(q: Tensor) -> str | None:
    """Why these kernels can't run on q's device, or None."""
    if q.device.type != "cuda":
        return f"x is on {q.device}, this kernel runs on CUDA devices"
    have = torch.cuda.get_device_capability(q.device)
    if have != (9, 0):
        return f"compute capability is {have[0]}.{have[1]}, wgmma exists on 9.0 alone"
    return None


def quantizes(x: Tensor, width: int) -> bool:
    """Whether `prefill_quantizing` should multiply x [M, K] by a weight of so many rows: many tokens, 16-bit floats in
    rows of whole 16 bytes.
    """
    tokens, columns = x.shape
    many = (MANY_TOKENS // 2 if columns > LONG_ROW else MANY_TOKENS) <= tokens <= MOST_TOKENS
    return many and not suits_decode(tokens, width, gpu_of(x.device).processors) and takes_floats(x)


def takes_floats(x: Tensor) -> bool:
    """Whether the copy of x [M, K] that a kernel reads by itself can go 16 bytes at a time."""
    whole = x.shape[1] % 16 == 0 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
    return x.dtype in (torch.float16, torch.bfloat16) and x.stride(1) == 1 and whole


def suits_decode(tokens: int, width: int, processors: int) -> bool:
    """Whether the decode kernel is faster: always up to 128 tokens, above while its tiles fit the chip at once."""
    return tokens <= 128 or -(-tokens // 128) * -(-width // 128) <= processors


def product(q: Tensor, codes: Tensor, scaling: Scaling | None = None) -> Tensor:
    """q int8 [M, K] times codes int8 [N, K], transposed, by the kernel that suits M; rows padded (kernels/int8.py)."""
    if suits_decode(q.shape[0], codes.shape[0], gpu_of(q.device).processors):
        return decode(q, codes, scaling)
    return prefill(q, codes, scaling)
