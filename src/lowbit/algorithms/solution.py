"""What a solver returns for one layer."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Solution:
    """Codes and their scales, and the weights they stand for.

    q int8 (or float8_e4m3fn) [N, K]; scale and zero as in numerics/affine.py; dequantized float32 [N, K]. damping is
    what the solver ended with, None where it has none.
    """

    q: Tensor
    scale: Tensor
    zero: Tensor | None
    dequantized: Tensor
    damping: float | None = None
