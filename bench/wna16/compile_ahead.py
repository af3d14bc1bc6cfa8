"""Compiles the weight-only kernels' variants of an H200 ahead: python compile_ahead.py PROCESSES [measured]

Asks the launchers for their plans with the facts of an H200 and no GPU, then fills the cache of cubins. Nothing but
time hangs on it: whoever skips it compiles each variant at its first use.
"""

import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from unittest.mock import patch

import torch
from sweep import MMA_TILES, SHARES, tiles

from lowbit.kernels.cuda import compiler, wna16_dequantize, wna16_layout, wna16_mma, wna16_wgmma
from lowbit.kernels.cuda.device import Gpu
from lowbit.kernels.layout import FastForm

H200 = Gpu((9, 0), 132, 232448)
MEASURED = (FastForm("int4", 128, False), FastForm("lut", 64, False), FastForm("int8", 128, False))
FORMS = (
    *MEASURED,
    *(FastForm("int4", 128, True), FastForm("int8", 64, True), FastForm("int8", 32, False)),
    *(
        FastForm("lut", 128, False),
        FastForm("int2", 64, False),
        FastForm("int4", 32, True),
        FastForm("int4", 16, False),
    ),
)
SIZES = ((28672, 4096), (4096, 4096), (512, 1024), (192, 768))
Wanted = tuple[str, tuple[tuple[str, int | str], ...]]


class _Recorder:
    def clusters_at_once(self, block: tuple[int, int, int], shared_bytes: int, cluster: int) -> int:
        return 132 // cluster


def wanted(forms: Sequence[FastForm], dtypes: Sequence[torch.dtype]) -> list[Wanted]:
    """(file, defines) of what the plans of these forms, types of x and all SIZES ask for."""
    found: dict[Wanted, None] = {}

    def record(name, function, parameters, device, defines=(), shared_bytes=0):
        found[name, defines] = None
        return _Recorder()

    with (
        patch.object(wna16_mma, "load_kernel", record),
        patch.object(wna16_wgmma, "load_kernel", record),
        patch.object(wna16_dequantize, "load_kernel", record),
        patch.object(wna16_layout, "load_kernel", record),
        patch.object(wna16_mma, "gpu_of", lambda device: H200),
        patch.object(wna16_wgmma, "gpu_of", lambda device: H200),
    ):
        device = torch.device("cuda", 0)
        for form in forms:
            for dtype in dtypes:
                for size in SIZES:
                    for tokens in (8, 16, 32, 64, 128):
                        wna16_wgmma.plan_of(form, size, tokens, dtype, device)
                    for tokens in (8, 16):
                        wna16_mma.plan_of(form, size, tokens, dtype, device)
                wna16_dequantize.kernel(form, dtype, device)
            for bits in {"int2": (2,), "int4": (4, 3), "int8": (8, 6), "lut": (16,)}[form.codes]:
                wna16_layout.layout_kernel(form, bits, device)
    for form, tokens in product(forms[:3], SHARES):
        for tile in tiles(form, tokens):
            found["wna16_wgmma.cu", wna16_wgmma.wgmma_defines(form, torch.bfloat16, tile)] = None
    for form, numbers in product(forms[:3], MMA_TILES):
        found["wna16_mma.cu", wna16_mma.mma_defines(form, torch.bfloat16, wna16_mma.Tile(*numbers))] = None
    return list(found)


def build(one: Wanted) -> int:
    """The bytes of one variant's cubin, from the cache or compiled into it."""
    name, defines = one
    return len(compiler.cached_cubin(name, "sm_90a", dict(defines), compiler.cache_directory()))


if __name__ == "__main__":
    measured = "measured" in sys.argv
    half, bfloat = torch.float16, torch.bfloat16
    variants = wanted(MEASURED, (bfloat,)) if measured else wanted(FORMS, (bfloat, half))
    with ProcessPoolExecutor(int(sys.argv[1]), get_context("fork")) as pool:
        print(len(variants), "variants,", sum(pool.map(build, variants)), "bytes")
