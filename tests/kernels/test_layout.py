"""The fast layout read back by the drawing in cuda/wna16_record.cuh; the oracle is PackedWeight.dequantize."""

import gc

import pytest
import torch
from torch import Tensor

from lowbit.kernels import layout
from lowbit.numerics.codebook import levels_of
from lowbit.numerics.scheme import QuantScheme
from lowbit.tensors import PackedWeight

SCHEMES = (
    *("w2a16-g32-asym", "w3a16-g64", "w4a16-g32-asym", "w4a16-g96", "w4a16-g48", "w4a16-asym"),
    *("w4a16-tensor", "w5a16-g64", "w8a16", "w8a16-g64-asym", "nf4-b64", "nf4-b256-dq", "fp4-b64"),
)


def weight_of(scheme: str, rows: int, columns: int) -> PackedWeight:
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02
    return PackedWeight.from_float(w, QuantScheme.parse(scheme), torch.bfloat16)


def word_and_shift(form: layout.FastForm, j: int, i: int, p: int) -> tuple[int, int]:
    """Where the drawing puts the p-th code of operand a_i of step j: (word of the lane's half, bit)."""
    return {
        "int4": (j, 4 * i + 16 * p),
        "int2": (j // 2, 2 * (4 * (j % 2) + i) + 16 * p),
        "int8": (2 * j + i // 2, 8 * (i % 2) + 16 * p),
        "lut": (j, 8 * i + 4 * p),
    }[form.codes]


def codes_read_back(records: Tensor, form: layout.FastForm) -> Tensor:
    """The codes [16 strips, 128 records] that the lanes of a warp find."""
    strips, per_row = records.shape[:2]
    vector = min(form.bits, 4)
    words = records[..., : 16 * 128 * form.bits // 8].contiguous().view(torch.int32).long() & 0xFFFFFFFF
    words = words.view(strips, per_row, 2, form.bits // vector, 32, vector)
    codes = torch.empty(strips, 16, per_row, 128, dtype=torch.long)
    for half, lane, j, i, p in torch.cartesian_prod(*map(torch.arange, (2, 32, 4, 4, 2))).tolist():
        word, shift = word_and_shift(form, j, i, p)
        found = words[:, :, half, word // vector, lane, word % vector] >> shift & (2**form.bits - 1)
        row, column = lane // 4 + 8 * (i % 2), 64 * half + 16 * j + 8 * (i // 2) + 2 * (lane % 4) + p
        codes[:, row, :, column] = found
    return codes.view(strips * 16, per_row * 128)


def parameter_read_back(part: Tensor, form: layout.FastForm) -> Tensor:
    """Scales or zero-points [strips, records, groups * 8 * 2] for every element."""
    strips, per_row = part.shape[:2]
    pairs = part.view(strips, per_row, 128 // form.group, 8, 2).permute(0, 4, 3, 1, 2)  # [strip, r, g, record, group]
    return pairs.reshape(strips * 16, -1).repeat_interleave(form.group, dim=1)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_records_read_as_the_tensor_core_reads_them_are_the_weight(scheme: str) -> None:
    rows, columns = 40, 576
    weight = weight_of(scheme, rows, columns)
    form = layout.form_of(weight)
    units = layout.records(weight)
    assert units.shape == (1, 5, 16, form.record_bytes)
    records = units[0].transpose(0, 1)
    at = 16 * 128 * form.bits // 8
    scale_bytes = 128 // form.group * 32
    scales = records[..., at : at + scale_bytes].contiguous().view(torch.float16)
    scale = parameter_read_back(scales, form).float() * layout.normalized_scales(weight, form)[1]
    q = codes_read_back(records, form)
    if form.codes == "lut":
        value = levels_of(weight.scheme.weights.format.name)[q]
    else:
        zero = records[..., at + scale_bytes :].contiguous()
        value = q - (parameter_read_back(zero, form).long() if form.has_zero else 2 ** (form.bits - 1))
    # int scales are bf16 and stay exact; an absmax is float32 and keeps 11 bits
    rtol = 0 if form.codes != "lut" else 2**-11
    torch.testing.assert_close((value * scale)[:rows, :columns], weight.dequantize(), rtol=rtol, atol=0)


def test_scales_far_apart_stay_exact() -> None:
    weight = weight_of("w4a16-g64", 16, 128)
    weight.scale[0, 0], weight.scale[3, 1] = 2.0**-30, 3.0 * 2**-5
    scales, factor, _ = layout.normalized_scales(weight, layout.form_of(weight))
    assert torch.equal(scales.float() * factor, weight.scale.float())


def test_groups_that_no_step_of_sixteen_divides_are_refused_with_the_reason() -> None:
    assert "groups of 40 over 80 columns" in str(layout.form_refusal(weight_of("w4a16-g40", 16, 80)))
    assert "groups of 64 over 100 columns" in str(layout.form_refusal(weight_of("nf4-b64", 16, 100)))
    assert "not a scheme for 16-bit activations" in str(layout.form_refusal(weight_of("w8a8", 16, 64)))


def test_the_fast_form_is_made_once_remade_after_a_write_and_freed_with_the_codes() -> None:
    made = []

    def derive(weight: PackedWeight) -> layout.FastWeight:
        form = layout.form_of(weight)
        fast = layout.FastWeight(form, layout.records(weight), torch.ones(1), None)
        made.append(fast)
        return fast

    weight = weight_of("w4a16-g64", 16, 128)
    assert layout.fast_weight(weight, derive) is layout.fast_weight(weight, derive)
    weight.codes.zero_()
    assert layout.fast_weight(weight, derive) is made[1]
    layout.release(weight)
    assert layout.fast_weight(weight, derive) is made[2]
    before = len(layout._fast)
    del weight
    gc.collect()
    assert len(layout._fast) == before - 1
