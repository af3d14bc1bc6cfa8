"""The oracles: the nearest level by brute force in float64, and the papers' own derivations of their tables.

Bitwise equality with bitsandbytes is in tests/interop/test_bitsandbytes.py.
"""

from statistics import NormalDist

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowbit.numerics import codebook
from lowbit.numerics.codebook import (
    NESTED_BLOCK,
    decode_blocks,
    double_quantize,
    encode_blocks,
    levels_of,
    pack_nibbles,
    unpack_nibbles,
    zero_code,
)

few = settings(max_examples=50, deadline=None, derandomize=True)
names = st.sampled_from(["nf4", "fp4"])
blocks = st.sampled_from([32, 64, 128])
each_name = pytest.mark.parametrize("name", ["nf4", "fp4"])


def per_element(absmax: Tensor, block: int, shape: tuple[int, ...]) -> Tensor:
    """absmax [blocks] spread over the elements of a tensor of `shape`."""
    elements = torch.Size(shape).numel()
    return absmax.repeat_interleave(block)[:elements].view(shape)


@few
@given(name=names, block=blocks, rows=st.integers(1, 9), columns=st.integers(1, 90), seed=st.integers(0, 2**31))
def test_a_code_is_the_nearest_level(name: str, block: int, rows: int, columns: int, seed: int) -> None:
    """No level is nearer than the chosen one, but for the float32 rounding of w / absmax, 2 roundings of 2^-24."""
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    levels = levels_of(name)
    codes, absmax = encode_blocks(w, levels, block)
    scaled = w.double() / per_element(absmax, block, w.shape)
    distance = (scaled.unsqueeze(-1) - levels.double()).abs()
    chosen = distance.gather(-1, codes.view(rows, columns, 1).long()).squeeze(-1)
    assert (chosen <= distance.amin(-1) + 2**-22).all()


