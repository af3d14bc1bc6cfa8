"""What every reader gives: a layer's packed weight, the calibrated grid of its input, and words about what it met."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lowbit.errors import CheckpointError
from lowbit.numerics.hadamard import Hadamard
from lowbit.tensors import PackedWeight

Get = Callable[[str], Tensor]


@dataclass(frozen=True)
class Stored:
    """One disk module's weight [N, K] with its static activation grid (input_scale, input_zero_point), if any.

    rotation: what the layer does to its input first.
    """

    weight: PackedWeight
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    rotation: Hadamard | None = None


class Reader:
    """How one foreign format keeps quantized modules; made by reading.reader_of.

    modules: disk modules that are quantized matrices. experts: disk names of 3-D parameters whose matrices are.
    warnings: what a person should know, filled while reading. A format's own class names its tensors' endings, the
    codes' first, and reads a module.
    """

    endings: tuple[str, ...] = ()

    def __init__(self, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], get: Get) -> None:
        """shapes: every tensor of the checkpoint with its shape; get reads one."""
        self.config, self.shapes, self.get = config, shapes, get
        self.warnings: list[str] = []
        self.modules: Collection[str] = self._modules()
        self.experts: Collection[str] = ()

    def _modules(self) -> Collection[str]:
        first = self.endings[0]
        return dict.fromkeys(name.removesuffix(first) for name in self.shapes if name.endswith(first))

    def names(self, module: str) -> tuple[str, ...]:
        """The disk tensors that `read` looks at; the first of them is the one with the codes."""
        return tuple(f"{module}{end}" for end in self.endings if f"{module}{end}" in self.shapes)

    def read(self, module: str) -> Stored:
        """The module's weight. Raises CheckpointError where tensors are missing or don't fit each other."""
        raise CheckpointError(f"{module} is no quantized matrix of its own")

    def describe(self, module: str) -> str:
        """The scheme of a module as far as names, shapes and the config tell it, without reading a weight."""
        return str(self.config.get("quant_method", "quantized"))

    def rotated(self) -> str | None:
        """A module that turns its input at run time, or None."""
        return None

    def read_experts(self, name: str) -> list[Stored]:
        """The matrices of a 3-D parameter, [N, K] each. Raises CheckpointError."""
        raise CheckpointError(f"{name} is no group of quantized experts")

    def tensors(self, module: str) -> dict[str, Tensor]:
        """The module's tensors by their own names, without the module's."""
        return {name[len(module) + 1 :]: self.get(name) for name in self.names(module)}

    def say(self, words: str) -> None:
        """Keep a warning once."""
        if words not in self.warnings:
            self.warnings.append(words)


def need(condition: bool, module: str, what: str) -> None:
    """Raise CheckpointError about `module` unless `condition` holds."""
    if not condition:
        raise CheckpointError(f"{module}: {what}; the checkpoint is damaged or its config describes another one")


def whole_number(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """config[key] as an integer. Raises CheckpointError for anything else."""
    value = config.get(key, default)
    if type(value) is not int:
        raise CheckpointError(f"quantization_config says {key} = {value!r}, which is no whole number")
    return value
