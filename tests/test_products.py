"""Products by oneDNN. Oracle: float64."""

import torch

from lowbit.products import quick_products


def test_products_stay_in_float32() -> None:
    x = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
    w = torch.randn(100, 200, generator=torch.Generator().manual_seed(1))
    wanted = x.double() @ w.double().T
    with quick_products():
        found = torch.nn.functional.linear(x, w)
    assert (found.double() - wanted).norm() < 1e-6 * wanted.norm()


def test_torchs_own_precision_is_back_afterwards() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    try:
        with quick_products():
            raise KeyError
    except KeyError:
        pass
    assert torch.backends.mkldnn.matmul.fp32_precision == before
