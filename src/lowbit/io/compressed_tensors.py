"""The quantization_config of a compressed-tensors checkpoint: which disk module stands under which scheme.

The smallest dictionary is written: readers of other versions refuse keys they don't know. One scheme is a group that
targets "Linear", with everything else in `ignore`; several schemes are groups that name their modules. The tensors
themselves need no writer: PackedWeight keeps them as this format does (tensors.py).

    format            weights                      tensors beside weight_scale
    pack-quantized    integers, a16                weight_packed, weight_shape, weight_zero_point packed along N
    int-quantized     integers, a8                 weight, weight_zero_point, input_scale, input_zero_point
    float-quantized   fp8                          weight
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lowbit.errors import CheckpointError
from lowbit.numerics.formats import FP8_E4M3, INT_BITS, int_format
from lowbit.numerics.scheme import Granularity, QuantScheme, TensorScheme
from lowbit.tensors import storage_of

FORMATS = {"packed": "pack-quantized", "int8": "int-quantized", "fp8": "float-quantized"}


def quantization_config(schemes: Mapping[str, QuantScheme], ignore: Iterable[str]) -> dict[str, Any]:
    """The config for disk modules under `schemes`; ignore names the linear modules that stay as they were."""
    by_scheme: dict[QuantScheme, list[str]] = {}
    for name, scheme in schemes.items():
        by_scheme.setdefault(scheme, []).append(name)
    single = len(by_scheme) == 1
    groups = {}
    for index, (scheme, names) in enumerate(by_scheme.items()):
        group: dict[str, Any] = {"targets": ["Linear"] if single else names, "weights": _arguments(scheme.weights)}
        if scheme.activations is not None:
            group["input_activations"] = _arguments(scheme.activations)
        if not single:
            group["format"] = FORMATS[storage_of(scheme)]
        groups[f"group_{index}"] = group
    return {
        "quant_method": "compressed-tensors",
        "format": FORMATS[storage_of(next(iter(by_scheme)))] if single else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(ignore),
    }


def _arguments(scheme: TensorScheme) -> dict[str, Any]:
    arguments = {
        "num_bits": scheme.bits,
        "type": scheme.format.kind,
        "symmetric": scheme.symmetric,
        "strategy": scheme.granularity,
        "dynamic": scheme.dynamic,
    }
    return arguments | ({"group_size": scheme.group_size} if scheme.group_size else {})


def parse_config(config: Mapping[str, Any], modules: Iterable[str]) -> dict[str, QuantScheme]:
    """The scheme of each quantized disk module under `config`. Raises CheckpointError for what lowbit can't read."""
    try:
        groups = [
            ([str(target) for target in group["targets"]], _scheme(group))
            for group in config.get("config_groups", {}).values()
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"config_groups of quantization_config can't be read ({error!r})") from error
    schemes = {}
    for module in modules:
        scheme = next((scheme for targets, scheme in groups if any(_matches(module, t) for t in targets)), None)
        if scheme is None:
            raise CheckpointError(f"{module} is quantized, but no group of quantization_config names it")
        schemes[module] = scheme
    return schemes


def _matches(module: str, target: str) -> bool:
    if target.startswith("re:"):
        return re.match(target[3:], module) is not None
    return target in ("Linear", module)


def _scheme(group: Mapping[str, Any]) -> QuantScheme:
    activations = group.get("input_activations")
    return QuantScheme(_tensor_scheme(group["weights"]), _tensor_scheme(activations) if activations else None)


def _tensor_scheme(arguments: Mapping[str, Any]) -> TensorScheme:
    kind, bits = arguments.get("type", "int"), arguments["num_bits"]
    granularity: Granularity = arguments.get("strategy") or ("group" if arguments.get("group_size") else "tensor")
    known = (kind == "int" and bits in INT_BITS) or (kind == "float" and bits == 8)
    if not known or granularity not in ("tensor", "channel", "group", "token") or arguments.get("actorder") == "group":
        raise CheckpointError(f"lowbit does not read compressed-tensors weights of {dict(arguments)}")
    return TensorScheme(
        int_format(bits) if kind == "int" else FP8_E4M3,
        granularity,
        arguments.get("symmetric", True),
        arguments.get("group_size") if granularity == "group" else None,
        bool(arguments.get("dynamic", False)),
    )
