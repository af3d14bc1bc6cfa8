"""The oracle is compressed-tensors: its packing, its scales and zero-points, its quantize and dequantize.

It computes in the dtype of what it is given; we compute in float32 and round the scale at the end. So its functions get
float32 ranges and weights here, and bfloat16 comes in as the dtype of the scale. On bfloat16 ranges both agree to the
last bit where the scheme is symmetric; an asymmetric range max - min is rounded there before it is divided.
"""

from itertools import product

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, fake_quantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor

from lowbit.numerics.affine import choose_scale, decode, encode, value_range
from lowbit.numerics.formats import FP8_E4M3, INT_BITS, int_format
from lowbit.numerics.pack import pack, unpack
from lowbit.numerics.scheme import Granularity, QuantScheme, TensorScheme
from lowbit.tensors import PackedWeight

N, K, G = 24, 96, 32
GRANULARITIES: tuple[Granularity, ...] = ("tensor", "channel", "group", "token")
SCHEMES = [
    TensorScheme(number_format, granularity, symmetric, G if granularity == "group" else None)
    for number_format, granularity in product([*map(int_format, INT_BITS), FP8_E4M3], GRANULARITIES)
    for symmetric in (True, False)
    if symmetric or number_format.kind == "int"
]
each_scheme = pytest.mark.parametrize(
    "scheme", SCHEMES, ids=lambda s: f"{s.format}-{s.granularity}-{'sym' if s.symmetric else 'asym'}"
)
scale_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def theirs(scheme: TensorScheme, scale_dtype: torch.dtype | None = None) -> QuantizationArgs:
    return QuantizationArgs(
        num_bits=scheme.bits,
        type="float" if scheme.format.kind == "float" else "int",
        strategy=scheme.granularity,
        symmetric=scheme.symmetric,
        group_size=scheme.group_size,
        dynamic=scheme.granularity == "token",  # it accepts token scales only so; the equations are the same
        scale_dtype=scale_dtype,
    )


