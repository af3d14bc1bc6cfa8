"""A second opinion: what a checkpoint's tensors stand for, decoded in numpy straight from the formats' descriptions.

Shares no code with the readers, the writers or PackedWeight, so that a conversion is checked by something that did not
make it. Integers decode to unsigned codes, zero-points and scales; everything decodes to float32.

    words -> codes    little-endian bit streams (compressed-tensors, GPTQ), nibbles in AWQ's order (AWQ)
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowbit.errors import CheckpointError
from lowbit.io.compressed_tensors import quantization_config
from lowbit.io.decoded import Array, Decoded, Stream, bit_stream
from lowbit.numerics.codebook import NESTED_BLOCK, dynamic_map, levels_of
from lowbit.numerics.scheme import QuantScheme

Get = Callable[[str], Tensor]


def numpy_of(tensor: Tensor) -> Array:
    """The tensor's values; 16- and 8-bit floats widened to float32."""
    if tensor.is_floating_point() and tensor.dtype != torch.float64:
        return tensor.float().numpy()
    return tensor.numpy()


def _unsigned(q: Array, offset: int) -> Callable[[slice], Array]:
    """What gives some rows of int8 codes, plus offset."""
    return lambda rows: (q[rows].astype(np.int16) + offset).astype(np.uint8)


def _gptq(get: Get, config: Mapping[str, Any], module: str) -> Decoded:
    qweight, qzeros = numpy_of(get(f"{module}.qweight")), numpy_of(get(f"{module}.qzeros"))
    scale, g_idx = numpy_of(get(f"{module}.scales")).T, numpy_of(get(f"{module}.g_idx"))
    columns, rows = len(g_idx), qweight.shape[1]
    bits = qweight.shape[0] * 32 // columns
    zero = bit_stream(qzeros, bits, rows).T
    middle = 2 ** (bits - 1)
    if config.get("sym", True) is not False and np.isin(zero, (middle - 1, middle)).all() and np.ptp(zero) == 0:
        zero = np.full_like(zero, middle)  # symmetric: the value tells, not the config
    elif (config.get("checkpoint_format") or config.get("format") or "gptq") != "gptq_v2":
        zero = _one_more(qzeros, bits, rows)
    return Decoded((rows, columns), Stream(qweight.T, bits, columns), zero, scale, g_idx.astype(np.int64))


def _one_more(qzeros: Array, bits: int, rows: int) -> Array:
    """v1's zero-points plus one: carried through each 32-bit word, but field by field at 3 bits. uint8 [N, G]."""
    if bits == 3:
        return ((bit_stream(qzeros, bits, rows) + 1) & 7).T
    ones = np.uint32(sum(1 << shift for shift in range(0, 32, bits)))
    return bit_stream((qzeros.view(np.uint32) + ones).view(np.int32), bits, rows).T


