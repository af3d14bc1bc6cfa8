"""Parked blocks take half the memory and come back to the last bit."""

import torch
from torch import nn

from lowbit.observe.parking import parked


def test_parameters_that_fit_are_halved_and_come_back_to_the_last_bit() -> None:
    blocks = [nn.Linear(8, 8), nn.Linear(8, 8)]
    for block in blocks:
        block.weight.data = block.weight.data.bfloat16().float()
    exact = [block.weight.data.clone() for block in blocks]
    with parked(blocks, torch.bfloat16) as take_out:
        assert all(block.weight.dtype == torch.bfloat16 for block in blocks)
        take_out(blocks[0])
        assert [block.weight.dtype for block in blocks] == [torch.float32, torch.bfloat16]
    for block, weight in zip(blocks, exact, strict=True):
        assert block.weight.dtype == torch.float32
        assert torch.equal(block.weight, weight)


def test_a_parameter_that_would_lose_bits_stays() -> None:
    block = nn.Linear(1, 1)
    block.weight.data.fill_(1 + 2**-20)
    with parked([block], torch.bfloat16):
        assert block.weight.dtype == torch.float32


def test_all_are_out_after_an_error() -> None:
    block = nn.Linear(4, 4)
    block.weight.data.fill_(0.5)
    try:
        with parked([block], torch.float16):
            raise KeyError
    except KeyError:
        assert block.weight.dtype == torch.float32
