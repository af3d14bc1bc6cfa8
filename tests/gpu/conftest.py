"""Everything in tests/gpu needs a CUDA device and is skipped, with that reason, where torch sees none."""

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.path.parts:
            item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device"))
