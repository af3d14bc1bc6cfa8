"""bitsandbytes' 4-bit checkpoints (0.50): nf4 and fp4 weights under the names that `Params4bit` saves.

    {name}.weight                                  uint8 [ceil(N K / 2), 1]   first code in the high nibble
    {name}.weight.absmax                           float32 [blocks], or uint8 where nested
    {name}.weight.quant_map                        float32 [16]
    {name}.weight.nested_absmax                    float32 [ceil(blocks / 256)]
    {name}.weight.nested_quant_map                 float32 [256]
    {name}.weight.quant_state.bitsandbytes__nf4    uint8, a JSON text: quant_type, blocksize, dtype, shape and, where
                                                   nested, nested_blocksize, nested_dtype, nested_offset

Bytes are those of bitsandbytes' `quant_state.as_dict(packed=True)`. Blocks run over the flattened weight, across rows.
bitsandbytes 0.50 itself misreads a weight whose in_features are not a multiple of the block size when it runs on a CPU
with AVX-512 (its generic code and CUDA read it right), so choose a block that divides where that matters.
"""

import json
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lowbit.errors import CheckpointError, InputError
from lowbit.io.stored import Reader, Stored
from lowbit.numerics.codebook import NESTED_BLOCK, NestedAbsmax, dynamic_map, levels_of
from lowbit.numerics.scheme import QuantScheme
from lowbit.tensors import PackedWeight

_STATE = "quant_state.bitsandbytes__"
_MAP_TOLERANCE = 1e-6  # the one by which bitsandbytes compares two maps


