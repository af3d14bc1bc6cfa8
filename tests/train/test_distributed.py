"""QAT and QLoRA under torchrun and accelerate's FSDP2 on two CPUs (gloo). Oracle: the same steps on one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from distributed_worker import measure

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def run(world: int, folder: Path) -> list[dict]:
    """What each process of a group of `world` found."""
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    subprocess.run([*torchrun, HERE / "distributed_worker.py", folder], env=environment, check=True, timeout=570)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, list[dict]]:
    folder = tmp_path_factory.mktemp("distributed")
    return measure(0, 1), run(2, folder)


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [("qat", 1e-4), ("qlora8", 1e-4), ("qat8", 3e-3)],
    ids=["qat", "qlora", "qat with 8-bit states, whose blocks end elsewhere in a shard"],
)
def test_two_processes_lose_what_one_loses(found: tuple[dict, list[dict]], name: str, tolerance: float) -> None:
    one, two = found
    for rank in two:
        assert rank[name] == pytest.approx(one[name], rel=tolerance)


def test_a_rank_resumes_bit_equal_and_holds_half_of_the_states(found: tuple[dict, list[dict]]) -> None:
    one, two = found
    assert one["resumed"]
    assert all(rank["resumed"] for rank in two)
    assert max(rank["state bytes"] for rank in two) < 0.75 * one["state bytes"]
