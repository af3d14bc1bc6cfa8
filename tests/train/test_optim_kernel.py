"""The CUDA step. Oracles: torch.bucketize over the exact boundaries for its tables, the step in torch for the rest."""

import struct

import pytest
import torch
from torch import nn

from lowbit.kernels.cuda.optim import NEGATIVE_AT, UNSIGNED_AT, Scalars, pack_records, pad_bounds, search_table
from lowbit.kernels.cuda.optim import KernelStep as Step
from lowbit.numerics.codebook import state_levels, unpack_nibbles
from lowbit.train.blockwise import BlockwiseOptimizer, _step_plainly
from lowbit.train.optim import Adam8bit, AdamW4bit, AdamW8bit, Lion8bit, SGD8bit, StateOptions

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_two_look_ups_find_the_code_that_bucketize_finds(signed: bool, bits: int) -> None:
    bounds, table = pad_bounds(state_levels(bits, signed)), search_table(bits)
    x = torch.rand(200_000, generator=torch.Generator().manual_seed(0)) ** 4
    edges = bounds[bounds.isfinite() & (bounds >= 0)]
    x = torch.cat([x, edges, edges.nextafter(torch.tensor(2.0)), torch.tensor([0.0, 1.0, 1e-30, 1 + 2**-23])])
    x = torch.cat([x, -x]) if signed else x
    key = (x.view(torch.int32) >> 16) & 0xFFFF
    assert key.max() < NEGATIVE_AT + 0x4000
    index = table[key + (0 if signed else UNSIGNED_AT)].int()
    index = index + (x > bounds[index])
    assert torch.equal(index, torch.bucketize(x, bounds))


def test_a_record_is_80_bytes_and_its_blocks_are_counted_on() -> None:
    p = torch.zeros(300)
    scalars = [Scalars(*range(10)), Scalars(*range(1, 11))]
    some, none = Step("adam", 32, p, p, (p, p), ()), Step("adam", 32, p[:0], p[:0], (p, p), ())
    (packed,) = pack_records([(some.record(), scalars[0]), (none.record(), scalars[0]), (some.record(), scalars[1])], 9)
    assert (len(packed.records), packed.blocks, len(packed.numbers)) == (160, 4, 320)
    fields = struct.unpack("<7q3i12x", packed.records[80:])
    assert fields[0] == p.data_ptr()
    assert fields[6:9] == (300, 4, 1)  # elements, end, float32 states
    assert fields[9] == 1  # the second set of numbers
    assert struct.unpack("<20f", packed.numbers[:80]) == (*range(10), *range(1, 11))


def test_many_tensors_or_many_sets_of_numbers_take_more_launches() -> None:
    record = Step("adam", 32, torch.zeros(300), torch.zeros(300), (), ()).record()
    scalars = [Scalars(*range(start, start + 10)) for start in range(9)]
    assert [packed.blocks for packed in pack_records([(record, scalars[0])] * 5, 2)] == [4, 4, 2]
    assert [packed.blocks for packed in pack_records([(record, one) for one in scalars], 20)] == [16, 2]
    assert pack_records([], 2) == []


def tensors(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    whole = torch.randn(70_001, generator=generator).to(dtype).cuda()
    shapes = [(256, 512), (5003,), (64, 64), (100,), (0,)]
    made = [torch.randn(shape, generator=generator).to(dtype).cuda() for shape in shapes]
    return [nn.Parameter(x) for x in [*made, whole[1:]]]  # the last is not aligned to 16 bytes


def run(optimizer: BlockwiseOptimizer, steps: int, plainly: bool) -> None:
    parameters = optimizer.param_groups[0]["params"]
    for step in range(steps):
        for index, parameter in enumerate(parameters):
            generator = torch.Generator().manual_seed(100 * step + index)
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype).cuda()
        if not plainly:
            optimizer.step()
            continue
        with torch.no_grad():
            for parameter in parameters:
                group = optimizer.param_groups[0]
                one = optimizer._step(parameter, group["bits"])
                one.state["step"] += 1
                _step_plainly(one, optimizer._hyper(group, one.state["step"]))


@GPU
@pytest.mark.gpu
@pytest.mark.parametrize("paged", [False, True], ids=["on the device", "paged"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("make", [AdamW8bit, Adam8bit, Lion8bit, SGD8bit, AdamW4bit])
def test_the_kernel_agrees_with_torch(make: type, dtype: torch.dtype, paged: bool) -> None:
    fused, plain = tensors(dtype), tensors(dtype)
    bits = 4 if make is AdamW4bit else 8
    options = {"lr": 1e-2, "weight_decay": 0.1, "options": StateOptions(bits, paged=paged)}
    first, second = make(fused, **options), make(plain, **options)
    run(first, 4, plainly=False)
    run(second, 4, plainly=True)
    torch.cuda.synchronize()
    for a, b in zip(fused, plain, strict=True):
        # measured: float32 differs by fused multiply-adds and an approximate square root; 16-bit by one rounding
        tolerance = 2e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
        wrong = ((a - b).abs().float() > tolerance * (1 + b.abs().float())).float().mean().item() if a.numel() else 0
        assert wrong <= 1e-3
        for key, value in first.state[a].items():
            other = second.state[b][key]
            if key == "step":
                assert value == other
            elif value.dtype == torch.uint8:
                if bits == 4:
                    value, other = (unpack_nibbles(codes, a.numel()) for codes in (value, other))
                distance = (value.int() - other.int()).abs()
                assert (distance > 1).float().mean() < 1e-3
                assert (distance > 0).float().mean() < 1e-2
            elif value.numel():
                # the largest element of a block may itself come from a code that is off by one, a step of up to 2%
                assert ((value - other).abs() > 2e-4 * other.abs() + 1e-6).float().mean() < 1e-2
                assert torch.allclose(value, other, rtol=2e-2, atol=1e-6)


@GPU
@pytest.mark.gpu
def test_a_nan_in_a_gradient_is_not_swallowed() -> None:
    parameter = nn.Parameter(torch.ones(8192, device="cuda"))
    optimizer = AdamW8bit([parameter])
    parameter.grad = torch.ones_like(parameter)
    parameter.grad[300] = torch.nan
    optimizer.step()
    assert parameter[300].isnan()
    assert optimizer.state[parameter]["exp_avg_absmax"][1].isnan()
