"""Float32 products of matrices on a CPU by oneDNN in place of MKL, which keeps to AVX2 on CPUs that aren't Intel's.

torch asks oneDNN where its precision for float32 is set to "bf16", which oneDNN takes as a permission: on CPUs with AMX
it rounds to bfloat16, elsewhere it multiplies in float32. Which of both it does here is found by trying, and where it
rounds, all stays as it is. One thread of a Zen 5 with AVX-512, GFLOPS (docs/log-ladder-time.md):

    product             MKL    oneDNN
    x W^T, K = 576      106    257
    x^T x, K = 576      112    228      left float32, relative error 3e-7 in both
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_MATMUL: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
_SIZE = 256  # of the product that is tried, 0.3 ms
_EXACT = 1e-5  # float32 errs by 3e-7 there, bfloat16 by 2e-3


@contextmanager
def quick_products() -> Iterator[None]:
    """Inside, float32 products on the CPU take oneDNN where it keeps them in float32."""
    before = _MATMUL.fp32_precision
    try:
        _MATMUL.fp32_precision = "bf16" if _keeps_float32(before) else before
        yield
    finally:
        _MATMUL.fp32_precision = before


def _keeps_float32(before: str) -> bool:
    """Whether oneDNN's products are those of float32 here. Leaves its precision as `before`."""
    x = torch.linspace(-1, 1, _SIZE * _SIZE).sin().view(_SIZE, _SIZE)
    wanted = x.double() @ x.double().T
    _MATMUL.fp32_precision = "bf16"
    error = (x @ x.T).double() - wanted
    _MATMUL.fp32_precision = before
    return bool(error.norm() < _EXACT * wanted.norm())
