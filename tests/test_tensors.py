"""The oracles: numerics/affine.py and codebook.py on the unpacked numbers, sizes counted by hand, and the empty shapes.

Foreign readers of the same bytes are in tests/interop.
"""

from itertools import product

import pytest
import torch
from torch import Tensor

from lowbit.errors import CheckpointError
from lowbit.numerics import affine, codebook
from lowbit.numerics.scheme import QuantScheme
from lowbit.numerics.storage import storage_of, tensor_shapes
from lowbit.tensors import PackedWeight, check_finite

N, K = 48, 192
_WEIGHTS = ("", "-tensor", "-g32", "-asym", "-tensor-asym", "-g64-asym")
INTEGERS = [f"w{bits}a{acts}{text}" for bits, acts, text in product(range(2, 9), (16, 8), _WEIGHTS)]
BLOCKS = [f"{name}-b{block}{nested}" for name, block, nested in product(("nf4", "fp4"), (32, 64, 4096), ("", "-dq"))]
TEXTS = [*INTEGERS, *BLOCKS, "fp8"]
every_scheme = pytest.mark.parametrize("text", TEXTS)


def make_weight(rows: int = N, columns: int = K) -> Tensor:
    generator = torch.Generator().manual_seed(rows * columns)
    return torch.randn(rows, columns, generator=generator) * (1 + torch.rand(rows, 1, generator=generator))


def make_packed(text: str, scale_dtype: torch.dtype = torch.float32) -> PackedWeight:
    return PackedWeight.from_float(make_weight(), QuantScheme.parse(text), scale_dtype)


