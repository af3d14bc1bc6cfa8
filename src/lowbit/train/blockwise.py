"""The optimizer under every one of optim.py: a rule (rules.py) over states of few bits (states.py).

States are decoded, stepped in float32 and encoded again. On CUDA all tensors of a step go through one launch of one
kernel (kernels/cuda/optim.py); elsewhere each tensor goes through torch.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lowbit.errors import CheckpointError, InputError
from lowbit.kernels.cuda.optim import KernelStep, Record, Scalars, Sent, step_all, step_refusal
from lowbit.train.rules import Hyper, Rule
from lowbit.train.states import ABSMAX, BLOCKS, check_state, decode_state, encode_state, layout

_LOG = logging.getLogger("lowbit")
Params = Iterable[Tensor] | Iterable[dict[str, Any]]


@dataclass(frozen=True)
class _Step:
    """One tensor's step: its local shard, gradient and state dict; bits is the width of its states."""

    rule: Rule
    p: Tensor
    g: Tensor
    state: dict[str, Any]
    bits: int

    def for_kernel(self) -> KernelStep:
        names = [slot.name for slot in self.rule.slots]
        absmax = () if self.bits == 32 else tuple(self.state[name + ABSMAX] for name in names)
        return KernelStep(self.rule.name, self.bits, self.p, self.g, tuple(self.state[name] for name in names), absmax)


@dataclass(frozen=True)
class StateOptions:
    """min_size: tensors with fewer elements keep float32 states. paged: states live in pinned host memory."""

    bits: int = 8
    min_size: int = 4096
    paged: bool = False


