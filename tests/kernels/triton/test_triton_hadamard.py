"""The Hadamard rotation in Triton; the oracle is the product with the rotation's matrix in float64.

Without a GPU Triton's interpreter runs it.
"""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from lowbit.kernels.triton.hadamard import rotate
from lowbit.numerics.hadamard import Hadamard

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = ("hadamard-64-s0", "hadamard-48-s1", "hadamard-96-b32-s2", "hadamard-12-s0", "hadamard-28-s0")


@pytest.mark.parametrize("text", CASES)
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_the_kernel_multiplies_by_the_rotation(text: str, inverse: bool) -> None:
    rotation = Hadamard.parse(text)
    x = torch.randn(2, 3, rotation.size, generator=torch.Generator().manual_seed(0))
    matrix = rotation.apply(torch.eye(rotation.size, dtype=torch.float64))
    y = rotate(x.to(DEVICE), rotation, inverse).cpu()
    torch.testing.assert_close(y.double(), x.double() @ (matrix.T if inverse else matrix), rtol=1e-5, atol=1e-5)


def test_half_precision_is_summed_in_float32() -> None:
    rotation = Hadamard.parse("hadamard-192-s0")
    x = torch.randn(2, 192, generator=torch.Generator().manual_seed(0)).half()
    y = rotate(x.to(DEVICE), rotation).cpu()
    torch.testing.assert_close(y, rotation.apply(x), rtol=1e-3, atol=1e-3)  # one rounding to float16 on either side
