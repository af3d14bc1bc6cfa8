"""Learn the rounding: all layers together, by the gradient of what counts, KL(original || quantized) on given text.

A solver's result is the start. Every code may move to a neighbour and every scale and norm gain a little
(nn/rounding.py); each step takes `windows` calibration windows, the last ones are held out, and the state with the
lowest KL there is kept: learning never returns a model that is worse on them than the one it was given.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import InputError
from lowbit.model.divergence import Divergence
from lowbit.nn.linear import QuantLinear
from lowbit.nn.rounding import RoundingLinear

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Learning:
    """steps of `windows` windows each; rates are the first step's, falling linearly to zero.

    rate moves codes, in steps of the grid; the other rates are relative: of the weights' scales (gain_rate), of norms,
    and of static activations' scales (input_rate). held_out: windows that judge, fewer where there are few. stored: the
    dtype in which norms will be written.
    """

    steps: int = 450
    windows: int = 4
    rate: float = 0.01
    gain_rate: float = 0.002
    norm_rate: float = 0.0005
    input_rate: float = 0.004
    held_out: int = 8
    checks: int = 10
    sign: bool = False
    seed: int = 0
    stored: torch.dtype = torch.bfloat16

    def apart(self, windows: int) -> int:
        """How many of so many windows are held out. Raises InputError where that leaves none."""
        if windows < 4:
            raise InputError(
                f"learning needs 4 or more calibration windows to judge itself, not {windows}: --samples 64"
            )
        return min(self.held_out, windows // 4)


@dataclass(frozen=True)
class Learned:
    """KL on the held-out windows before and after, the step that was kept, and the float parameters that changed."""

    before: float
    after: float
    step: int
    rewritten: frozenset[str] = frozenset()


def learn(
    model: nn.Module,
    original: nn.Module,
    ids: Tensor,
    options: Learning,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Learned:
    """Improve the quantized layers of `model` in place; ids [samples, T]; original is the float model, on its device.

    The last windows of ids (`Learning.apart`) judge. A solver must not have seen them: on windows that it was fitted to
    a model is twice as close to the original as elsewhere, and learning would only lose there.

    Layers that are not integers are left alone. The norms of the model are learned as far as they are 1-D parameters.
    """
    apart = options.apart(len(ids))
    divergence = Divergence(model, original, ids)
    train, held_out = torch.arange(len(ids)).split([len(ids) - apart, apart])
    softened = _soften(model)
    groups = _parameters(model, softened, options)
    best = before = divergence.mean(held_out)
    best_state, best_step = _state(groups), 0
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(1 - step / options.steps, 0.0))
    add_gradient = _gradients(divergence, optimizer, min(options.windows, len(train)))
    order = _order(len(train), options)
    every = max(options.steps // options.checks, 1)
    for step in range(1, options.steps + 1):
        add_gradient(train[next(order)])
        if options.sign:
            _sign_step(optimizer)
        else:
            optimizer.step()
        schedule.step()
        if step % every == 0:
            now = divergence.mean(held_out)
            if now < best:
                best, best_state, best_step = now, _state(groups), step
            progress("learning", step, options.steps)
    _restore(groups, best_state)
    for name, layer in softened.items():
        model.set_submodule(name, layer.solved())
    trained = {id(parameter) for group in groups for parameter in group["params"]}
    rewritten = {name: parameter for name, parameter in model.named_parameters() if id(parameter) in trained}
    for parameter in rewritten.values() if best_step else ():
        parameter.data = parameter.data.to(options.stored).to(parameter.dtype)
    return Learned(before, best, best_step, frozenset(rewritten) if best_step else frozenset())


def _gradients(divergence: Divergence, optimizer: torch.optim.Optimizer, windows: int) -> Callable[[Tensor], None]:
    """What puts the gradient on windows of these numbers into the parameters, in place of the one there.

    A CUDA graph where there is a GPU, and the model does nothing that no graph can hold.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def plainly(numbers: Tensor) -> None:
        optimizer.zero_grad()
        divergence.add_gradient(numbers)

    if divergence.device.type != "cuda":
        return plainly
    try:
        replay = divergence.graphed(windows, parameters)
    except RuntimeError as error:
        logger.warning("learning goes on without a CUDA graph: %s", str(error).splitlines()[0])
        return plainly
    return replay


def _soften(model: nn.Module) -> dict[str, RoundingLinear]:
    """Replace each integer QuantLinear by a RoundingLinear; name -> layer."""
    found = {}
    for name, layer in list(model.named_modules()):
        if isinstance(layer, QuantLinear) and layer.scheme.weights.format.kind == "int":
            found[name] = RoundingLinear(layer)
            model.set_submodule(name, found[name])
    return found


def _parameters(model: nn.Module, softened: dict[str, RoundingLinear], options: Learning) -> list[dict[str, Any]]:
    """The optimizer's groups; everything else is frozen."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    codes = [layer.v for layer in softened.values()]
    gains = [layer.gain for layer in softened.values()]
    inputs = [layer.input_gain for layer in softened.values() if layer.input_gain is not None]
    learned = {id(parameter) for parameter in (*codes, *gains, *inputs)}
    norms = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.dim() == 1 and not name.endswith("bias") and id(parameter) not in learned
    ]
    groups = [
        (codes, options.rate), (gains, options.gain_rate), (norms, options.norm_rate), (inputs, options.input_rate)
    ]  # fmt: skip
    kept = [(parameters, rate) for parameters, rate in groups if parameters and rate > 0]
    for parameters, _ in kept:
        for parameter in parameters:
            parameter.requires_grad_(True)
    return [{"params": parameters, "lr": rate} for parameters, rate in kept]


def _order(samples: int, options: Learning) -> Iterator[Tensor]:
    """Batches of window numbers of one size, a new permutation whenever no more are left."""
    generator = torch.Generator().manual_seed(options.seed)
    windows = min(options.windows, samples)
    while True:
        yield from torch.randperm(samples, generator=generator)[: samples - samples % windows].split(windows)


@torch.no_grad()
def _sign_step(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.sub_(parameter.grad.sign(), alpha=group["lr"])


def _state(groups: Sequence[dict[str, Any]]) -> list[Tensor]:
    return [parameter.detach().clone() for group in groups for parameter in group["params"]]


@torch.no_grad()
def _restore(groups: Sequence[dict[str, Any]], state: list[Tensor]) -> None:
    parameters = [parameter for group in groups for parameter in group["params"]]
    for parameter, kept in zip(parameters, state, strict=True):
        parameter.copy_(kept)
