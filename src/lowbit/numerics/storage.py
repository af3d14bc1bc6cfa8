"""How the codes of a scheme are stored, and which tensors stand beside them: names, shapes, dtypes.

storage     codes                                     for
"packed"    int32 [N, ceil(K B / 32)] (numerics/pack) integers beside 16-bit activations: w4a16, w8a16
"int8"      int8 [N, K]                               integers beside int8 activations: w8a8, w4a8
"fp8"       float8_e4m3fn [N, K]                      fp8
"pairs"     uint8 [N, K/2], even column low           nvfp4, mxfp4 (numerics/microscale.py)
"nibbles"   uint8 [ceil(N K / 2)], first code high    nf4, fp4

"""

from typing import Literal

import torch

from lowbit.numerics import codebook
from lowbit.numerics.formats import FP8_E4M3
from lowbit.numerics.pack import words_per_row
from lowbit.numerics.scheme import QuantScheme, TensorScheme

Storage = Literal["packed", "int8", "fp8", "pairs", "nibbles"]


def storage_of(scheme: QuantScheme) -> Storage:
    """Where the codes of a weight under `scheme` are kept; the table in the module's docstring."""
    weights = scheme.weights
    if weights.format.kind == "codebook":
        return "nibbles"
    if weights.format.kind == "float":
        return "fp8" if weights.format == FP8_E4M3 else "pairs"
    return "int8" if scheme.activations else "packed"


def tensor_shapes(
    scheme: QuantScheme, shape: tuple[int, int], scale_dtype: torch.dtype
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """name -> (shape, dtype) of `PackedWeight.tensors()` for a weight [N, K], without making it."""
    rows, columns = shape
    weights = scheme.weights
    storage = storage_of(scheme)
    if storage == "nibbles":
        return _block_shapes(weights, rows * columns)
    if storage == "pairs":
        return _pair_shapes(weights, rows, columns)
    code_dtype = {"packed": torch.int32, "int8": torch.int8, "fp8": torch.float8_e4m3fn}[storage]
    width = words_per_row(columns, weights.bits) if storage == "packed" else columns
    scale_shape = _scale_shape(weights, rows, columns)
    named: dict[str, tuple[tuple[int, ...], torch.dtype]]
    named = {"weight_packed" if storage == "packed" else "weight": ((rows, width), code_dtype)}
    named["weight_scale"] = (scale_shape, scale_dtype)
    if not weights.symmetric:
        packed = storage == "packed" and len(scale_shape) == 2
        zero_shape = (words_per_row(rows, weights.bits), scale_shape[-1]) if packed else scale_shape
        named["weight_zero_point"] = (zero_shape, torch.int32 if packed else torch.int8)
    if weights.ordered:
        named["weight_order"] = ((columns,), torch.int32)
    if storage == "packed":
        named["weight_shape"] = ((2,), torch.int64)
    return named


def _pair_shapes(weights: TensorScheme, rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    assert weights.group_size is not None
    named: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"weight_packed": ((rows, columns // 2), torch.uint8)}
    is_nv = weights.format.name == "nvfp4"
    named["weight_scale"] = ((rows, columns // weights.group_size), torch.float8_e4m3fn if is_nv else torch.uint8)
    if is_nv:
        named["weight_global_scale"] = ((1,), torch.float32)
    return named


def _scale_shape(weights: TensorScheme, rows: int, columns: int) -> tuple[int, ...]:
    if weights.granularity == "tensor":
        return (1,)
    if weights.granularity == "tile":
        return (-(-rows // (weights.group_size or 1)), -(-columns // (weights.group_size or 1)))
    return (rows, columns // weights.group_size if weights.group_size else 1)


def _block_shapes(weights: TensorScheme, elements: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    assert weights.group_size is not None
    blocks = -(-elements // weights.group_size)
    named: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"weight_packed": ((-(-elements // 2),), torch.uint8)}
    named["weight_absmax"] = ((blocks,), torch.uint8 if weights.nested else torch.float32)
    if weights.nested:
        named["weight_nested_absmax"] = ((-(-blocks // codebook.NESTED_BLOCK),), torch.float32)
        named["weight_nested_offset"] = ((), torch.float32)
    return named