def tensors_4bit(name: str, packed: PackedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    """The checkpoint's entries for the layer `name`; dtype is the one a reader dequantizes to."""
    weights = packed.scheme.weights
    _require_codebook(packed.scheme)
    state: dict[str, object] = {
        "quant_type": weights.format.name,
        "blocksize": weights.group_size,
        "dtype": _dtype_name(dtype),
        "shape": list(packed.shape),
    }
    entries = {"quant_map": levels_of(weights.format.name)}
    if isinstance(packed.scale, NestedAbsmax):
        nested = packed.scale
        entries |= {"absmax": nested.codes, "nested_absmax": nested.absmax, "nested_quant_map": dynamic_map()}
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": nested.offset.item()}
    else:
        entries["absmax"] = packed.scale
    entries[_STATE + weights.format.name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    named = {f"{name}.weight": packed.codes.view(-1, 1)}
    return named | {f"{name}.weight.{entry}": tensor for entry, tensor in entries.items()}


def parse_4bit(name: str, tensors: Mapping[str, Tensor]) -> PackedWeight:
    """The weight of layer `name` out of a checkpoint's entries; the inverse of `tensors_4bit`.

    A weight stored as another dtype (bnb_4bit_quant_storage) is read as bytes. Raises CheckpointError where an entry is
    missing or holds something else than bitsandbytes writes.
    """
    state = _read_state(name, tensors)
    scheme, shape = _scheme_and_shape(name, state)
    weights = scheme.weights
    codes = _entry(tensors, f"{name}.weight").contiguous().view(torch.uint8).view(-1)
    absmax = _entry(tensors, f"{name}.weight.absmax")
    elements, blocks = shape[0] * shape[1], -(-shape[0] * shape[1] // (weights.group_size or 1))
    _check_count(f"{name}.weight", codes, -(-elements // 2))
    _check_count(f"{name}.weight.absmax", absmax, blocks)
    _check_map(f"{name}.weight.quant_map", tensors, levels_of(weights.format.name))
    if absmax.dtype != (torch.uint8 if weights.nested else torch.float32):
        raise CheckpointError(f"{name}.weight.absmax is {absmax.dtype}, which is not what its quant_state says")
    if not weights.nested:
        return PackedWeight(scheme, shape, codes, absmax)
    nested_absmax = _entry(tensors, f"{name}.weight.nested_absmax")
    _check_count(f"{name}.weight.nested_absmax", nested_absmax, -(-blocks // NESTED_BLOCK))
    if nested_absmax.dtype != torch.float32:
        raise CheckpointError(f"{name}.weight.nested_absmax is {nested_absmax.dtype}, not float32")
    _check_map(f"{name}.weight.nested_quant_map", tensors, dynamic_map())
    if not isinstance(state["nested_offset"], int | float):
        raise CheckpointError(f"the quant_state of {name}.weight has a nested_offset that is no number")
    offset = torch.tensor(state["nested_offset"], dtype=torch.float32, device=absmax.device)
    return PackedWeight(scheme, shape, codes, NestedAbsmax(absmax, nested_absmax, offset))


def scheme_4bit(name: str, tensors: Mapping[str, Tensor]) -> QuantScheme:
    """The scheme of layer `name`, out of its quant_state entry alone. Raises CheckpointError as `parse_4bit` does."""
    return _scheme_and_shape(name, _read_state(name, tensors))[0]


class Bitsandbytes4BitReader(Reader):
    """Reads nf4 and fp4 with any quant_storage, plain or double quantized."""

    endings = (".weight",)

    def _modules(self) -> dict[str, None]:
        end = ".weight.absmax"
        return dict.fromkeys(name.removesuffix(end) for name in self.shapes if name.endswith(end))

    def names(self, module: str) -> tuple[str, ...]:
        entries = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", f"{_STATE}nf4", f"{_STATE}fp4")
        named = (f"{module}.weight", *(f"{module}.weight.{entry}" for entry in entries))
        return tuple(name for name in named if name in self.shapes)

    def describe(self, module: str) -> str:
        states = (name for name in self.names(module) if _STATE in name)
        return str(scheme_4bit(module, {name: self.get(name) for name in states}))  # a few bytes of JSON

    def read(self, module: str) -> Stored:
        return Stored(parse_4bit(module, {name: self.get(name) for name in self.names(module)}))


def config_4bit(scheme: QuantScheme, dtype: torch.dtype, skip: Sequence[str]) -> dict[str, object]:
    """The quantization_config from which transformers and vLLM read such a checkpoint.

    dtype is the one to compute in; skip names every linear layer that is not quantized ("lm_head", for one).
    """
    _require_codebook(scheme)
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": scheme.weights.format.name,
        "bnb_4bit_use_double_quant": scheme.weights.nested,
        "bnb_4bit_compute_dtype": _dtype_name(dtype),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": list(skip),
        "llm_int8_threshold": 6.0,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
    }


def _require_codebook(scheme: QuantScheme) -> None:
    if scheme.weights.format.kind != "codebook":
        raise InputError(
            f"scheme {scheme} can't be written as a bitsandbytes 4-bit checkpoint, which holds nf4 and fp4 only; "
            "choose one of those, for example nf4-b64, or write compressed-tensors"
        )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _entry(tensors: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in tensors:
        raise CheckpointError(f"the checkpoint has no {key}, which a bitsandbytes 4-bit layer needs")
    return tensors[key]


def _read_state(name: str, tensors: Mapping[str, Tensor]) -> dict:
    """The JSON text in the one quant_state entry of layer `name`."""
    prefix = f"{name}.weight.{_STATE}"
    keys = [prefix + kind for kind in ("nf4", "fp4") if prefix + kind in tensors]
    if len(keys) != 1:
        raise CheckpointError(f"{name}.weight needs one entry {prefix}nf4 or ...fp4, the checkpoint has {len(keys)}")
    try:
        return json.loads(bytes(tensors[keys[0]].reshape(-1).tolist()))
    except ValueError as error:  # bytes that are no UTF-8 or no JSON
        raise CheckpointError(f"{keys[0]} is not a JSON text ({error})") from error


def _scheme_and_shape(name: str, state: dict) -> tuple[QuantScheme, tuple[int, int]]:
    try:
        rows, columns = (int(size) for size in state["shape"])
        is_nested = "nested_offset" in state
        if is_nested and state["nested_blocksize"] != NESTED_BLOCK:
            raise CheckpointError(f"nested blocks of {state['nested_blocksize']}, not {NESTED_BLOCK}")
        scheme = QuantScheme.parse(f"{state['quant_type']}-b{state['blocksize']}" + "-dq" * is_nested)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the quant_state of {name}.weight is none that lowbit reads: {error}") from error
    return scheme, (rows, columns)


def _check_count(key: str, tensor: Tensor, expected: int) -> None:
    if tensor.numel() != expected:
        raise CheckpointError(
            f"{key} holds {tensor.numel()} values where its quant_state needs {expected}; "
            "get a clean copy of the checkpoint"
        )


def _check_map(key: str, tensors: Mapping[str, Tensor], expected: Tensor) -> None:
    """Raise unless the stored levels are the ones that codes are looked up in here."""
    levels = _entry(tensors, key).float().cpu()
    if levels.shape != expected.shape or (levels - expected).abs().max() > _MAP_TOLERANCE:
        raise CheckpointError(f"{key} holds other levels than bitsandbytes' own, which lowbit can't read")
