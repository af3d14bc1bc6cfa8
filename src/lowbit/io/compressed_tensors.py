"""The quantization_config of a compressed-tensors checkpoint: which disk module stands under which scheme.

The smallest dictionary is written: readers of other versions refuse keys they don't know. One scheme is a group that
targets "Linear", with everything else in `ignore`; several schemes are groups that name their modules. The tensors
themselves need no writer: PackedWeight keeps them as this format does (tensors.py).

    format                 weights          tensors beside weight_scale
    pack-quantized         integers, a16    weight_packed, weight_shape, weight_zero_point packed along N
    int-quantized          integers, a8     weight, weight_zero_point, input_scale, input_zero_point
    float-quantized        fp8              weight, input_scale
    nvfp4-pack-quantized   nvfp4            weight_packed, weight_global_scale, input_global_scale
    mxfp4-pack-quantized   mxfp4            weight_packed
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lowbit.errors import CheckpointError, SchemeError
from lowbit.numerics.formats import FP8_E4M3, INT_BITS, MXFP4, NVFP4, NumberFormat, int_format
from lowbit.numerics.scheme import QuantScheme, TensorScheme
from lowbit.numerics.storage import storage_of

FORMATS = {"packed": "pack-quantized", "int8": "int-quantized", "fp8": "float-quantized"}
_FP4_FORMATS = {NVFP4: "nvfp4-pack-quantized", MXFP4: "mxfp4-pack-quantized"}
_STRATEGIES = ("tensor", "channel", "group", "token", "block", "tensor_group")


def format_of(scheme: QuantScheme) -> str:
    """compressed-tensors' name for how a weight under `scheme` is stored."""
    return _FP4_FORMATS.get(scheme.weights.format) or FORMATS[storage_of(scheme)]


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
            group["format"] = format_of(scheme)
        groups[f"group_{index}"] = group
    return {
        "quant_method": "compressed-tensors",
        "format": format_of(next(iter(by_scheme))) if single else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(ignore),
    }


def _arguments(scheme: TensorScheme) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "num_bits": scheme.bits,
        "type": scheme.format.kind,
        "symmetric": scheme.symmetric,
        "strategy": "tensor_group" if scheme.format == NVFP4 else scheme.granularity,
        "dynamic": "local" if scheme.format == NVFP4 and scheme.dynamic else scheme.dynamic,
    }
    if scheme.granularity == "tile":
        return arguments | {"strategy": "block", "block_structure": [scheme.group_size, scheme.group_size]}
    if scheme.format in (NVFP4, MXFP4):
        arguments["scale_dtype"] = "torch.float8_e4m3fn" if scheme.format == NVFP4 else "torch.uint8"
    return arguments | ({"group_size": scheme.group_size} if scheme.group_size else {})


def refusal(scheme: QuantScheme) -> str | None:
    """Why compressed-tensors can't hold codes under `scheme`, or None."""
    weights, activations = scheme.weights, scheme.activations
    if weights.format.kind == "codebook":
        return f"compressed-tensors has no form for {scheme}; write bitsandbytes"
    if weights.ordered:
        return "compressed-tensors 0.20 refuses groups that follow an order (act-order)"
    if activations is not None and activations.outlier is not None:
        return "compressed-tensors has no outlier columns (LLM.int8())"
    if activations is not None and activations.searched:
        return f"readers of compressed-tensors round activations without the search of {scheme}"
    return None


def parse_config(config: Mapping[str, Any], modules: Iterable[str]) -> dict[str, QuantScheme]:
    """The scheme of each quantized disk module under `config`. Raises CheckpointError for what lowbit can't read."""
    declared = config.get("config_groups")
    if not isinstance(declared, dict) or not all(isinstance(group, dict) for group in declared.values()):
        raise CheckpointError("quantization_config has no config_groups; get a clean copy of the model")
    groups = [(_targets(group), _scheme(group)) for group in declared.values()]
    schemes = {}
    for module in modules:
        scheme = next((scheme for targets, scheme in groups if any(_matches(module, t) for t in targets)), None)
        if scheme is None:
            raise CheckpointError(f"{module} is quantized, but no group of quantization_config names it")
        schemes[module] = scheme
    return schemes


def _targets(group: Mapping[str, Any]) -> list[str]:
    targets = group.get("targets")
    return [str(target) for target in targets] if isinstance(targets, list) else []


def _matches(module: str, target: str) -> bool:
    if not target.startswith("re:"):
        return target in ("Linear", module)
    try:
        return re.match(target[3:], module) is not None
    except re.error as error:
        raise CheckpointError(f"quantization_config has the target {target!r}: {error}") from None


def _scheme(group: Mapping[str, Any]) -> QuantScheme:
    weights, activations = group.get("weights"), group.get("input_activations")
    if not isinstance(weights, dict) or not isinstance(activations, dict | None):
        raise CheckpointError(
            "one of config_groups in quantization_config has no weights, and lowbit reads nothing else"
        )
    scheme = QuantScheme(_tensor_scheme(weights), _tensor_scheme(activations) if activations else None)
    try:
        if QuantScheme.parse(str(scheme)) == scheme:
            return scheme
    except SchemeError:
        pass
    raise CheckpointError(f"lowbit has no scheme for weights of {weights} beside activations of {activations}")


def _tensor_scheme(arguments: Mapping[str, Any]) -> TensorScheme:
    strategy = arguments.get("strategy") or ("group" if arguments.get("group_size") else "tensor")
    number_format, size = _number_format(arguments), arguments.get("group_size")
    if strategy == "block":
        block = arguments.get("block_structure")
        is_square = isinstance(block, list) and len(block) == 2 and block[0] == block[1]
        size = block[1] if isinstance(block, list) and is_square else None
        number_format = number_format if is_square and number_format == FP8_E4M3 else None
    if strategy in ("group", "tensor_group", "block") and (type(size) is not int or size <= 0):
        number_format = None
    if number_format is None or strategy not in _STRATEGIES:
        raise CheckpointError(f"lowbit does not read compressed-tensors weights of {dict(arguments)}")
    granularity: Any = {"tensor_group": "group", "block": "tile"}.get(strategy, strategy)
    return TensorScheme(
        number_format,
        granularity,
        arguments.get("symmetric") is not False,
        size if granularity in ("group", "tile") else None,
        bool(arguments.get("dynamic", False)),
        ordered=arguments.get("actorder") in ("group", "dynamic", True),
    )


def _number_format(arguments: Mapping[str, Any]) -> NumberFormat | None:
    kind, bits, size = arguments.get("type", "int"), arguments.get("num_bits"), arguments.get("group_size")
    if kind == "int" and type(bits) is int and bits in INT_BITS:
        return int_format(bits)
    if kind == "float" and bits == 8:
        return FP8_E4M3
    if kind == "float" and bits == 4:
        return {16: NVFP4, 32: MXFP4}.get(size)  # type: ignore[arg-type]
    return None
