"""Oracle: a run that was never interrupted."""

import json
from pathlib import Path

import pytest
import torch
from architectures import TINY

from lowbit.errors import CheckpointError, InputError, TrainingError
from lowbit.numerics.scheme import QuantScheme
from lowbit.train.distill import next_token_loss
from lowbit.train.loop import LoopOptions, batch_of, newest_checkpoint, schedule, train
from lowbit.train.optim import AdamW8bit, StateOptions
from lowbit.train.qat import prepare

WINDOWS = torch.randint(3, 128, (12, 16), generator=torch.Generator().manual_seed(0))
OPTIONS = LoopOptions(steps=6, batch=4, warmup=2, keep_every=2)


def parts(lr: float = 1e-3) -> tuple[torch.nn.Module, AdamW8bit]:
    model = prepare(TINY["llama"](), QuantScheme.parse("w4a16-g32"))
    return model, AdamW8bit(model.parameters(), lr=lr, options=StateOptions(min_size=1024))


class Interrupted(Exception):  # noqa: N818
    pass


def test_a_run_that_was_killed_resumes_bit_equal(tmp_path: Path) -> None:
    whole, optimizer = parts()
    expected = train(whole, WINDOWS, next_token_loss, optimizer, OPTIONS)

    def killed(stage: str, done: int, total: int) -> None:
        if done == 5:
            raise Interrupted

    model, optimizer = parts()
    with pytest.raises(Interrupted):
        train(model, WINDOWS, next_token_loss, optimizer, OPTIONS, tmp_path, killed)
    again, optimizer = parts()
    found = train(again, WINDOWS, next_token_loss, optimizer, OPTIONS, tmp_path)
    assert found.losses == expected.losses
    assert found.checkpoint == tmp_path / "step-6"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-4", "step-6"]
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_diverging_run_stops_in_words_and_keeps_its_last_good_checkpoint(tmp_path: Path) -> None:
    model, optimizer = parts()
    calls = []

    def poisoned(model: torch.nn.Module, ids: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return next_token_loss(model, ids, windows) * (float("nan") if len(calls) == 4 else 1.0)

    with pytest.raises(TrainingError, match=r"the loss at step 4 is nan; the last good checkpoint is .*step-2"):
        train(model, WINDOWS, poisoned, optimizer, OPTIONS, tmp_path)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    kept = newest_checkpoint(tmp_path)
    assert kept is not None
    assert json.loads((kept / "state.json").read_text())["step"] == 2


def test_a_loss_that_climbs_is_divergence_too() -> None:
    model, optimizer = parts(lr=0.0)
    calls = []

    def climbing(model: torch.nn.Module, ids: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return next(model.parameters()).sum() * 0 + (1.0 if len(calls) < 30 else 9.0)

    with pytest.raises(TrainingError, match="rose to"):
        train(model, WINDOWS, climbing, optimizer, LoopOptions(steps=60, batch=4))


def test_checkpoints_of_other_runs_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    model, optimizer = parts()
    train(model, WINDOWS, next_token_loss, optimizer, OPTIONS, tmp_path)
    other, optimizer = parts()
    with pytest.raises(CheckpointError, match="another batch, seed"):
        train(other, WINDOWS, next_token_loss, optimizer, LoopOptions(6, 2, 2, seed=1, keep_every=2), tmp_path)
    plain = TINY["llama"]()
    with pytest.raises(CheckpointError, match="another model or method"):
        train(plain, WINDOWS, next_token_loss, AdamW8bit(plain.parameters()), OPTIONS, tmp_path)
    (tmp_path / "step-6" / "optimizer.pt").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match="resume from the one before"):
        train(other, WINDOWS, next_token_loss, optimizer, OPTIONS, tmp_path)
    with pytest.raises(InputError, match="hold 12"):
        train(other, WINDOWS, next_token_loss, optimizer, LoopOptions(6, batch=13))


def test_an_epoch_sees_every_window_once_and_the_rate_rises_and_falls() -> None:
    options = LoopOptions(steps=100, batch=4, warmup=10)
    seen = torch.cat([batch_of(12, step, options) for step in range(3)])
    assert sorted(seen.tolist()) == list(range(12))
    assert not torch.equal(batch_of(12, 0, options), batch_of(12, 3, options))
    rates = [schedule(step, options) for step in range(100)]
    assert rates[9] == 1.0
    assert rates[0] == pytest.approx(0.1)
    assert rates[-1] == pytest.approx(0.05, abs=0.01)


class SlowClock:
    """A clock on which the first steps take 10 seconds each, as while others compile, and the rest 1 second."""

    def __init__(self) -> None:
        self.now, self.reads = 0.0, 0

    def __call__(self) -> float:
        self.reads += 1
        self.now += 10.0 if 1 < self.reads < 5 else 1.0
        return self.now


def test_a_budget_of_seconds_is_used_whole_whatever_the_first_steps_took(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowbit.train.loop.perf_counter", SlowClock())
    model, optimizer = parts()
    rates: list[float] = []
    run = train(
        model, WINDOWS, next_token_loss, optimizer, LoopOptions(10**6, 4, warmup=2, seconds=40.0),
        progress=lambda stage, done, total: rates.append(optimizer.param_groups[0]["lr"] / 1e-3),
    )  # fmt: skip
    assert len(run.losses) == 3 + 9  # 30 s, then one a second until 40 have passed
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] == pytest.approx(0.05, abs=1e-2)
    assert optimizer.param_groups[0]["lr"] == 1e-3


def test_seconds_before_an_interruption_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = LoopOptions(10**6, 4, warmup=2, seconds=20.0, keep_every=4)
    counts = []
    for _ in range(2):  # the clock begins anew: a second after every read of it
        clock = SlowClock()
        clock.reads = 10
        monkeypatch.setattr("lowbit.train.loop.perf_counter", clock)
        model, optimizer = parts()
        counts.append(len(train(model, WINDOWS, next_token_loss, optimizer, options, tmp_path).losses))
    state = json.loads((tmp_path / f"step-{counts[0] // 4 * 4}" / "state.json").read_text())
    assert 15 < state["seconds"] <= 20
    assert counts[1] <= counts[0] + 1


def test_a_graph_is_refused_where_there_is_no_cuda_device() -> None:
    model, optimizer = parts()
    with pytest.raises(InputError, match=r"CUDA graph on a CUDA device only, not on cpu; leave graphed off"):
        train(model, WINDOWS, next_token_loss, optimizer, LoopOptions(6, 4, graphed=True))


def test_a_negative_budget_is_refused() -> None:
    model, optimizer = parts()
    with pytest.raises(InputError, match=r"given -1 seconds; give more than 0, or 0 for no limit"):
        train(model, WINDOWS, next_token_loss, optimizer, LoopOptions(6, 4, seconds=-1))