class BlockwiseOptimizer(Optimizer):
    """A rule over states of few bits. Every group may set lr, betas, eps, weight_decay and bits (32 for full width)."""

    def __init__(
        self, params: Params, rule: Rule, defaults: dict[str, Any], options: StateOptions, decoupled: bool = True
    ) -> None:
        _check_hyper(defaults)
        self.rule, self.options, self.decoupled = rule, options, decoupled
        self._warned = False
        self._known: dict[Tensor, tuple[tuple[Any, ...], Record | None]] = {}
        self._sent: Sent = {}
        super().__init__(params, defaults | {"bits": options.bits})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step over all parameters that have a gradient; the closure's loss, or None."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        fused: list[tuple[Record, Scalars]] = []
        for group in self.param_groups:
            hypers: dict[int, tuple[Hyper, Scalars]] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                record = self._record(parameter, group["bits"])
                state = self.state[parameter]
                count = state["step"] = state["step"] + 1
                if count not in hypers:
                    hyper = self._hyper(group, count)
                    hypers[count] = hyper, hyper.scalars(self.rule.name)
                hyper, scalars = hypers[count]
                if record is None:
                    _step_plainly(self._step(parameter, group["bits"]), hyper)
                else:
                    fused.append((record, scalars))
        if fused:
            step_all(fused, self._sent)
        return loss

    def _hyper(self, group: dict[str, Any], step: int) -> Hyper:
        beta1, beta2 = group["betas"]
        return Hyper(float(group["lr"]), beta1, beta2, group["eps"], group["weight_decay"], step, self.decoupled)

    def _record(self, parameter: Tensor, bits: int) -> Record | None:
        """The kernel's record of a tensor, its states made at the first step; None where the kernel refuses.

        It is kept as long as parameter and gradient stay where they are: building it takes 15 us a tensor.
        """
        p, g = _local(parameter), _local(parameter.grad)  # type: ignore[arg-type]
        place = (p.data_ptr(), g.data_ptr(), g.dtype)
        known = self._known.get(parameter)
        if known is not None and known[0] == place:
            return known[1]
        one = self._step(parameter, bits).for_kernel()
        record = one.record() if step_refusal(one) is None else None
        if p.is_cuda and not (p.is_contiguous() and g.is_contiguous()):
            self._warn_once(
                f"the optimizer steps tensors in plain torch, slowly, because the parameter {list(p.shape)} or its "
                "gradient is not contiguous; make it so before training"
            )
        self._known[parameter] = place, record
        return record

    def _warn_once(self, message: str) -> None:
        if not self._warned:
            self._warned = True
            _LOG.warning(message)

    def _step(self, parameter: Tensor, bits: int) -> _Step:
        p, g = _local(parameter), _local(parameter.grad)  # type: ignore[arg-type]
        if g.is_sparse:
            raise InputError("sparse gradients are not supported; build the embedding with sparse=False")
        state = self.state[parameter]
        if not state:
            state |= self._initial(p, bits)
        quantized = self.rule.slots[0].name + ABSMAX in state
        return _Step(self.rule, p, g, state, bits if quantized else 32)

    def _initial(self, p: Tensor, bits: int) -> dict[str, Any]:
        """Zero states: of few bits where the tensor is large enough, else float32."""
        if bits not in (*BLOCKS, 32):
            raise InputError(f"optimizer states of {bits} bits were asked for; choose 8, 4 or 32")
        state: dict[str, Any] = {"step": 0}
        place: dict[str, Any] = {"device": p.device}
        if self.options.paged and p.is_cuda:
            place = {"device": "cpu", "pin_memory": True}
        small = bits == 32 or p.numel() < self.options.min_size
        for slot in self.rule.slots:
            if small:
                state[slot.name] = torch.zeros(p.shape, dtype=torch.float32, **place)
            else:
                count, blocks = layout(p.numel(), bits)
                state[slot.name] = torch.zeros(count, dtype=torch.uint8, **place)
                state[slot.name + ABSMAX] = torch.zeros(blocks, dtype=torch.float32, **place)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state dict of the same rule and options.

        Raises CheckpointError for states that are damaged, not finite, or of another model; this optimizer then stays
        as it was.
        """
        self._check(state_dict)
        super().load_state_dict(state_dict)
        self._known.clear()
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(saved, parameters, strict=True):
            if index in state_dict["state"]:
                self.state[parameter] = self._placed(state_dict["state"][index], _local(parameter))

    def _placed(self, values: dict[str, Any], p: Tensor) -> dict[str, Any]:
        """Copies of the states where this optimizer keeps them, in their own dtypes (torch takes the parameter's)."""
        empty = self._initial(p, 32)[self.rule.slots[0].name]
        placed: dict[str, Any] = {}
        for name, value in values.items():
            if isinstance(value, Tensor):
                copy = torch.empty(value.shape, dtype=value.dtype, device=empty.device, pin_memory=empty.is_pinned())
                value = copy.copy_(value)
            placed[name] = value
        return placed

    def _check(self, state_dict: dict[str, Any]) -> None:
        groups = state_dict.get("param_groups", [])
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in self.param_groups]:
            raise CheckpointError("the optimizer state has other parameter groups than this optimizer: another model's")
        bits = {index: group.get("bits", 8) for group in groups for index in group["params"]}
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(bits, parameters, strict=True):
            values = state_dict["state"].get(index)
            if values is None:
                continue
            for slot in self.rule.slots:
                if slot.name not in values or not isinstance(values.get("step"), int):
                    raise CheckpointError(
                        f"the optimizer state of parameter {index} lacks {slot.name!r} or its step; it is damaged or "
                        f"was saved by another optimizer than {type(self).__name__}"
                    )
                check_state(slot.name, values, _local(parameter).numel(), bits[index])


def _local(tensor: Tensor) -> Tensor:
    """The shard that this rank holds, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _step_plainly(one: _Step, hyper: Hyper) -> None:
    """The step in torch, on any device and for any width."""
    device, states = one.p.device, []
    for slot in one.rule.slots:
        state = one.state[slot.name].to(device)
        if one.bits != 32:
            absmax = one.state[slot.name + ABSMAX].to(device)
            state = decode_state(state, absmax, one.p.numel(), one.bits, slot.signed).view(one.p.shape)
        states.append(state)
    p = one.p.float() if one.p.dtype != torch.float32 else one.p
    one.rule.apply(p, one.g.to(torch.float32, copy=True), states, hyper)
    if p is not one.p:
        one.p.copy_(p)
    for slot, state in zip(one.rule.slots, states, strict=True):
        if one.bits == 32:
            one.state[slot.name].copy_(state)
            continue
        codes, absmax = encode_state(state, one.bits, slot.signed)
        one.state[slot.name].copy_(codes)
        one.state[slot.name + ABSMAX].copy_(absmax)


def _check_hyper(defaults: dict[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay"):
        if not float(defaults[name]) >= 0:
            raise InputError(f"{name} is {defaults[name]}; it must not be negative")
    if not all(0 <= beta < 1 for beta in defaults["betas"]):
        raise InputError(f"betas are {defaults['betas']}; each must be at least 0 and below 1")
