"""What a solver returns for one layer."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Solution:
    """Codes and their scales, and the weights they stand for.

    q int8 (or float8_e4m3fn; E2M1 as its levels) [N, K]; scale and zero as in numerics/affine.py; dequantized float32
    [N, K]. damping is what the solver ended with, None where it has none. global_scale [1]: nvfp4's divisor, by which
    scale was divided.
    """

    q: Tensor
    scale: Tensor
    zero: Tensor | None
    dequantized: Tensor
    damping: float | None = None
    global_scale: Tensor | None = None
