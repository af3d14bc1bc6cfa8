"""What `lowbit convert` writes: per target how a layer's tensors and the quantization_config are made, or why not."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import InputError
from lowbit.io import awq, bitsandbytes, compressed_tensors, fp8, gptq, llm_int8
from lowbit.io.stored import Stored
from lowbit.numerics.scheme import QuantScheme

TOOL = "lowbit:0.1.0"
FLOAT = "float"  # a plain checkpoint, which needs no Target


@dataclass(frozen=True)
class Target:
    """refusal: why the format can't hold these codes, or None. tensors: the entries for a module. config: the
    quantization_config for modules by scheme, linear modules that stay as they are, and the model's dtype.

    fallback: the scheme that "requantize" rounds to. beside: a file that readers want beside config.json.
    """

    refusal: Callable[[Stored], str | None]
    tensors: Callable[[str, Stored, torch.dtype], dict[str, Tensor]]
    config: Callable[[Mapping[str, QuantScheme], Sequence[str], torch.dtype], dict[str, Any]]
    fallback: str
    beside: str | None = None


def _compressed_tensors(name: str, stored: Stored, dtype: torch.dtype) -> dict[str, Tensor]:
    named = stored.weight.tensors() | dict(stored.inputs)
    return {f"{name}.{key}": tensor.contiguous() for key, tensor in named.items()}


def _bitsandbytes_config(schemes: Mapping[str, QuantScheme], skip: Sequence[str], dtype: torch.dtype) -> dict[str, Any]:
    kinds = set(schemes.values())
    if len(kinds) > 1:
        raise InputError(f"bitsandbytes has one scheme for all layers, and this model has {sorted(map(str, kinds))}")
    scheme = kinds.pop()
    if scheme.weights.format.kind == "codebook":
        return bitsandbytes.config_4bit(scheme, dtype, skip)
    return llm_int8.config_8bit(scheme, skip)


def _bitsandbytes_refusal(stored: Stored) -> str | None:
    scheme = stored.weight.scheme
    if scheme.activations is not None and scheme.activations.outlier is not None:
        return llm_int8.refusal(stored.weight)
    if scheme.weights.format.kind == "codebook":
        return None
    return f"bitsandbytes holds nf4, fp4 and LLM.int8() (int8-t6), not {scheme}"


def _bitsandbytes_tensors(name: str, stored: Stored, dtype: torch.dtype) -> dict[str, Tensor]:
    if stored.weight.scheme.weights.format.kind == "codebook":
        return bitsandbytes.tensors_4bit(name, stored.weight, dtype)
    return llm_int8.tensors_8bit(name, stored.weight)


def _gptq(version: int) -> Target:
    return Target(
        lambda stored: gptq.refusal(stored.weight, version),
        lambda name, stored, dtype: gptq.tensors_gptq(name, stored.weight, version),
        lambda schemes, skip, dtype: gptq.config_gptq(schemes, version, TOOL),
        "w4a16-g128",
        "quantize_config.json",
    )


TARGETS: dict[str, Target] = {
    "compressed-tensors": Target(
        lambda stored: compressed_tensors.refusal(stored.weight.scheme),
        _compressed_tensors,
        lambda schemes, skip, dtype: compressed_tensors.quantization_config(schemes, skip),
        "w4a16-g128",
    ),
    "gptq": _gptq(1),
    "gptq-v2": _gptq(2),
    "awq": Target(
        lambda stored: awq.refusal(stored.weight),
        lambda name, stored, dtype: awq.tensors_awq(name, stored.weight),
        lambda schemes, skip, dtype: awq.config_awq(schemes, skip),
        "w4a16-g128-asym",
    ),
    "fp8": Target(
        lambda stored: fp8.refusal(stored.weight.scheme),
        lambda name, stored, dtype: fp8.tensors_fp8(name, stored),
        lambda schemes, skip, dtype: fp8.config_fp8(schemes, skip),
        "fp8-tile128",
    ),
    "bitsandbytes": Target(
        _bitsandbytes_refusal,
        _bitsandbytes_tensors,
        _bitsandbytes_config,
        "nf4-b64",
    ),
}
