"""Launches optim_blockwise.cu: one optimizer step over many tensors whose states have 8, 4 or 32 bits, in one launch.

For every tensor a record of 80 bytes (pointers, sizes) is written on the host; all of them are copied over in one
piece, and stay on the device while nothing in them changes. The step's numbers, which do change, are the kernel's own
argument: up to 8 sets of them, of which each record names one. States may lie in pinned host memory: the GPU reads and
writes them in place.

    rule      states                        rate
    adam      m signed, v unsigned          -lr / (1 - beta1^t)
    lion      m signed                      -lr
    momentum  m signed                      -lr
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from lowbit.kernels.cuda.compiler import Kernel, current_stream, load_kernel
from lowbit.kernels.cuda.device import gpu_of
from lowbit.numerics.codebook import state_levels

BLOCK = 256  # elements of a warp: one block of 8 bits, two of 4
BELOW_BYTES = 49152
UNSIGNED_AT, NEGATIVE_AT = 0x4000, 0x8000  # where the unsigned map and negative numbers begin in `below`
_KEYS = 0x3F80 + 1  # upper halves of the floats from 0 to 1
_RULES = {"adam": 0, "lion": 1, "momentum": 2}
_PARAMETERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_POINTERS, _ENDS, _NUMBERS = struct.Struct("<7q"), struct.Struct("<3i12x"), struct.Struct("<10f")
SETS = 8  # of numbers, in one launch
RECORD_BYTES = 80  # the Record of the .cu file
_READY_BYTES = 112  # its Tensor, in shared memory
AHEAD = 1  # blocks of a warp that L2 is asked for before they are loaded: 0.75 ms with 1, 0.82 without
_MOST_ELEMENTS = 2**35  # a lane's place is an unsigned int of 8 elements each
_WIDE, _UNALIGNED = 1, 2


@dataclass(frozen=True)
class Scalars:
    """The numbers of one tensor's step: g <- g + l2 p, p <- shrink p + m / (sqrt(v) correction + eps).

    correction and eps are divided by the rate; the rules without a second moment use the rate itself.
    """

    shrink: float
    l2: float
    beta1: float
    rest1: float
    beta2: float
    rest2: float
    eps: float
    rate: float
    correction: float
    first: float

    @cached_property
    def packed(self) -> bytes:
        first, second = (self.shrink, self.l2, self.beta1, self.rest1), (self.beta2, self.rest2, self.eps)
        return _NUMBERS.pack(*first, *second, self.rate, self.correction, self.first)  # astuple takes 10 us


@dataclass(frozen=True)
class KernelStep:
    """One tensor's step: p and g of one dtype and shape; its states, and their absmax (none where bits is 32).

    States that are kept in 32 bits go with those of 8.
    """

    rule: str
    bits: int
    p: Tensor
    g: Tensor
    states: tuple[Tensor, ...]
    absmax: tuple[Tensor, ...]

    def record(self) -> "Record":
        """The addresses in it, without a reference to any tensor: a gradient that is kept could never be freed."""
        pointers = [self.p.data_ptr(), self.g.data_ptr()]
        pointers += [self.states[i].data_ptr() if i < len(self.states) else 0 for i in range(2)]
        pointers += [self.absmax[i].data_ptr() if i < len(self.absmax) else 0 for i in range(2)]
        unaligned = any(pointer % 16 for pointer in pointers[:4])
        flags = (_WIDE if self.bits == 32 else 0) | (_UNALIGNED if unaligned else 0)
        elements = self.p.numel()
        launch = (self.p.device, self.rule, self.p.dtype, 4 if self.bits == 4 else 8)
        return Record(launch, _POINTERS.pack(*pointers, elements), -(-elements // BLOCK), flags)


@dataclass(frozen=True)
class Record:
    """A KernelStep as the kernel reads it, but for its numbers; steps of equal `launch` go in one launch."""

    launch: "Launch"
    pointers: bytes
    blocks: int
    flags: int


def step_refusal(step: KernelStep) -> str | None:
    """Why the kernel can't do this step, or None."""
    if not step.p.is_cuda:
        return "the parameter is not on a CUDA device"
    if step.bits not in (4, 8, 32):
        return f"states of {step.bits} bits go through torch"
    if step.p.dtype not in _PARAMETERS or step.g.dtype != step.p.dtype:
        return f"a parameter of {step.p.dtype} with a gradient of {step.g.dtype} goes through torch"
    if not (step.p.is_contiguous() and step.g.is_contiguous()):
        return "the parameter or its gradient is not contiguous"
    if step.p.numel() >= _MOST_ELEMENTS:
        return f"a parameter of {_MOST_ELEMENTS} elements or more goes through torch"
    return None


Launch = tuple[torch.device, str, torch.dtype, int]
"""What one launch serves: device, rule, the parameters' dtype, and the bits of states."""
Sent = dict[tuple[Launch, int], tuple[bytes, Tensor]]
"""The records of each launch of the last step, and where they lie on the device."""


def step_all(steps: Sequence[tuple[Record, Scalars]], sent: Sent) -> None:
    """Apply steps that did not refuse: one launch for each combination of device, rule, dtype and bits.

    More are needed where there are more tensors than shared memory holds records (384), or more than 8 sets of numbers.
    """
    launches: dict[Launch, list[tuple[Record, Scalars]]] = {}
    for step in steps:
        launches.setdefault(step[0].launch, []).append(step)
    for launch, together in launches.items():
        device, rule, *_ = launch
        for number, packed in enumerate(pack_records(together, _plan(device, rule).records)):
            known = sent.get((launch, number))
            if known is None or known[0] != packed.records:
                host = torch.frombuffer(bytearray(packed.records), dtype=torch.uint8).pin_memory()
                known = sent[launch, number] = packed.records, host.to(device, non_blocking=True)
            _run(launch, packed, known[1])