def make_weight(symmetric: bool) -> Tensor:
    """[N, K] with rows of one sign, of very different size and, where it is well defined for both, of zeros."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(N, K, generator=generator) * 10 ** (2 * torch.rand(N, 1, generator=generator) - 1)
    w[0], w[1] = w[0].abs() + 0.1, -w[1].abs() - 0.1
    if symmetric:
        w[2] = 0
    return w


@pytest.mark.parametrize("bits", INT_BITS)
@pytest.mark.parametrize("columns", [1, 10, 11, 31, 32, 33, 96, 100])
def test_packed_words_are_theirs_along_rows_and_columns(bits: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    q = torch.randint(low, high, (5, columns), generator=generator, dtype=torch.int8)
    assert torch.equal(pack(q, bits), pack_to_int32(q, bits))
    assert torch.equal(pack(q.T, bits).T, pack_to_int32(q, bits, packed_dim=0))
    assert torch.equal(unpack(pack_to_int32(q, bits), bits, columns), q)
    assert torch.equal(unpack_from_int32(pack(q, bits), bits, q.shape), q)


@each_scheme
def test_float32_scales_and_zero_points_are_theirs(scheme: TensorScheme) -> None:
    low, high = value_range(make_weight(scheme.symmetric), scheme)
    scale, zero = choose_scale(low, high, scheme, torch.float32)
    their_scale, their_zero = calculate_qparams(low, high, theirs(scheme))
    assert torch.equal(scale, their_scale)
    assert torch.equal(torch.zeros_like(their_zero) if zero is None else zero, their_zero)


@each_scheme
def test_bfloat16_scales_are_theirs_and_zero_points_within_one(scheme: TensorScheme) -> None:
    """Their zero-point divides by the scale before it is rounded to bfloat16 (a relative 2^-9), ours by the stored one.

    |min / scale| is at most 255, so the two quotients differ by less than 0.5 and the zero-points by at most 1.
    """
    low, high = value_range(make_weight(scheme.symmetric), scheme)
    scale, zero = choose_scale(low, high, scheme, torch.bfloat16)
    their_scale, their_zero = calculate_qparams(low, high, theirs(scheme, torch.bfloat16))
    assert torch.equal(scale, their_scale.bfloat16())
    if zero is not None:
        assert ((zero.int() - their_zero.int()).abs() <= 1).all()


@each_scheme
def test_symmetric_scales_of_bfloat16_ranges_are_theirs(scheme: TensorScheme) -> None:
    low, high = value_range(make_weight(scheme.symmetric).bfloat16(), scheme)
    scale, _ = choose_scale(low, high, scheme, torch.bfloat16)
    their_scale, _ = calculate_qparams(low, high, theirs(scheme))
    if scheme.symmetric:
        assert torch.equal(scale, their_scale)
    else:  # max - min and the quotient are each rounded to 2^-9, ours only once
        torch.testing.assert_close(scale.float(), their_scale.float(), rtol=2**-7, atol=0)


@scale_dtypes
@each_scheme
def test_codes_and_decoded_weights_are_theirs(scheme: TensorScheme, dtype: torch.dtype) -> None:
    w = make_weight(scheme.symmetric)
    scale, zero = choose_scale(*value_range(w, scheme), scheme, dtype)
    args = theirs(scheme)
    q = encode(w, scale, zero, scheme)
    their_q = quantize(w, scale, zero, args, dtype=q.dtype)
    assert torch.equal(q.view(torch.uint8), their_q.view(torch.uint8))
    decoded = decode(q, scale, zero, scheme).to(dtype)
    assert torch.equal(decoded, dequantize(q, scale, zero, args))
    assert torch.equal(decoded, fake_quantize(w, scale, zero, args).to(dtype))


@pytest.mark.parametrize("zero_point", [-3, -2, 0, 1, 2])
def test_a_tie_beside_a_zero_point_is_rounded_as_theirs(zero_point: int) -> None:
    """The zero-point is added before rounding to even: 0.5 + 1 gives 2, where round(0.5) + 1 would give 1."""
    scheme = TensorScheme(int_format(8), "tensor", False)
    scale, zero = torch.ones(1), torch.tensor([zero_point], dtype=torch.int8)
    x = torch.arange(-20.5, 20.5)
    q = encode(x, scale, zero, scheme)
    assert (q % 2 == 0).all()
    assert torch.equal(q, quantize(x, scale, zero, theirs(scheme), dtype=torch.int8))


@pytest.mark.parametrize("bits", INT_BITS)
def test_a_group_of_zeros_decodes_to_zeros_under_both_zero_points(bits: int) -> None:
    """Their zero-point of an empty range is 0 / 0 turned into an integer, ours the lowest code; both are harmless."""
    scheme = TensorScheme(int_format(bits), "group", False, G)
    w = torch.zeros(N, K)
    low, high = value_range(w, scheme)
    scale, zero = choose_scale(low, high, scheme, torch.float32)
    their_scale, their_zero = calculate_qparams(low, high, theirs(scheme))
    assert torch.equal(scale, their_scale)
    for point in (zero, their_zero):
        assert torch.equal(decode(encode(w, scale, point, scheme), scale, point, scheme), w)


@pytest.mark.parametrize("text", ["w4a16-g32-asym", "w3a16-g32-asym", "w8a16-asym", "w5a16-asym"])
def test_packed_zero_points_are_unpacked_by_them(text: str) -> None:
    packed = PackedWeight.from_float(make_weight(symmetric=False), QuantScheme.parse(text), torch.float32)
    bits, zero = packed.scheme.weights.bits, packed.zero_points()
    assert packed.zero is not None
    assert zero is not None
    assert torch.equal(unpack_from_int32(packed.zero, bits, zero.shape, packed_dim=0), zero)
