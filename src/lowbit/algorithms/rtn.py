"""Round to nearest (RTN): every weight to the nearest point of its grid, no data needed.

The scale is that of the smallest and largest weight, or, with a search, the clip that loses least.
"""

import torch
from torch import Tensor

from lowbit.algorithms.blocks import divisor_of
from lowbit.algorithms.scales import ScaleSearch, search_scale
from lowbit.algorithms.solution import Solution
from lowbit.numerics.affine import decode, encode
from lowbit.numerics.scheme import TensorScheme


def solve_rtn(
    w: Tensor,
    scheme: TensorScheme,
    dtype: torch.dtype,
    search: ScaleSearch | None = None,
    importance: Tensor | None = None,
) -> Solution:
    """Codes, scale (in `dtype`) and zero-point for w [N, K]; importance [K] weighs the search's error."""
    w = w.float()
    scale, zero = search_scale(w, scheme, dtype, search, importance)
    q = encode(w, scale, zero, scheme)
    divisor = divisor_of(w, scheme.format, search is not None)
    return Solution(q, scale, zero, decode(q, scale, zero, scheme), global_scale=divisor)
