"""A training loop that survives: deterministic by step, checkpointed, resumed bit-equal, stopped when it diverges.

The batch of step k depends on the seed and k alone, so a resumed run needs no iterator's state (a run that is given
`seconds` is not bit-equal: its learning rate follows the clock). A checkpoint is a
folder `step-K`, written whole or not at all:

    model.safetensors    the parameters that are trained, and all buffers
    optimizer.pt         the optimizer's state dict
    state.json           step, losses, seconds, the run's settings

A loss or a gradient that is not finite, or a loss beyond `diverged` times the best mean of 20 steps, ends the run with
a TrainingError before the optimizer touches the parameters; checkpoints written before it stay.
"""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from time import perf_counter
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lowbit.errors import CheckpointError, InputError, TrainingError
from lowbit.train.distill import Objective
from lowbit.train.graph import GraphedGradient

Progress = Callable[[str, int, int], None]
_WINDOW = 20  # steps whose mean loss is compared


@dataclass(frozen=True)
class LoopOptions:
    """steps of `batch` windows each; the learning rate rises over `warmup` steps and falls by a cosine to `final`.

    Every group's own learning rate is scaled. clip: the largest norm of the gradient. keep_every: steps between
    checkpoints, 0 for none. autocast: multiply in bfloat16. graphed: replay each step as a CUDA graph (graph.py).
    seconds: where given, training ends after so long, or after `steps`, and the rate falls with the time that passed.
    """

    steps: int
    batch: int = 8
    warmup: int = 20
    final: float = 0.05
    clip: float = 1.0
    keep_every: int = 0
    seed: int = 0
    autocast: bool = False
    diverged: float = 3.0
    graphed: bool = False
    seconds: float = 0.0


@dataclass(frozen=True)
class Run:
    """What a run left: the loss of every step, and the newest checkpoint."""

    losses: list[float]
    checkpoint: Path | None