def same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Same names, dtypes, shapes and bytes."""
    if a.keys() != b.keys():
        return False
    pairs = [(a[key], b[key]) for key in a]
    return all(
        x.dtype == y.dtype
        and x.shape == y.shape
        and torch.equal(x.reshape(-1).view(torch.uint8), y.reshape(-1).view(torch.uint8))
        for x, y in pairs
    )


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("text", [*INTEGERS, "fp8"])
def test_a_weight_unpacks_to_the_codes_it_was_made_of(text: str, scale_dtype: torch.dtype) -> None:
    w, packed = make_weight(), make_packed(text, scale_dtype)
    weights = packed.scheme.weights
    scale, zero = affine.choose_scale(*affine.value_range(w, weights), weights, scale_dtype)
    q = affine.encode(w, scale, zero, weights)
    assert torch.equal(packed.q().view(torch.uint8), q.view(torch.uint8))
    assert torch.equal(packed.scale, scale)
    unpacked = packed.zero_points()
    assert (unpacked is None) == (zero is None)
    assert zero is None or torch.equal(unpacked, zero)
    assert torch.equal(packed.dequantize(), affine.decode(q, scale, zero, weights))


@pytest.mark.parametrize("text", BLOCKS)
@pytest.mark.parametrize(("rows", "columns"), [(N, K), (7, 9)], ids=["even", "odd"])
def test_a_codebook_weight_is_the_level_times_its_blocks_absmax(text: str, rows: int, columns: int) -> None:
    w, scheme = make_weight(rows, columns), QuantScheme.parse(text)
    packed = PackedWeight.from_float(w, scheme, torch.float32)
    levels, block = codebook.levels_of(text[:3]), scheme.weights.group_size
    assert block is not None
    q, absmax = codebook.encode_blocks(w, levels, block)
    assert torch.equal(packed.q(), q.view(rows, columns))
    if scheme.weights.nested:
        absmax = codebook.double_quantize(absmax).decode()
    spread = absmax.repeat_interleave(block)[: w.numel()].view(rows, columns)
    assert torch.equal(packed.dequantize(), levels[packed.q().int()] * spread)


@every_scheme
def test_dequantize_rounds_float32_once(text: str) -> None:
    packed = make_packed(text, torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(packed.dequantize(dtype), packed.dequantize().to(dtype))


@every_scheme
def test_tensors_and_back_is_the_same_weight(text: str) -> None:
    packed = make_packed(text)
    again = PackedWeight.from_tensors(packed.tensors(), packed.scheme, packed.shape)
    assert same_tensors(again.tensors(), packed.tensors())
    assert torch.equal(again.dequantize(), packed.dequantize())


@every_scheme
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_empty_shapes_are_those_of_a_made_weight(text: str, scale_dtype: torch.dtype) -> None:
    packed = make_packed(text, scale_dtype)
    made = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in packed.tensors().items()}
    assert made == tensor_shapes(packed.scheme, packed.shape, scale_dtype)


@every_scheme
def test_tensors_are_contiguous_so_that_safetensors_can_write_them(text: str) -> None:
    assert all(tensor.is_contiguous() for tensor in make_packed(text).tensors().values())


@pytest.mark.parametrize(
    ("text", "scale_dtype", "expected"),
    [
        ("w4a16-g64", torch.bfloat16, N * K // 2 + 2 * N * K // 64 + 16),
        ("w4a16-g64-asym", torch.bfloat16, N * K // 2 + 2 * N * K // 64 + N * K // 64 // 2 + 16),
        ("w3a16-g64", torch.float32, N * K * 3 // 8 + 4 * N * K // 64 + 16),
        ("w8a16", torch.float32, N * K + 4 * N + 16),
        ("w8a8", torch.float32, N * K + 4 * N),
        ("w8a8-tensor-asym", torch.float32, N * K + 4 + 1),
        ("fp8", torch.bfloat16, N * K + 2 * N),
        ("nf4-b64", torch.float32, N * K // 2 + 4 * N * K // 64),
        ("nf4-b64-dq", torch.float32, N * K // 2 + N * K // 64 + 4 + 4),
    ],
)
def test_bytes_count_codes_scales_and_zero_points(text: str, scale_dtype: torch.dtype, expected: int) -> None:
    """The 16 bytes are weight_shape, two int64, which a packed weight has on disk."""
    assert make_packed(text, scale_dtype).bytes == expected


@pytest.mark.parametrize(
    ("text", "storage"),
    [
        ("w4a16-g64", "packed"),
        ("w8a16", "packed"),
        ("w4a8", "int8"),
        ("w8a8", "int8"),
        ("w8a8-static", "int8"),
        ("fp8", "fp8"),
        ("nf4-b64-dq", "nibbles"),
    ],
)
def test_codes_are_stored_where_their_kernel_reads_them(text: str, storage: str) -> None:
    assert storage_of(QuantScheme.parse(text)) == storage


@pytest.mark.parametrize("text", [*INTEGERS, "fp8"])
def test_rows_stacked_again_are_the_same_weight(text: str) -> None:
    packed = make_packed(text)
    stacked = PackedWeight.stack([packed.rows(0, 17), packed.rows(17, N)])
    assert same_tensors(stacked.tensors(), packed.tensors())
    assert torch.equal(packed.rows(17, 30).dequantize(), packed.dequantize()[17:30])


def test_more_bits_and_smaller_groups_lose_less() -> None:
    w = make_weight()
    order = ["w2a16-g32", "w3a16-g32", "w4a16", "w4a16-g64", "w4a16-g32", "w5a16-g32", "w6a16-g32", "w8a16-g32"]
    errors = [(make_packed(text).dequantize() - w).norm().item() for text in order]
    assert errors == sorted(errors, reverse=True)
    nested, plain = ((make_packed(text).dequantize() - w).norm().item() for text in ("nf4-b64-dq", "nf4-b64"))
    assert plain < nested < 1.02 * plain


def test_a_weight_with_holes_is_named() -> None:
    w = make_weight()
    check_finite(w, "model.layers.0.mlp.up_proj.weight")
    w[0, 0], w[1, 1] = torch.nan, torch.inf
    with pytest.raises(CheckpointError, match=r"up_proj\.weight holds 2 values that are NaN or infinite"):
        check_finite(w, "model.layers.0.mlp.up_proj.weight")
