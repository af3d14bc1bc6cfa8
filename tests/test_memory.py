"""Peak memory. Oracle: tensors of a known size, made and dropped."""

from pathlib import Path

import pytest
import torch

from lowbit import memory
from lowbit.memory import peak_bytes, reset_peak

CPU = torch.device("cpu")
SIZE = 64 * 2**20
SLACK = 16 * 2**20


def touch(size: int) -> None:
    """Hold `size` bytes for a moment; ones, because untouched zeros are not in memory."""
    torch.ones(size, dtype=torch.uint8)


def test_the_peak_remembers_what_was_dropped() -> None:
    reset_peak(CPU)
    before = peak_bytes(CPU)
    touch(SIZE)
    assert peak_bytes(CPU) - before == pytest.approx(SIZE, abs=SLACK)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux lets a process reset its peak")
def test_a_new_stretch_of_work_forgets_the_one_before() -> None:
    touch(SIZE)
    high = peak_bytes(CPU)
    reset_peak(CPU)
    assert high - peak_bytes(CPU) > SIZE - SLACK


def test_where_the_system_does_not_tell_it_is_the_peak_of_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reset_peak(CPU)
    touch(SIZE)
    told = peak_bytes(CPU)
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "none")
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "none")
    reset_peak(CPU)
    assert peak_bytes(CPU) >= told - SLACK
    assert peak_bytes(CPU) < 2**40  # bytes, where the system counts in units of 1024


def test_a_cuda_device_is_asked_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: asked.append(device))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 12345)
    device = torch.device("cuda:1")
    reset_peak(device)
    assert peak_bytes(device) == 12345
    assert asked == [device]
