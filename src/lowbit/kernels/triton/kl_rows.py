"""KL of one distribution over a vocabulary from another, and its gradient, row by row, without a softmax in memory.

    kl = sum_v p_v (log p_v - log q_v),  p = softmax(wanted), q = softmax(logits)
       = sum_v p_v (a_v - b_v) - lse(a) + lse(b),  a = wanted, b = logits
    dkl/db = q - p

A program walks its row twice: once for both log-sum-exps and the sum, with the running maxima of online softmax
(arXiv:1805.02867), once to write the gradient. Each input is read twice, nothing else is: torch's operations read and
write a float32 copy some ten times.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 4096
_LOWEST = tl.constexpr(-1e30)  # finite, so that a padded block subtracts it from itself to zero


@triton.jit
def _kl_kernel(logits, wanted, kl, gradient, gain, V: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    logits += row * V
    wanted += row * V
    gradient += row * V
    largest_a, largest_b = tl.full([], _LOWEST, tl.float32), tl.full([], _LOWEST, tl.float32)
    sum_a, sum_b, moment = tl.zeros([], tl.float32), tl.zeros([], tl.float32), tl.zeros([], tl.float32)
    for start in range(0, V, BLOCK):
        inside = start + columns < V
        a = tl.load(wanted + start + columns, mask=inside, other=_LOWEST).to(tl.float32)
        b = tl.load(logits + start + columns, mask=inside, other=_LOWEST).to(tl.float32)
        new_a, new_b = tl.maximum(largest_a, tl.max(a, 0)), tl.maximum(largest_b, tl.max(b, 0))
        shrink, mass = tl.exp(largest_a - new_a), tl.where(inside, tl.exp(a - new_a), 0.0)
        sum_a = sum_a * shrink + tl.sum(mass, 0)
        moment = moment * shrink + tl.sum(tl.where(inside, mass * (a - b), 0.0), 0)
        sum_b = sum_b * tl.exp(largest_b - new_b) + tl.sum(tl.where(inside, tl.exp(b - new_b), 0.0), 0)
        largest_a, largest_b = new_a, new_b
    lse_a, lse_b = largest_a + tl.log(sum_a), largest_b + tl.log(sum_b)
    tl.store(kl + row, moment / sum_a - lse_a + lse_b)
    for start in range(0, V, BLOCK):
        inside = start + columns < V
        a = tl.load(wanted + start + columns, mask=inside, other=_LOWEST).to(tl.float32)
        b = tl.load(logits + start + columns, mask=inside, other=_LOWEST).to(tl.float32)
        change = (tl.exp(b - lse_b) - tl.exp(a - lse_a)) * gain
        tl.store(gradient + start + columns, change.to(gradient.dtype.element_ty), mask=inside)


def kl_rows(logits: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """(KL of each row, float32 [M]; the gradient of their mean, [M, V] in logits' dtype) of two contiguous [M, V]."""
    rows, columns = logits.shape
    kl = torch.empty(rows, dtype=torch.float32, device=logits.device)
    gradient = torch.empty_like(logits)
    block = min(_COLUMNS, triton.next_power_of_2(columns))
    _kl_kernel[(rows,)](logits, wanted, kl, gradient, 1 / rows, columns, block, num_warps=8)
    return kl, gradient
