"""Blocks that wait for their turn in the checkpoint's 16 bits, though the work is done in float32: half their memory.

A 16-bit checkpoint that was loaded as float32 holds each weight in twice the bytes it needs. Parking puts every
parameter whose value survives the way there and back, to the last bit, into the smaller dtype, and takes it out again
when its block's turn comes.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def parked(blocks: Iterable[nn.Module], dtype: torch.dtype) -> Iterator[Callable[[nn.Module], None]]:
    """Inside, the parameters of `blocks` are in `dtype`, where that is smaller and loses nothing.

    Gives the function that takes a block out of the park, wherever it is by then; all are out afterwards.
    """
    working: dict[nn.Parameter, torch.dtype] = {}
    for block in blocks:
        for parameter in block.parameters():
            if parameter.is_floating_point() and dtype.itemsize < parameter.element_size():
                small = parameter.data.to(dtype)
                if torch.equal(small.to(parameter.dtype), parameter.data):
                    working[parameter], parameter.data = parameter.dtype, small

    def take_out(block: nn.Module) -> None:
        for parameter in block.parameters():
            if parameter in working:
                parameter.data = parameter.data.to(working.pop(parameter))

    try:
        yield take_out
    finally:
        for block in blocks:
            take_out(block)