@dataclass(frozen=True)
class Packed:
    """One launch: records of RECORD_BYTES each, the blocks of all their tensors, and SETS sets of numbers."""

    records: bytes
    blocks: int
    numbers: bytes


def pack_records(steps: Sequence[tuple[Record, Scalars]], most: int) -> list[Packed]:
    """The launches that so many steps need; tensors that are empty are left out."""
    found: list[Packed] = []
    parts: list[bytes] = []
    sets: dict[bytes, int] = {}
    end = count = 0
    for record, scalars in steps:
        if not record.blocks:
            continue
        if count == most or (scalars.packed not in sets and len(sets) == SETS):
            found.append(_packed(parts, end, sets))
            parts, sets, end, count = [], {}, 0, 0
        end, count = end + record.blocks, count + 1
        index = sets.setdefault(scalars.packed, len(sets))
        parts += (record.pointers, _ENDS.pack(end, record.flags, index))
    return [*found, _packed(parts, end, sets)] if parts else found


def _packed(parts: list[bytes], blocks: int, sets: dict[bytes, int]) -> Packed:
    return Packed(b"".join(parts), blocks, b"".join(sets).ljust(SETS * _NUMBERS.size, b"\0"))


def _run(launch: Launch, packed: Packed, records: Tensor) -> None:
    device, rule, _, bits = launch
    below, levels, bounds = _tables(device, bits)
    plan, kernel = _plan(device, rule), _kernel(launch)
    grid = min(plan.thread_blocks, -(-packed.blocks * 32 // plan.threads))
    arguments = (
        *(records.data_ptr(), len(packed.records) // RECORD_BYTES, packed.blocks),
        *(below.data_ptr(), levels.data_ptr(), bounds.data_ptr(), packed.numbers),
    )
    with torch.cuda.device(device):
        kernel.launch((grid, 1, 1), (plan.threads, 1, 1), arguments, plan.shared_bytes, current_stream(device))


@cache
def _kernel(launch: Launch) -> Kernel:
    device, rule, dtype, bits = launch
    plan = _plan(device, rule)
    defines = (
        *(("BITS", bits), ("RULE", _RULES[rule]), ("PARAM", _PARAMETERS[dtype]), ("SETS", SETS)),
        *(("THREADS", plan.threads), ("REPLICAS", plan.replicas), ("AHEAD", AHEAD)),
    )
    parameters = f"PiiPPP{SETS * _NUMBERS.size}s"
    return load_kernel("optim_blockwise.cu", "optim_blockwise", parameters, device, defines, plan.shared_bytes)


@dataclass(frozen=True)
class _Plan:
    threads: int
    replicas: int
    records: int
    shared_bytes: int
    thread_blocks: int


def _shared_bytes(rule: str, replicas: int, records: int) -> int:
    return BELOW_BYTES + (2 if rule == "adam" else 1) * 2 * 256 * 4 * replicas + _READY_BYTES * records


@cache
def _plan(device: torch.device, rule: str) -> _Plan:
    """Copies of the tables as many as shared memory holds (32: no bank conflicts), threads so that nothing spills."""
    gpu = gpu_of(device)
    records = 384 if gpu.shared_bytes >= 200 * 1024 else 64
    replicas = next(count for count in (32, 16, 8, 4, 2, 1) if _shared_bytes(rule, count, records) <= gpu.shared_bytes)
    return _Plan(768, replicas, records, _shared_bytes(rule, replicas, records), gpu.processors)


@cache
def _tables(device: torch.device, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """(below uint8 [49152], levels float32 [2, 256], bounds float32 [2, 256]) on the device, the signed map first."""
    maps = [state_levels(bits, signed) for signed in (True, False)]
    levels = torch.stack([torch.nn.functional.pad(one, (0, 256 - len(one)), value=1.0) for one in maps])
    bounds = torch.stack([pad_bounds(one) for one in maps])
    return search_table(bits).to(device), levels.to(device), bounds.to(device)


def pad_bounds(levels: Tensor) -> Tensor:
    """The boundaries between neighbours, and infinity after the last: [256]."""
    middles = (levels[:-1] + levels[1:]) / 2
    return torch.nn.functional.pad(middles, (0, 256 - len(middles)), value=torch.inf)


def search_table(bits: int = 8) -> Tensor:
    """uint8 [49152]: for the upper half of a float's bits, how many boundaries lie below every float of that half.

    At most one more lies among them, so the code of x is below[key] + (x > bounds[below[key]]). Keys of the signed map
    stand where they fall, from 0 and from 0x8000; those of the unsigned map fill the gap from 0x4000.
    """
    table = torch.zeros(BELOW_BYTES, dtype=torch.uint8)
    edges = (torch.arange(_KEYS + 1, dtype=torch.int32) << 16).view(torch.float32)  # |x| of key k: edges[k] to [k + 1]
    signed, unsigned = (pad_bounds(state_levels(bits, sign)) for sign in (True, False))
    table[:_KEYS] = torch.bucketize(edges[:-1], signed)
    table[UNSIGNED_AT : UNSIGNED_AT + _KEYS] = torch.bucketize(edges[:-1], unsigned)
    table[NEGATIVE_AT : NEGATIVE_AT + _KEYS] = torch.bucketize(-edges[1:], signed, right=True)
    return table