@few
@given(name=names, block=blocks, elements=st.integers(1, 700), seed=st.integers(0, 2**31))
def test_encode_gives_back_the_codes_that_were_decoded(name: str, block: int, elements: int, seed: int) -> None:
    """Codes come back where every block holds a level of size 1; the second zero of fp4 comes back as the first."""
    generator = torch.Generator().manual_seed(seed)
    levels = levels_of(name)
    codes = torch.randint(0, 16, (elements,), generator=generator, dtype=torch.uint8)
    codes[::block] = int(levels.argmax())
    absmax = 10 ** (4 * torch.rand(-(-elements // block), generator=generator) - 2)
    w = decode_blocks(codes, absmax, levels, block, (elements,), torch.float32)
    again, same_absmax = encode_blocks(w, levels, block)
    assert torch.equal(same_absmax, absmax)
    assert torch.equal(again, torch.where(levels[codes.int()] == 0, zero_code(levels), codes))


@few
@given(elements=st.integers(1, 300), filler=st.integers(0, 15), seed=st.integers(0, 2**31))
def test_unpack_gives_back_the_nibbles_that_were_packed(elements: int, filler: int, seed: int) -> None:
    codes = torch.randint(0, 16, (elements,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack_nibbles(codes, filler)
    assert packed.shape == (-(-elements // 2),)
    assert torch.equal(unpack_nibbles(packed, elements), codes)
    if elements % 2:
        assert packed[-1] & 0xF == filler


def test_the_first_code_stands_in_the_high_nibble() -> None:
    assert pack_nibbles(torch.tensor([0xF, 0x0, 0x1, 0x2], dtype=torch.uint8)).tolist() == [0xF0, 0x12]


def test_nf4_levels_are_the_quantiles_of_the_normal_distribution() -> None:
    """QLoRA, appendix E: 8 quantiles above zero, 7 below, scaled so that the ends are 1 and -1."""
    offset = (1 - 1 / 30 + 1 - 1 / 32) / 2
    normal = NormalDist()

    def half(count: int) -> list[float]:
        return [normal.inv_cdf(offset + (0.5 - offset) * step / count) for step in range(count)]

    largest = half(8)[0]
    expected = sorted([value / largest for value in half(8)] + [-value / largest for value in half(7)] + [0.0])
    # bitsandbytes cuts the offset to 0.9677083 and works in float32
    torch.testing.assert_close(levels_of("nf4").double(), torch.tensor(expected).double(), rtol=0, atol=2e-7)


def test_fp4_is_a_sign_two_exponent_bits_and_one_fraction_bit() -> None:
    levels = levels_of("fp4")
    assert torch.equal(levels[8:], -levels[:8])
    assert (12 * levels[:8]).tolist() == pytest.approx([0, 0.0625, 8, 12, 4, 6, 2, 3], rel=1e-6)


def test_the_dynamic_map_halves_its_steps_with_every_decade() -> None:
    levels = codebook.dynamic_map()
    assert levels.shape == (256,)
    assert torch.equal(levels, levels.sort().values)
    assert levels.unique().numel() == 256
    decades = torch.bucketize(levels[128:-1], 10.0 ** torch.arange(-6, 1))  # above zero, below the lone 1
    assert decades.bincount(minlength=8)[1:7].tolist() == [2**i for i in range(1, 7)]
    assert torch.equal(levels[:127], -levels[128:-1].flip(0))


@each_name
@pytest.mark.parametrize("elements", [64, 65, 127, 128, 1000])
def test_zeros_decode_to_zeros(name: str, elements: int) -> None:
    w = torch.zeros(elements)
    codes, absmax = encode_blocks(w, levels_of(name), 64)
    nested = double_quantize(absmax)
    for maxima in (absmax, nested.decode()):
        assert torch.equal(decode_blocks(codes, maxima, levels_of(name), 64, w.shape, torch.float32), w)


@each_name
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_decoded_in_float32_and_rounded_once(name: str, dtype: torch.dtype) -> None:
    w = torch.randn(33, 70, generator=torch.Generator().manual_seed(0)).to(dtype)
    codes, absmax = encode_blocks(w, levels_of(name), 64)
    assert absmax.dtype == torch.float32
    exact = decode_blocks(codes, absmax, levels_of(name), 64, w.shape, torch.float32)
    assert torch.equal(decode_blocks(codes, absmax, levels_of(name), 64, w.shape, dtype), exact.to(dtype))


@pytest.mark.parametrize("elements", [3 * 64, 3 * 64 + 7], ids=["whole", "tail"])
def test_slices_do_not_change_the_result(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(elements, generator=torch.Generator().manual_seed(0))
    levels = levels_of("nf4")
    codes, absmax = encode_blocks(w, levels, 64)
    decoded = decode_blocks(codes, absmax, levels, 64, w.shape, torch.float32)
    monkeypatch.setattr(codebook, "_SLICE", 64)
    sliced_codes, sliced_absmax = encode_blocks(w, levels, 64)
    assert torch.equal(sliced_codes, codes)
    assert torch.equal(sliced_absmax, absmax)
    assert torch.equal(decode_blocks(codes, absmax, levels, 64, w.shape, torch.float32), decoded)


@few
@given(count=st.integers(2, 1500), seed=st.integers(0, 2**31))
def test_nested_absmax_is_near_the_maxima(count: int, seed: int) -> None:
    """The dynamic map's widest step is 0.0141 of a block's largest distance from the mean, its half 0.00704.

    Slack: the grid of 2^16 points adds 2^-16 of that distance, the smallest levels below it (-2e-5 for 0) as much.
    """
    maxima = torch.rand(count, generator=torch.Generator().manual_seed(seed)) + 0.1
    nested = double_quantize(maxima)
    assert nested.codes.shape == (count,)
    assert nested.absmax.shape == (-(-count // NESTED_BLOCK),)
    bound = (0.00704 + 2**-15) * per_element(nested.absmax, NESTED_BLOCK, (count,)) + 2**-22
    assert ((nested.decode() - maxima).abs() <= bound).all()


def test_equal_maxima_nest_without_loss() -> None:
    maxima = torch.full((300,), 0.25)
    nested = double_quantize(maxima)
    assert torch.equal(nested.decode(), maxima)
    assert nested.absmax.tolist() == [0, 0]