def train(
    model: nn.Module,
    windows: Tensor,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    options: LoopOptions,
    folder: Path | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Run:
    """Train on windows of ids int64 [n, T]; resumes from the newest whole checkpoint in `folder`.

    Raises TrainingError when training diverges, CheckpointError when a checkpoint belongs to another run.
    """
    if options.batch > len(windows):
        raise InputError(
            f"a batch of {options.batch} windows was asked for, and the data hold {len(windows)}; give more text, "
            "shorter windows, or a smaller batch"
        )
    if not options.seconds >= 0:
        raise InputError(f"training was given {options.seconds} seconds; give more than 0, or 0 for no limit")
    clock = _Clock(options.seconds)
    device = next(model.parameters()).device
    base, losses, kept = [float(group["lr"]) for group in optimizer.param_groups], list[float](), None
    if folder is not None and (newest := newest_checkpoint(folder)) is not None:
        (losses, clock.before), kept = _resume(model, optimizer, newest, options), newest
    model.train()
    gradient = _gradient(model, objective, windows[: options.batch].to(device), options)
    for step in range(len(losses), options.steps):
        if (passed := clock.share()) >= 1:
            break
        chosen = batch_of(len(windows), step, options)
        for group, lr in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = lr * schedule(step, options, passed)
        loss, norm = gradient(windows[chosen].to(device), chosen)
        value = loss.item()
        _check(value, float(norm), step, losses, options, kept)
        optimizer.step()
        losses.append(value)
        progress("training", step + 1, options.steps)
        if folder is not None and options.keep_every and (step + 1) % options.keep_every == 0:
            kept = save_checkpoint(folder, model, optimizer, losses, options, clock.seconds())
    for group, lr in zip(optimizer.param_groups, base, strict=True):
        group["lr"] = lr
    return Run(losses, kept)


def _gradient(
    model: nn.Module, objective: Objective, ids: Tensor, options: LoopOptions
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A function of a batch and its windows' numbers that leaves gradients and gives (loss, norm before clipping)."""
    if options.graphed:
        graphed = GraphedGradient(model, objective, ids, options.clip, options.autocast)
        return lambda ids, chosen: graphed(ids)

    def eager(ids: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        for parameter in _trained(model):
            parameter.grad = None
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=options.autocast):
            loss = objective(model, ids, chosen)
        loss.backward()
        return loss, nn.utils.clip_grad_norm_(_trained(model), options.clip)

    return eager


class _Clock:
    """Seconds of training, those before a resumed checkpoint too; they begin with compiling and capturing."""

    def __init__(self, budget: float) -> None:
        self.budget, self.before, self.started = budget, 0.0, perf_counter()

    def seconds(self) -> float:
        return self.before + perf_counter() - self.started

    def share(self) -> float:
        """What part of the budget has passed; 0 where there is none."""
        return self.seconds() / self.budget if self.budget else 0.0


def schedule(step: int, options: LoopOptions, passed: float = 0.0) -> float:
    """The share of the learning rate at a step: linear up, cosine down by steps, or by the share of time `passed`."""
    rise = min(1.0, (step + 1) / max(1, options.warmup))
    done = max(passed, max(0, step - options.warmup) / max(1, options.steps - options.warmup))
    return rise * (options.final + (1 - options.final) * 0.5 * (1 + math.cos(math.pi * done)))


def batch_of(count: int, step: int, options: LoopOptions) -> Tensor:
    """The windows of a step, int64 [batch]: each epoch is a permutation of all, seeded by its number."""
    per_epoch = count // options.batch
    epoch, place = divmod(step, per_epoch)
    generator = torch.Generator().manual_seed(options.seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator)[place * options.batch : (place + 1) * options.batch]


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _check(loss: float, norm: float, step: int, losses: list[float], options: LoopOptions, kept: Path | None) -> None:
    """Raise TrainingError unless loss and gradient are sound."""
    what = None
    if not math.isfinite(loss):
        what = f"the loss at step {step + 1} is {loss}"
    elif not math.isfinite(norm):
        what = f"the gradient at step {step + 1} holds NaN or infinity"
    elif len(losses) >= 2 * _WINDOW:
        means = [sum(losses[i : i + _WINDOW]) / _WINDOW for i in range(0, len(losses) - _WINDOW, _WINDOW)]
        present = sum(losses[-_WINDOW:]) / _WINDOW
        if present > options.diverged * min(means):
            what = f"the mean loss of {_WINDOW} steps rose to {present:.4g} at step {step + 1} from {min(means):.4g}"
    if what is not None:
        where = f"the last good checkpoint is {kept}" if kept else "no checkpoint was kept"
        raise TrainingError(f"training diverged: {what}; {where}; lower the learning rate or lengthen the warm-up")


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    losses: list[float],
    options: LoopOptions,
    seconds: float = 0.0,
) -> Path:
    """Write folder/step-K and remove the checkpoint before the last; the path."""
    final, partial = folder / f"step-{len(losses)}", folder / f".step-{len(losses)}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(_state(model), partial / "model.safetensors")
    torch.save(optimizer.state_dict(), partial / "optimizer.pt")
    state = {"step": len(losses), "losses": losses, "seconds": seconds, "options": asdict(options)}
    (partial / "state.json").write_text(json.dumps(state) + "\n")
    partial.rename(final)
    for older in sorted(folder.glob("step-*"), key=_number)[:-2]:
        shutil.rmtree(older)
    return final


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the most steps in `folder`, or None."""
    return max(folder.glob("step-*"), key=_number, default=None)


def _number(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _state(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: parameters with a gradient, and buffers."""
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {name: tensor.cpu().clone() for name, tensor in (parameters | dict(model.named_buffers())).items()}


def _resume(
    model: nn.Module, optimizer: torch.optim.Optimizer, path: Path, options: LoopOptions
) -> tuple[list[float], float]:
    """Load a checkpoint; the losses and seconds so far. Nothing is changed where it does not fit."""
    try:
        state: dict[str, Any] = json.loads((path / "state.json").read_text())
        tensors = load_file(path / "model.safetensors")
        states = torch.load(path / "optimizer.pt", map_location="cpu")
    except (OSError, SafetensorError, json.JSONDecodeError, RuntimeError, EOFError, UnpicklingError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); remove it to resume from the one before") from error
    expected = _state(model)
    if {k: v.shape for k, v in tensors.items()} != {k: v.shape for k, v in expected.items()}:
        raise CheckpointError(f"{path} belongs to another model or method; train into another folder")
    if state["options"] != asdict(options):
        changed = [key for key, value in asdict(options).items() if state["options"].get(key) != value]
        raise CheckpointError(f"{path} was trained with another {', '.join(changed)}; train into another folder")
    optimizer.load_state_dict(states)
    targets = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name, tensor in tensors.items():
            targets[name].copy_(tensor)
    return list(state["losses"]), float(state["seconds"])
