"""Compile Triton kernels for GPUs that are not here; run as a script, in a process without Triton's interpreter.

    python compile_kernels.py ARCHITECTURE      such as 80 or 90

The package's own functions are called on tensors of the CPU with launching replaced by compiling (to a cubin, with the
ptxas that comes with Triton), so that every kernel is compiled with the types and constants of a real call. The switches
that these functions turn on for a GPU alone are compiled both ways. Prints JSON: kernel -> errors of its compilations.
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

TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int8: "*i8", torch.uint8: "*u8",
    torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64", torch.bool: "*i1", torch.float8_e4m3fn: "*fp8e4nv",
}  # fmt: skip
SWITCHES = ("SHORT", "EARLY")
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
    switches = [name for name in SWITCHES if name in constants]
    for values in product((False, True), repeat=len(switches)):
        source = ASTSource(self, types, constants | dict(zip(switches, values, strict=True)))
        errors = found[self.__name__]
        try:
            triton.compile(source, target=GPUTarget("cuda", ARCHITECTURE, 32), options=options)
        except Exception as error:  # noqa: BLE001  any error of the compiler is what is looked for
            errors.append(f"{type(error).__name__}: {str(error)[-300:]}")


def _calls() -> None:
    """Every public function of the package once per way through it."""
    from lowbit.kernels.int8 import Scaling  # noqa: PLC0415
    from lowbit.kernels.triton import columns, fp8_quantize, int8_linear, int8_quantize, wna16_linear  # noqa: PLC0415
    from lowbit.numerics.scheme import QuantScheme  # noqa: PLC0415
    from lowbit.tensors import PackedWeight  # noqa: PLC0415

    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        x = torch.randn(4, 256).to(dtype)
        fp8_quantize.quantize_rows(x)
        for symmetric in (True, False):
            int8_quantize.quantize_rows(x, symmetric)
            int8_quantize.silu_product_quantize(x, x, None, symmetric)
            int8_quantize.rms_norm_quantize(x, torch.ones(256, dtype=dtype), 1e-5, symmetric=symmetric)
        int8_quantize.quantize_static(x, torch.ones(1, dtype=dtype), None)
        int8_quantize.quantize_static(x, torch.ones(1, dtype=dtype), torch.zeros(1, dtype=torch.int8))
    codes = torch.zeros(64, 256, dtype=torch.int8)
    int8_linear.product(codes, codes)
    for scheme in ("w4a16-g64", "w4a16-g64-asym", "w3a16-g32", "w8a16", "nf4-b64", "nf4-b64-dq", "fp4-b64"):
        for dtype in (torch.float16, torch.bfloat16):
            weight = PackedWeight.from_float(torch.randn(64, 256), QuantScheme.parse(scheme), dtype)
            wna16_linear.product(torch.randn(4, 256).to(dtype), weight, None)
    _ = Scaling, columns


if __name__ == "__main__":
    ARCHITECTURE = int(sys.argv[1])
    triton.runtime.JITFunction.run = _compile
    _calls()
    print(json.dumps(found))
