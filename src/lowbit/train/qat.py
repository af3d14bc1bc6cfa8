"""Quantization-aware training: `prepare` puts fake quantization into a model, `convert` makes it real.

    model = qat.prepare(model, QuantScheme.parse("w4a16-g64"))     in place; parameters stay the same objects
    ... train as ever: optimizer, autocast, checkpointing, torch.compile, Trainer, FSDP2 ...
    model = qat.convert(model)                                     in place; QuantLinear, packed

Linears of the decoder blocks are chosen as `lowbit.quantize` chooses them; in a module without a config (a classifier)
all of them are. `start` takes scales and zero-points, and the weights that go with them, from a model that a solver
such as GPTQ quantized already: training then begins where it ended. `reopen(quantized)` makes the quantized model
itself trainable, with all that its method did elsewhere: biases that it corrected, norms that it folded, a residual
stream and inputs that it rotated. Experts stored as one 3-D parameter are left alone, with a warning.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowbit.algorithms.scales import ScaleSearch, search_scale
from lowbit.errors import InputError, SchemeError
from lowbit.model.select import Rule, select
from lowbit.nn.fake import FakeOptions, FakeQuantLinear
from lowbit.nn.linear import QuantLinear
from lowbit.numerics.scheme import QuantScheme, check_fits
from lowbit.observe.capture import find_blocks
from lowbit.tensors import check_finite

_LOG = logging.getLogger("lowbit")
Initial = Literal["mse", "minmax", "lsq"]
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class QatOptions:
    """fake: what is learned, and how activations are watched. initial: where scales begin without a `start`.

    mse: the clip that loses least, searched; minmax: the smallest and largest weight; lsq: 2 mean |w| / sqrt(high).
    """

    fake: FakeOptions = field(default_factory=FakeOptions)
    initial: Initial = "mse"


@torch.no_grad()
def prepare(
    model: Model,
    scheme: QuantScheme,
    rules: Sequence[Rule] = (),
    options: QatOptions = QatOptions(),
    start: nn.Module | None = None,
) -> Model:
    """`model` with its linears replaced by FakeQuantLinear, in place.

    Raises SchemeError for schemes that are not on integer grids or don't fit, InputError where nothing is chosen or
    `start` does not fit the model.
    """
    chosen = _schemes(model, scheme, rules)
    for name, one in chosen.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        check_finite(layer.weight, f"{name}.weight")
        grid = _initial_grid(layer.weight, one, options) if start is None else _start_grid(layer, name, one, start)
        model.set_submodule(name, FakeQuantLinear(layer, one, options.fake, grid))
    return model


@torch.no_grad()
def reopen(model: Model, options: QatOptions = QatOptions()) -> Model:
    """`model` with every QuantLinear replaced by the FakeQuantLinear of the same numbers, in place.

    Weights are float32 where options.fake.masters says so, else in the dtype of their scales. Static activations are
    watched anew. Raises InputError where no layer is quantized, SchemeError where one is not on an integer grid.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    if not layers:
        raise InputError("the model holds no quantized layer to train on: call lowbit.qat.prepare on a float model")
    for name, layer in layers.items():
        _check_integer(layer.scheme)
        packed = layer.packed
        assert isinstance(packed.scale, Tensor)
        dtype = torch.float32 if options.fake.masters else packed.scale.dtype
        plain = nn.Linear(layer.in_features, layer.out_features, False, "meta")
        plain.weight, plain.bias = nn.Parameter(packed.dequantize(dtype)), layer.bias
        fake = replace(options.fake, scale_dtype=options.fake.scale_dtype or packed.scale.dtype)
        opened = FakeQuantLinear(plain, layer.scheme, fake, (packed.scale, packed.zero_points()))
        opened.rotation = layer.rotation
        model.set_submodule(name, opened.train(layer.training))
    return model


