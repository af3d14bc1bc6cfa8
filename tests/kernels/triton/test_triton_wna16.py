"""The weight-only product in Triton; the oracle is the product with the dequantized weight in float64.

Without a GPU Triton's interpreter runs it, in float16: it is silently wrong for bfloat16.
"""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from lowbit.kernels.triton import wna16_linear
from lowbit.numerics.scheme import QuantScheme
from lowbit.tensors import PackedWeight

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = (
    # scheme, (M, N, K): ragged edges everywhere
    *(("w4a16-g32", (3, 70, 96)), ("w4a16-g64-asym", (17, 64, 128)), ("w3a16-g32-asym", (2, 33, 96))),
    *(
        ("w2a16-asym", (1, 40, 100)),
        ("w5a16", (2, 16, 70)),
        ("w8a16-g128", (4, 16, 128)),
        ("w4a16-tensor", (2, 20, 64)),
    ),
    *(("nf4-b64", (5, 24, 72)), ("fp4-b32-dq", (2, 66, 64))),
)


@pytest.mark.parametrize(("scheme", "shape"), CASES)
def test_the_product_is_right(scheme: str, shape: tuple[int, int, int]) -> None:
    tokens, rows, columns = shape
    generator = torch.Generator().manual_seed(0)
    w = (torch.randn(rows, columns, generator=generator) * 0.02).half().to(DEVICE)
    x = torch.randn(tokens, columns, generator=generator).half().to(DEVICE)
    bias = torch.randn(rows, generator=generator).half().to(DEVICE)
    weight = PackedWeight.from_float(w, QuantScheme.parse(scheme), torch.float16)
    y = wna16_linear.product(x, weight, bias).double()
    exact = x.double() @ weight.dequantize().double().T + bias.double()
    # the weight and y are rounded to fp16: 2^-12 / sqrt(3) each
    assert float((y - exact).norm() / exact.norm()) < 5e-4
