"""Which matrices of a block read which inputs: linears that share one input, and the tokens routed to each expert.

Linears that read the very same tensor (q, k and v; gate and up) share the statistics of their input, above all GPTQ's
Hessian X^T X. They are found by identity in one forward of the block: same memory, same version, all inputs kept alive
meanwhile so that no address is used twice. Equal values at different addresses are not matched.

Experts are 3-D parameters [E, out, in] or [E, in, out] (gpt_oss, llama4), multiplied slice by slice inside their
module's forward, where no hook can see it. They are watched at the level of aten's matrix products: an operand that
lies inside a 3-D parameter tells the expert by its address and the layout by its strides. This needs neither names nor
per-model code. transformers' experts are set to "eager", their plain forward, for the time of the observation, because
the grouped implementations sort or gather tokens first.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lowbit.observe.blocks import Block

_ATEN: Any = torch.ops.aten
# matrix products and the position of their first factor
_PRODUCTS = {_ATEN.mm.default: 0, _ATEN.bmm.default: 0, _ATEN.addmm.default: 1, _ATEN.baddbmm.default: 1}


class InputGroups(NamedTuple):
    """groups: names of linears by shared input, in order of execution; idle: those that were not run, each of them
    also a group of its own at the end."""

    groups: list[list[str]]
    idle: list[str]


def input_groups(block: Block, names: Sequence[str]) -> InputGroups:
    """Groups the named linears (dotted names inside the block) by the input tensor they read in the first batch."""
    read: dict[str, list[tuple]] = {}
    alive: list[Tensor] = []

    def watch(name: str) -> Callable[[nn.Module, tuple, dict[str, Any]], None]:
        def keep(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["input"]
            if x.numel() > 0:
                alive.append(x)
                read.setdefault(name, []).append(_identity(x))  # now: the version changes with the tensor

        return keep

    with ExitStack() as hooks:
        for name in names:
            module = block.module.get_submodule(name)
            hooks.callback(module.register_forward_pre_hook(watch(name), with_kwargs=True).remove)
        args, kwargs = block.arguments(0)
        with torch.no_grad():
            block.module(*args, **kwargs)
    groups: dict[tuple, list[str]] = {}
    for name, inputs in read.items():
        groups.setdefault(tuple(inputs), []).append(name)
    idle = [name for name in names if name not in read]
    return InputGroups([*groups.values(), *([name] for name in idle)], idle)


def _identity(x: Tensor) -> tuple:
    """Equal for two living tensors exactly when they are the same rows [M, K] in the same memory, unchanged between."""
    layout = () if x.is_contiguous() else (x.shape, x.stride())
    return x.data_ptr(), x._version, x.dtype, x.numel(), x.shape[-1], layout


class ExpertInput(NamedTuple):
    """x [M, K], the tokens that expert `expert` of the 3-D parameter `name` multiplies; M differs per expert.

    in_axis is the parameter's axis of length K: 2 for [E, out, in], 1 for [E, in, out].
    """

    name: str
    expert: int
    x: Tensor
    in_axis: int


@contextmanager
def expert_inputs(block: nn.Module, receive: Callable[[ExpertInput], None]) -> Iterator[None]:
    """While open, calls receive for every product of tokens with one expert of a 3-D parameter inside block.

    Names are dotted names inside block ("mlp.experts.gate_up_proj"). An expert without tokens is not reported, nor is
    a parameter that the forward copies or reshapes before the product: whoever counts must expect to miss some.
    """
    parameters = {name: p for name, p in block.named_parameters() if p.dim() == 3}
    with _eager_experts(block), _Products(parameters, receive):
        yield


@contextmanager
def _eager_experts(block: nn.Module) -> Iterator[None]:
    """transformers' experts run their plain per-expert forward, for the time of the context."""
    configs = {id(m.config): m.config for m in block.modules() if hasattr(m, "config")}
    selected = [(c, c._experts_implementation) for c in configs.values() if hasattr(c, "_experts_implementation")]
    try:
        for config, _ in selected:
            config._experts_implementation = "eager"
        yield
    finally:
        for config, implementation in selected:
            config._experts_implementation = implementation


class _Products(TorchDispatchMode):
    """Sees aten's matrix products and reports those with a slice of one of the parameters."""

    def __init__(self, parameters: dict[str, nn.Parameter], receive: Callable[[ExpertInput], None]) -> None:
        super().__init__()
        self._parameters = parameters
        self._receive = receive

    def __torch_dispatch__(
        self, op: Any, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if op in _PRODUCTS:
            left, right = args[_PRODUCTS[op] :][:2]  # [..., M, K], [..., K, N]
            if not self._report(left, right):
                self._report(right.transpose(-1, -2), left.transpose(-1, -2))
        return op(*args, **(kwargs or {}))

    def _report(self, x: Tensor, w: Tensor) -> bool:
        """Whether w [K, N] or [E, K, N] lies in one of the parameters; if so its inputs x are reported."""
        if w.dim() == 3:
            slices = zip(x, w, strict=True)
            return all(self._report(x_e, w_e) for x_e, w_e in slices)  # ends at once where w is no parameter
        for name, parameter in self._parameters.items():
            offset = (w.data_ptr() - parameter.data_ptr()) // parameter.element_size()
            if 0 <= offset < parameter.numel() and w.dtype == parameter.dtype:
                in_axis = 2 if w.stride(0) == parameter.stride(2) else 1
                if x.shape[0] > 0:
                    self._receive(ExpertInput(name, offset // parameter.stride(0), x, in_axis))
                return True
        return False
