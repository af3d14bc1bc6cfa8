"""Optimizer states in 8 or 4 bits: codes, and one absolute maximum per block.

    bits  block  signed (first moment)       unsigned (second moment)              source
    8     256    dynamic map, 256 levels     unsigned dynamic map, 256 levels      arXiv:2110.02861, bitsandbytes
    4     128    dynamic map, 16 levels      i/16, i = 1..16: without a zero       arXiv:2309.01507

A second moment of zero in the denominator makes a step explode, which is why the 4-bit map leaves zero out. In memory
a state `name` is `name` (uint8 codes, two to a byte for 4 bits, the first in the high nibble) and `name_absmax`
(float32). Tensors under 4096 elements, and embeddings where `parameter_groups` says so, stay float32.
"""

import torch
from torch import Tensor

from lowbit.errors import CheckpointError
from lowbit.numerics import codebook

BLOCKS = {8: 256, 4: 128}
ABSMAX = "_absmax"


def layout(elements: int, bits: int) -> tuple[int, int]:
    """(bytes of codes, blocks) of a state of so many elements."""
    return -(-elements * bits // 8), -(-elements // BLOCKS[bits])


def decode_state(codes: Tensor, absmax: Tensor, elements: int, bits: int, signed: bool) -> Tensor:
    """The state, float32 [elements]."""
    if bits == 4:
        codes = codebook.unpack_nibbles(codes, elements)
    return codebook.decode_blocks(
        codes, absmax, codebook.state_levels(bits, signed), BLOCKS[bits], (elements,), torch.float32
    )


def encode_state(state: Tensor, bits: int, signed: bool) -> tuple[Tensor, Tensor]:
    """(codes, absmax) of a float32 state; 8-bit codes bitwise equal to bitsandbytes' on a CPU."""
    flat = state.reshape(-1)
    if bits == 8:
        return codebook.encode_dynamic(flat, signed, gridded=not flat.is_cuda)
    codes, absmax = codebook.encode_blocks(flat, codebook.state_levels(bits, signed), BLOCKS[bits])
    return codebook.pack_nibbles(codes), absmax


def check_state(name: str, values: dict[str, Tensor], elements: int, bits: int) -> None:
    """Raise CheckpointError unless `values`, a state and its absmax, are what a tensor of `elements` needs."""
    state, absmax = values[name], values.get(name + ABSMAX)
    if absmax is None:
        expected: dict[str, tuple[Tensor | None, torch.dtype, int]] = {name: (state, torch.float32, elements)}
    else:
        count, blocks = layout(elements, bits)
        expected = {name: (state, torch.uint8, count), name + ABSMAX: (absmax, torch.float32, blocks)}
    for key, (tensor, dtype, size) in expected.items():
        if tensor is None or tensor.dtype != dtype or tensor.numel() != size:
            found = "missing" if tensor is None else f"{tensor.dtype} of {tensor.numel()} elements"
            raise CheckpointError(
                f"the optimizer state {key!r} is {found}, but {dtype} of {size} is needed; it belongs to another model "
                "or other options, or the file is damaged: load the checkpoint before it"
            )
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise CheckpointError(
                f"the optimizer state {key!r} holds NaN or infinity: it was saved after training diverged; "
                "load an earlier checkpoint"
            )
