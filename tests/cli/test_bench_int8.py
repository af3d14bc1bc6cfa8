"""`lowbit bench int8-ladder` without a GPU: it says what it needs, and its table is told for any rows."""

import pytest
import torch

from lowbit.cli.bench_int8 import _table
from lowbit.errors import InputError
from lowbit.kernels.int8_bench import RUNGS, RungTime, ladder
from lowbit.kernels.int8_matmul import BY_NAME


def test_a_machine_without_cuda_is_told_so() -> None:
    with pytest.raises(InputError, match="no CUDA device"):
        ladder(16, 16, 16, torch.device("cpu"))


def test_rungs_are_kernels_and_rows_become_a_table() -> None:
    assert set(RUNGS) <= set(BY_NAME)
    table = _table([RungTime("naive", 10.0, 1.5, 0.1, None), RungTime("dp4a", None, None, None, None, "no")], "t")
    assert table.row_count == 2
