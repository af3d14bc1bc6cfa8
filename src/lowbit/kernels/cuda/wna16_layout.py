"""The fast form of a weight, made on its device at first use by wna16_layout.cu (kernels/layout.py says what it is)."""

import torch

from lowbit.kernels.cuda.compiler import Kernel, current_stream, load_kernel
from lowbit.kernels.layout import (
    RECORD,
    STRIP,
    UNIT,
    FastForm,
    FastWeight,
    fast_weight,
    form_of,
    normalized_scales,
)
from lowbit.numerics.codebook import levels_of
from lowbit.numerics.storage import storage_of
from lowbit.tensors import PackedWeight

FORMATS = {"int2": 2, "int4": 4, "int8": 8, "lut": 16}
NIBBLES = 16  # what wna16_layout.cu calls the bits of nf4 and fp4 codes
Defines = tuple[tuple[str, int | str], ...]


def form_defines(form: FastForm) -> Defines:
    """The defines by which wna16_record.cuh knows a form."""
    return (("FORMAT", FORMATS[form.codes]), ("GROUP", form.group), ("ASYM", int(form.has_zero)))


def fast(weight: PackedWeight) -> FastWeight:
    """The fast form of `weight` on its device; made at first use, then remembered."""
    return fast_weight(weight, derive)


def derive(weight: PackedWeight) -> FastWeight:
    """Make the fast form of `weight`. Raises RuntimeError inside the capture of a graph."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("run a quantized layer once before capturing it: its fast layout is made at first use")
    with torch.cuda.device(weight.codes.device):
        return _derive(weight)


def _derive(weight: PackedWeight) -> FastWeight:
    form, device = form_of(weight), weight.codes.device
    rows, columns = weight.shape
    codes = weight.codes.contiguous()
    scales, factor, zeros = normalized_scales(weight, form)
    units, per_strip = -(-rows // UNIT), -(-columns // RECORD)
    records = torch.empty(units, per_strip, UNIT // STRIP, form.record_bytes, dtype=torch.uint8, device=device)
    bits = NIBBLES if storage_of(weight.scheme) == "nibbles" else weight.scheme.weights.bits
    words = per_strip * form.record_bytes // 4
    pointers = (codes.data_ptr(), scales.data_ptr(), 0 if zeros is None else zeros.data_ptr(), 0, records.data_ptr())
    sizes = (rows, columns, 0 if bits == NIBBLES else codes.shape[-1])
    grid = (-(-words // 256), units * UNIT // STRIP, 1)
    layout_kernel(form, bits, device).launch(grid, (256, 1, 1), (*pointers, *sizes), 0, current_stream(device))
    levels = None
    if form.codes == "lut":
        table = levels_of(weight.scheme.weights.format.name).to(device)
        levels = {dtype: table.to(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32)}
    torch.cuda.current_stream(device).synchronize()  # a launch may start before the kernel before it has ended
    return FastWeight(form, records, factor, levels)


def layout_kernel(form: FastForm, bits: int, device: torch.device) -> Kernel:
    """wna16_layout for codes of `bits` bits (16: nibbles) into `form`."""
    defines = (*form_defines(form), ("BITS", bits))
    return load_kernel("wna16_layout.cu", "wna16_layout", "PPPPPiii", device, defines)
