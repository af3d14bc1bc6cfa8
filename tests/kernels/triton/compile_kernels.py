"""Compile Triton kernels for GPUs that are not here; run as a script, in a process without Triton's interpreter.

    python compile_kernels.py ARCHITECTURE      such as 89 or 90

The package's own functions are called on tensors of the CPU with launching replaced by compiling (to a cubin, with the
ptxas that comes with Triton), so that every kernel is compiled with the types and constants of a real call. Switches
that these functions turn on for a GPU alone are compiled both ways. The last line printed is JSON: kernel -> errors.
"""

import inspect
import json
import sys
from collections import defaultdict
from itertools import product
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lowbit.kernels.int8 import Scaling
from lowbit.kernels.triton import (
    columns,
    fake_quantize,
    fp8_quantize,
    hadamard,
    int8_linear,
    int8_quantize,
    kl_rows,
    nibbles_dequantize,
    rounding,
    wna16_linear,
)
from lowbit.numerics.hadamard import Hadamard
from lowbit.numerics.scheme import QuantScheme
from lowbit.tensors import PackedWeight

TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int8: "*i8", torch.uint8: "*u8",
    torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64", torch.bool: "*i1", torch.float8_e4m3fn: "*fp8e4nv",
}  # fmt: skip
SWITCHES = {"SHORT": 80, "EARLY": 90}  # from which architecture on
found: dict[str, list[str]] = defaultdict(list)


def _type_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return TYPES[value.dtype]
    if isinstance(value, bool):
        return "i1"
    return "fp32" if isinstance(value, float) else "i32"


def _compile(self: Any, *args: Any, grid: Any = None, warmup: bool = False, **kwargs: Any) -> None:
    """In the place of JITFunction.run."""
    names = [parameter.name for parameter in self.params]
    options = {key: value for key, value in kwargs.items() if key not in names}
    bound = inspect.signature(self.fn).bind(*args, **{key: kwargs[key] for key in kwargs if key in names})
    bound.apply_defaults()
    constants = {
        parameter.name: bound.arguments[parameter.name]
        for parameter in self.params
        if parameter.is_constexpr or bound.arguments[parameter.name] is None
    }
    types = {name: "constexpr" if name in constants else _type_of(bound.arguments[name]) for name in names}
    switches = [name for name, least in SWITCHES.items() if name in constants and least <= ARCHITECTURE]
    for values in product((False, True), repeat=len(switches)):
        source = ASTSource(self, types, constants | dict(zip(switches, values, strict=True)))
        errors = found[f"{self.fn.__module__.rpartition('.')[2]}.{self.__name__}"]
        try:
            triton.compile(source, target=GPUTarget("cuda", ARCHITECTURE, 32), options=options)
        except Exception as error:
            errors.append(f"{type(error).__name__}: {str(error)[-300:]}")


def _call_everything() -> None:
    """Every public function of the package, once per way through it."""
    codes = torch.zeros(64, 256, dtype=torch.int8)
    ones, bias = torch.ones(1), torch.ones(64)
    int8_linear.product(codes, codes)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        x = torch.randn(4, 256).to(dtype)
        fp8_quantize.quantize_rows(x)
        fp8_quantize.quantize_static(x, ones.to(dtype))
        fp8_quantize.quantize_groups(x, 128)
        int8_linear.product(codes, codes, Scaling(dtype, torch.ones(64), ones))
        int8_linear.product(codes, codes, Scaling(dtype, ones, bias, ones.int(), bias.int(), bias))
        for symmetric in (True, False):
            int8_quantize.quantize_rows(x, symmetric)
            int8_quantize.silu_product_quantize(x, x, None, symmetric)
            int8_quantize.rms_norm_quantize(x, x[0], 1e-5, x, x[0], symmetric)
        int8_quantize.quantize_static(x, ones.to(dtype), None)
        int8_quantize.quantize_static(x, ones.to(dtype), codes[0, :1])
        for inverse in (True, False):
            hadamard.rotate(torch.randn(4, 576).to(dtype), Hadamard.of(576, None, 0), inverse)
    for scheme in ("w4a16-g64", "w4a16-g64-asym", "w3a16-g32", "w8a16", "nf4-b64", "nf4-b64-dq", "fp4-b64"):
        for dtype in (torch.float16, torch.bfloat16):
            weight = PackedWeight.from_float(torch.randn(64, 256), QuantScheme.parse(scheme), dtype)
            for tokens in (1, 4, 64):
                wna16_linear.product(torch.randn(tokens, 256).to(dtype), weight, None)
    panel, corner = torch.randn(128, 64), torch.randn(128, 128)
    for scheme in ("w4a16-g64", "nvfp4"):
        limits = QuantScheme.parse(scheme).weights.format
        columns.round_panel(panel, corner, panel, panel, limits)
        columns.descend_panel(panel, corner, panel, panel, limits)
    grids, int4 = torch.ones(64, 4), QuantScheme.parse("w4a16-g64").weights
    for zero in (None, grids):
        w = torch.randn(64, 256)
        rounding.rounded_weight(w, w, grids, zero, int4.format, torch.bfloat16)
        rounding.rounded_gradients(w, w, grids, zero, w.bfloat16(), int4.format)
        for stored in (torch.float16, torch.bfloat16, torch.float32):
            fake_quantize.fake_quantize(w, grids, zero, int4, stored, torch.bfloat16)
            fake_quantize.fake_quantize_backward(w.bfloat16(), w, grids, zero, int4, stored)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        x = torch.randn(4, 256).to(dtype)
        kl_rows.kl_rows(x, x)
        for scheme in ("w8a8", "w8a8-dynamic-asym"):
            activations = QuantScheme.parse(scheme).activations
            assert activations is not None
            fake_quantize.fake_quantize_rows(x, activations)
        static = QuantScheme.parse("w8a8-static").activations
        assert static is not None
        for zero in (None, ones):
            fake_quantize.fake_quantize(x, ones, zero, static, torch.bfloat16, torch.bfloat16)
            fake_quantize.fake_quantize_backward(x, x, ones, zero, static, torch.bfloat16)
        for scheme in ("nf4-b64", "nf4-b64-dq", "fp4-b64"):
            weight = PackedWeight.from_float(torch.randn(64, 256), QuantScheme.parse(scheme), dtype)
            nibbles_dequantize.dequantize(x, weight)


if __name__ == "__main__":
    ARCHITECTURE = int(sys.argv[1])
    triton.runtime.JITFunction.run = _compile
    _call_everything()
    print(json.dumps(found))
