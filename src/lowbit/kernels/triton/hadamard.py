"""The Hadamard rotation in Triton: a program makes 2^k values of one row.

    block of m 2^k columns of a row, as [m, 2^k]:   y[j] = butterfly(sum_i H_m[i, j] signs[i] x[i]) / sqrt(m 2^k)

Program (row, block, j) reads the block's m pieces (from cache after the first j), adds them with the signs of column j
of H_m, and runs the butterfly of k steps in registers: step s splits the 2^k values into pairs 2^s apart. Sums are in
float32 whatever x is. The inverse reads row j of H_m and multiplies by the signs of x's columns at the end.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.numerics.hadamard import Hadamard, factors, hadamard_matrix, signs_of


@triton.jit
def _rotate_kernel(  # type: ignore[no-untyped-def]
    x, y, matrix, signs, scale, blocks,
    ORDER: tl.constexpr, POWER: tl.constexpr, STEPS: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    j = program % ORDER
    row_block = (program // ORDER).to(tl.int64)
    start = row_block * (ORDER * POWER)
    column = (row_block % blocks) * (ORDER * POWER)  # of the row, where the block begins
    n = tl.arange(0, POWER)
    total = tl.zeros((POWER,), dtype=tl.float32)
    for i in range(ORDER):
        piece = tl.load(x + start + i * POWER + n).to(tl.float32)
        if INVERSE:
            total += piece * tl.load(matrix + j * ORDER + i)
        else:
            total += piece * tl.load(signs + column + i * POWER + n) * tl.load(matrix + i * ORDER + j)
    for step in tl.static_range(STEPS):
        pairs = tl.reshape(total, (POWER // 2 ** (step + 1), 2, 2**step))
        first, second = tl.split(tl.permute(pairs, (0, 2, 1)))  # [P / 2h, h, 2] -> two of [P / 2h, h], h = 2^step
        total = tl.reshape(tl.permute(tl.join(first + second, first - second), (0, 2, 1)), (POWER,))
    total *= scale
    if INVERSE:
        total *= tl.load(signs + column + j * POWER + n)
    tl.store(y + start + j * POWER + n, total.to(y.dtype.element_ty))


def rotate(x: Tensor, rotation: Hadamard, inverse: bool = False) -> Tensor:
    """x Q, or x Q^T, for x [..., K] in float16, bfloat16 or float32: same shape and dtype, sums in float32."""
    found = factors(rotation.block)
    assert found is not None
    order, power = found
    x = x.contiguous()
    y = torch.empty_like(x)
    programs = x.numel() // power
    if programs:
        matrix, signs = hadamard_matrix(order, x.device), signs_of(rotation.size, rotation.seed, x.device)
        _rotate_kernel[(programs,)](
            x, y, matrix, signs, rotation.block**-0.5, rotation.size // rotation.block,
            order, power, power.bit_length() - 1, inverse,
            num_warps=min(max(power // 256, 1), 8),
        )  # fmt: skip
    return y
