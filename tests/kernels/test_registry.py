"""The choice of a kernel: the measured table first, then the order, never a silent second choice under `use`."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lowbit.errors import InputError
from lowbit.kernels import measured, registry
from lowbit.numerics.scheme import QuantScheme
from lowbit.tensors import PackedWeight

X = torch.ones(4, 32)
WEIGHT = PackedWeight.from_float(torch.ones(8, 32), QuantScheme.parse("w8a8"), torch.float32)


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "measured.json"
    monkeypatch.setattr(measured, "ROWS", path)
    measured._rows.cache_clear()
    measured.fastest.cache_clear()
    yield path
    measured._rows.cache_clear()
    measured.fastest.cache_clear()


def test_the_measured_table_goes_before_the_order(table: Path) -> None:
    row = {"op": "wa8_linear", "gpu": "cpu", "weights": "int8", "M": 4, "kernel": "reference"}
    table.write_text(json.dumps([row, {**row, "M": 2, "kernel": "cpu_int8"}]), encoding="utf-8")
    assert registry.pick("wa8_linear", X, WEIGHT).name == "reference"
    assert registry.pick("wa8_linear", X[:2], WEIGHT).name == "cpu_int8"
    assert registry.pick("wa8_linear", torch.ones(5, 32), WEIGHT).name == "cpu_int8"  # beyond the table: the order


def test_where_the_winner_refuses_the_more_general_rows_speak() -> None:
    names = measured.fastest("wna16_linear", "sm_90", "int4", 512)
    assert names == ("cuda_wgmma", "cuda_wgmma", "cuda_dequantize")


def test_rows_of_a_shape_speak_before_the_others() -> None:
    assert measured.fastest("wna16_linear", "sm_90", "int4", 4, (4096, 14336))[0] == "cuda_wgmma"
    assert measured.fastest("wna16_linear", "sm_90", "int4", 1, (4096, 14336))[0] == "cuda_mma"
    assert measured.fastest("wna16_linear", "sm_90", "int4", 4, (28672, 4096))[0] == "cuda_mma"


def test_the_packaged_table_names_kernels_that_exist() -> None:
    for row in measured._rows():
        assert row["kernel"] in {candidate.name for candidate in registry.CANDIDATES[row["op"]]}


def test_a_kernel_that_is_named_and_refuses_is_an_error() -> None:
    weight = PackedWeight.from_float(torch.ones(8, 32), QuantScheme.parse("w8a8-g32"), torch.float32)
    assert registry.pick("wa8_linear", X, weight).name == "reference"
    with registry.use("cpu_int8"), pytest.raises(InputError, match=r"can't run wa8_linear: .* a scale per group"):
        registry.pick("wa8_linear", X, weight)
    assert "a scale per group" in registry.explain("wa8_linear", X, weight)["cpu_int8"]


def test_an_unknown_kernel_is_an_error_that_names_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"no kernel 'fast'; choose one of .*reference"), registry.use("fast"):
        pass
