"""The oracle is the rule: a damaged checkpoint raises LowbitError or is read; it opens no file outside its folder and
loads no pickle. bench/interop/fuzz.py runs the same over 10,000 seeds with memory capped (bench/results/fuzz.json)."""

import logging
import random
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutants import Mutants, Watch, probe

import lowbit


@pytest.fixture(scope="module")
def mutants(tmp_path_factory: pytest.TempPathFactory) -> Mutants:
    return Mutants(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


def test_the_sound_bases_are_read(mutants: Mutants) -> None:
    for base in mutants.bases:
        lowbit.load(base, torch.float32)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32))
def test_a_mutant_raises_our_errors_or_is_read(
    seed: int, mutants: Mutants, watch: Watch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder: Path = tmp_path_factory.mktemp("mutant")
    (folder / "mutant").mkdir()
    path = mutants.write(random.Random(seed), folder / "mutant")
    logging.disable(logging.CRITICAL)
    watch.seen, watch.allowed = (
        [],
        (str(folder), sys.prefix, sys.base_prefix, f"{tempfile.gettempdir()}/lowbit-", "/usr/lib", "/proc", "/dev"),
    )
    try:
        probe(path, seed % 8 == 0)
    finally:
        watch.allowed = ()
        logging.disable(logging.NOTSET)
    assert [item for item in watch.seen if not item.endswith((".py", ".pyc", ".so"))] == []