def _awq(get: Get, config: Mapping[str, Any], module: str) -> Decoded:
    if str(config.get("version", "gemm")).lower() == "gemv":
        return _awq_gemv(get, config, module)
    scale, qweight = numpy_of(get(f"{module}.scales")).T, numpy_of(get(f"{module}.qweight"))
    zero, columns = _awq_columns(numpy_of(get(f"{module}.qzeros"))).T, len(qweight)

    def codes(rows: slice) -> Array:
        start, stop, _ = rows.indices(len(scale))
        words = qweight[:, start // 8 : stop // 8]  # [K, R/8]
        return np.ascontiguousarray(_awq_columns(words).T)

    return Decoded((len(scale), columns), codes, zero, scale, _runs(columns, scale.shape[1]))


def _awq_gemv(get: Get, config: Mapping[str, Any], module: str) -> Decoded:
    qweight, columns = numpy_of(get(f"{module}.qweight")), 8 * get(f"{module}.qweight").shape[1]
    size = config.get("group_size") or config["q_group_size"]
    groups = 1 if size == -1 else columns // size
    zero = bit_stream(numpy_of(get(f"{module}.qzeros")), 4, groups)
    scale = numpy_of(get(f"{module}.scales"))[:, :groups]
    codes = Stream(qweight, 4, columns)
    return Decoded((len(qweight), columns), codes, zero, scale, _runs(columns, groups))


def _awq_columns(words: Array) -> Array:
    """uint8 codes [R, N] of int32 words [R, N/8]: the low half of a word has even columns, the high half odd ones."""
    halves = np.ascontiguousarray(words).view(np.uint16).reshape(len(words), -1, 2)
    spread: Array = halves.astype(np.uint64)  # four nibbles -> every other byte of eight
    spread = (spread | (spread << 24)) & 0x000000FF000000FF
    spread = (spread | (spread << 12)) & 0x000F000F000F000F
    return (spread[..., 0] | (spread[..., 1] << 8)).view(np.uint8).reshape(len(words), -1)


def _runs(columns: int, groups: int) -> Array:
    return np.arange(columns, dtype=np.int64) // (columns // groups)


def _compressed(get: Get, config: Mapping[str, Any], module: str) -> Decoded:
    arguments = _arguments(config, module)
    scale = numpy_of(get(f"{module}.weight_scale"))
    if arguments["type"] == "float":
        return _floats(_compressed_float(get, module, arguments, scale))
    bits, offset = arguments["num_bits"], 2 ** (arguments["num_bits"] - 1)
    zero = None
    if arguments["strategy"] in ("channel", "group") and scale.ndim == 2:
        rows = scale.shape[0]
    else:
        scale, rows = scale.reshape(1, 1), 1
    if arguments.get("format_is_packed"):
        height, columns = (int(size) for size in get(f"{module}.weight_shape").tolist())
        codes: Callable[[slice], Array] = Stream(numpy_of(get(f"{module}.weight_packed")), bits, columns)
        if not arguments.get("symmetric", True):
            stored = numpy_of(get(f"{module}.weight_zero_point"))
            per_row = stored.dtype == np.int32 and rows > 1
            zero = bit_stream(stored.T, bits, height).T if per_row else (stored.reshape(rows, -1) + offset)
    else:
        q = numpy_of(get(f"{module}.weight"))
        codes, (height, columns) = _unsigned(q, offset), q.shape
        if not arguments.get("symmetric", True):
            zero = numpy_of(get(f"{module}.weight_zero_point")).astype(np.int16).reshape(rows, -1) + offset
    if zero is None:
        zero = np.full(scale.shape, offset, np.uint8)
    spread = (height, scale.shape[1])
    return Decoded(
        (height, columns),
        codes,
        np.broadcast_to(zero.astype(np.uint8), spread),
        np.broadcast_to(scale, spread),
        _runs(columns, scale.shape[1]),
    )


def _floats(w: Array) -> Decoded:
    return Decoded((w.shape[0], w.shape[1]), w=w)


def _compressed_float(get: Get, module: str, arguments: Mapping[str, Any], scale: Array) -> Array:
    if arguments["num_bits"] == 8:
        w = numpy_of(get(f"{module}.weight"))
        return w * _per_tile(scale, w.shape, arguments.get("block_structure"))
    packed = numpy_of(get(f"{module}.weight_packed"))
    codes = np.empty((packed.shape[0], 2 * packed.shape[1]), np.uint8)
    codes[:, ::2], codes[:, 1::2] = packed & 15, packed >> 4
    levels = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    w = levels[codes & 7] * np.where(codes & 8, np.float32(-1), np.float32(1))
    if arguments["group_size"] == 32:
        factor = np.ldexp(np.float32(1), scale.astype(np.int32) - 127)
    else:
        factor = scale / numpy_of(get(f"{module}.weight_global_scale"))
    return w * np.repeat(factor, arguments["group_size"], axis=1)


def _per_tile(scale: Array, shape: tuple[int, ...], block: list[int] | None) -> Array:
    if block is None or scale.size == 1:
        return scale.reshape(-1, 1) if scale.size > 1 else scale.reshape(1, 1)
    return np.repeat(np.repeat(scale, block[0], 0)[: shape[0]], block[1], 1)[:, : shape[1]]


def _arguments(config: Mapping[str, Any], module: str) -> dict[str, Any]:
    groups = list(config["config_groups"].values())
    group = next(g for g in groups if module in g["targets"] or "Linear" in g["targets"])
    form = group.get("format", config["format"])
    arguments = {"type": "int", **group["weights"], "format_is_packed": form == "pack-quantized"}
    if not arguments.get("strategy"):
        arguments["strategy"] = "group" if arguments.get("group_size") else "tensor"
    return arguments


def _fp8(get: Get, config: Mapping[str, Any], module: str) -> Decoded:
    w = numpy_of(get(f"{module}.weight"))
    return _floats(w * _per_tile(numpy_of(get(f"{module}.weight_scale_inv")), w.shape, config.get("weight_block_size")))


def _bitsandbytes(get: Get, config: Mapping[str, Any], module: str) -> Decoded:
    if config.get("load_in_8bit"):
        scale = numpy_of(get(f"{module}.SCB")) / np.float32(127)
        return _floats(numpy_of(get(f"{module}.weight")).astype(np.float32) * scale.reshape(-1, 1))
    prefix = f"{module}.weight"
    kind = config.get("bnb_4bit_quant_type", "fp4")
    state = json.loads(bytes(get(f"{prefix}.quant_state.bitsandbytes__{kind}").tolist()))
    octets = get(prefix).reshape(-1).view(torch.uint8).numpy()
    codes = np.stack((octets >> 4, octets & 15), -1).reshape(-1)[: math.prod(state["shape"])]
    absmax = numpy_of(get(f"{prefix}.absmax"))
    if absmax.dtype == np.uint8:
        nested = np.repeat(numpy_of(get(f"{prefix}.nested_absmax")), state["nested_blocksize"])[: len(absmax)]
        absmax = numpy_of(get(f"{prefix}.nested_quant_map"))[absmax] * nested + np.float32(state["nested_offset"])
    levels = numpy_of(get(f"{prefix}.quant_map"))
    w = levels[codes] * np.repeat(absmax, state["blocksize"])[: len(codes)]
    return _floats(w.reshape(state["shape"]))


def _own(get: Get, config: Mapping[str, Any], module: str) -> Decoded:
    """Our own names: compressed-tensors' but for nf4 and fp4, whose levels and maps are bitsandbytes'."""
    scheme = QuantScheme.parse(config["modules"][module]["scheme"])
    if scheme.weights.ordered:
        raise CheckpointError(
            f"{module} has act-order under our own names, which has no second decoder; use --no-verify"
        )
    if scheme.weights.format.kind != "codebook":
        return _compressed(get, quantization_config({module: scheme}, []), module)
    height, columns = config["modules"][module]["shape"]
    octets, absmax = get(f"{module}.weight_packed").numpy(), numpy_of(get(f"{module}.weight_absmax"))
    codes = np.stack((octets >> 4, octets & 15), -1).reshape(-1)[: height * columns]
    if scheme.weights.nested:
        nested = np.repeat(numpy_of(get(f"{module}.weight_nested_absmax")), NESTED_BLOCK)[: len(absmax)]
        absmax = dynamic_map().numpy()[absmax] * nested + numpy_of(get(f"{module}.weight_nested_offset"))
    levels = levels_of(scheme.weights.format.name).numpy()
    w = levels[codes] * np.repeat(absmax, scheme.weights.group_size or 1)[: len(codes)]
    return _floats(w.reshape(height, columns))


DECODERS: dict[str, Callable[[Get, Mapping[str, Any], str], Decoded]] = {
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed,
    "fp8": _fp8,
    "bitsandbytes": _bitsandbytes,
    "lowbit": _own,
}


def decode(get: Get, config: Mapping[str, Any], module: str) -> Decoded:
    """What a module's tensors stand for. Raises CheckpointError for a method that has no second decoder."""
    method = config.get("quant_method")
    if method not in DECODERS:
        raise CheckpointError(f"lowbit has no second decoder of {method!r} to check a conversion with")
    return DECODERS[method](get, config, module)