def convert(model: Model) -> Model:
    """`model` with every FakeQuantLinear replaced by the QuantLinear that holds its numbers, in place.

    Its outputs equal those before, up to the rounding of sums. Raises InputError where there is nothing to convert, or
    static activations have not been watched for long enough.
    """
    fakes = {name: module for name, module in model.named_modules() if isinstance(module, FakeQuantLinear)}
    if not fakes:
        raise InputError("the model holds no fake-quantized layer: call lowbit.qat.prepare first, and train")
    for name, fake in fakes.items():
        if fake.watches and int(fake.input_seen) <= fake.options.warmup:
            raise InputError(
                f"{name} has seen {int(fake.input_seen)} training forwards, and its static activations need more than "
                f"the warm-up of {fake.options.warmup}: train longer, or lower FakeOptions.warmup"
            )
        check_finite(fake.weight, f"{name}.weight")
        model.set_submodule(name, fake.quantized())
    return model


def scale_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The learned scales, zero-points and ranges: they want no weight decay, and their own learning rate."""
    names = ("weight_scale", "weight_zero", "weight_low", "weight_high")
    fakes = [module for module in model.modules() if isinstance(module, FakeQuantLinear)]
    return [p for module in fakes for name, p in module.named_parameters(recurse=False) if name in names]


def _schemes(model: nn.Module, scheme: QuantScheme, rules: Sequence[Rule]) -> dict[str, QuantScheme]:
    if isinstance(model, PreTrainedModel):
        chosen = select(model, find_blocks(model)[0], scheme, rules).schemes
        modules = dict(model.named_modules())
        if experts := [name for name in chosen if name not in modules]:
            _LOG.warning("%d expert parameters stay as they are, the first is %s", len(experts), experts[0])
        chosen = {name: one for name, one in chosen.items() if name in modules}
    else:
        chosen = {name: scheme for name, module in model.named_modules() if type(module) is nn.Linear}
        for rule in rules:
            chosen |= {name: rule.scheme or scheme for name in chosen if fnmatchcase(name, rule.glob)}
            chosen = {name: one for name, one in chosen.items() if rule.scheme or not fnmatchcase(name, rule.glob)}
    if not chosen:
        raise InputError("the model has no linear layer to train in low precision")
    for name, one in chosen.items():
        _check_integer(one)
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        check_fits(one.weights, layer.in_features, name)
    return chosen


def _check_integer(scheme: QuantScheme) -> None:
    if scheme.weights.format.kind != "int":
        raise SchemeError(f"training learns integer grids, and {scheme} is none; choose one such as w4a16-g64")


def _initial_grid(w: Tensor, scheme: QuantScheme, options: QatOptions) -> tuple[Tensor, Tensor | None]:
    weights = scheme.weights
    search = ScaleSearch(norm=2.0) if options.initial == "mse" else None
    scale, zero = search_scale(w.float(), weights, torch.float32, search)
    if options.initial == "lsq" and weights.symmetric:
        elements = w.numel() // scale.numel()
        mean = w.float().abs().reshape(-1, elements).mean(-1).view(scale.shape)
        scale = 2 * mean / weights.format.high**0.5
    return scale, zero


def _start_grid(layer: nn.Linear, name: str, scheme: QuantScheme, start: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The grid of start's layer of that name, whose weights `layer` takes over."""
    found = dict(start.named_modules()).get(name)
    if not isinstance(found, QuantLinear) or found.scheme != scheme or _size(found) != _size(layer):
        what = f"has {found}" if found is not None else "lacks it"
        raise InputError(f"{name} shall start from a layer quantized as {scheme}, and the start {what}")
    packed = found.packed
    layer.weight.copy_(packed.dequantize(layer.weight.dtype))
    assert isinstance(packed.scale, Tensor)
    return packed.scale.to(layer.weight.device), packed.zero_points()


def _size(layer: nn.Linear) -> tuple[int, int]:
    return layer.out_features, layer.in_features
