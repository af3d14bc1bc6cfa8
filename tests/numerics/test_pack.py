"""The oracle is a row's bit stream, written as one Python integer: sum of (q_k + 2^(B-1)) << kB."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowbit.numerics.pack import pack, unpack, words_per_row

few = settings(max_examples=50, deadline=None, derandomize=True)
BITS = range(2, 9)


def random_codes(shape: tuple[int, ...], bits: int, seed: int) -> Tensor:
    """Codes over the whole range of `bits`, int8."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, generator=generator, dtype=torch.int8)


def stream_of(q: Tensor, bits: int) -> int:
    """The row q [K] as one integer, element 0 in the lowest bits."""
    return sum((code + 2 ** (bits - 1)) << (k * bits) for k, code in enumerate(q.tolist()))


@few
@given(bits=st.sampled_from(BITS), rows=st.integers(1, 5), columns=st.integers(1, 200), seed=st.integers(0, 2**31))
def test_unpack_gives_back_what_was_packed(bits: int, rows: int, columns: int, seed: int) -> None:
    q = random_codes((rows, columns), bits, seed)
    packed = pack(q, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (rows, words_per_row(columns, bits))
    assert torch.equal(unpack(packed, bits, columns), q)


@few
@given(bits=st.sampled_from(BITS), columns=st.integers(1, 130), seed=st.integers(0, 2**31))
def test_words_are_the_bit_stream_cut_every_32_bits(bits: int, columns: int, seed: int) -> None:
    q = random_codes((columns,), bits, seed)
    stream = stream_of(q, bits)
    words = [word & 0xFFFFFFFF for word in pack(q, bits).tolist()]
    assert words == [(stream >> (32 * word)) & 0xFFFFFFFF for word in range(len(words))]
    assert stream >> (32 * len(words)) == 0


def test_pack_keeps_element_zero_in_the_low_bits() -> None:
    q = torch.tensor([[-7, -6, -5, -4, -3, -2, -1, 0]], dtype=torch.int8)
    assert pack(q, 4).item() & 0xFFFFFFFF == 0x87654321


def test_three_bit_codes_straddle_words_without_gaps() -> None:
    assert [words_per_row(32, bits) for bits in BITS] == list(BITS)
    assert words_per_row(11, 3) == 2


@pytest.mark.parametrize("bits", BITS)
def test_leading_dimensions_are_packed_row_by_row(bits: int) -> None:
    q = random_codes((2, 3, 37), bits, seed=0)
    packed = pack(q, bits)
    assert torch.equal(packed[1, 2], pack(q[1, 2], bits))
    assert torch.equal(unpack(packed, bits, 37), q)


@pytest.mark.parametrize("bits", BITS)
def test_codes_that_lie_transposed_in_memory_are_packed_alike(bits: int) -> None:
    q = random_codes((37, 6), bits, seed=0)
    assert torch.equal(pack(q.T, bits), pack(q.T.contiguous(), bits))
