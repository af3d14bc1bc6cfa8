"""Which functions of which .cu file are compiled with which defines, and which architectures can't have them.

The compile test builds every row for every architecture; a launcher takes its defines from here.
"""

from dataclasses import dataclass

import torch

from lowbit.kernels.cuda.optim import AHEAD, SETS
from lowbit.kernels.cuda.wna16_dequantize import dequantize_defines
from lowbit.kernels.cuda.wna16_layout import NIBBLES, form_defines
from lowbit.kernels.cuda.wna16_mma import Tile, mma_defines
from lowbit.kernels.cuda.wna16_wgmma import Tile as WgmmaTile
from lowbit.kernels.cuda.wna16_wgmma import wgmma_defines
from lowbit.kernels.layout import FastForm


@dataclass(frozen=True)
class Variant:
    """One compilation: the file, a function in it, the defines; and the instructions that it can't do without.

    least: the lowest compute capability (major, minor). only: the one architecture whose instructions it is made of.
    """

    file: str
    function: str
    defines: tuple[tuple[str, int | str], ...] = ()
    least: tuple[int, int] = (7, 5)
    only: str | None = None
    why: str = ""

    def refusal(self, architecture: str) -> str | None:
        """Why this can't be compiled for an architecture such as "sm_75", or None."""
        if self.only is not None and architecture != self.only:
            return f"{self.file} is made for {self.only} alone: {self.why}"
        major, minor = divmod(int(architecture.removeprefix("sm_").rstrip("a")), 10)
        if (major, minor) < self.least:
            return f"{self.file} needs compute capability {self.least[0]}.{self.least[1]}: {self.why}"
        return None


def _wna16() -> tuple[Variant, ...]:
    """Every code path once: forms of codes, zero-points, small groups, both types of x."""
    half, bfloat = torch.float16, torch.bfloat16
    int4, nf4 = FastForm("int4", 32, True), FastForm("lut", 64, False)
    int8, int2 = FastForm("int8", 128, False), FastForm("int2", 16, True)
    turing, ampere, hopper = (7, 5), (8, 0), "sm_90a"
    mma = ((int4, half, 1, 2, turing), (int8, half, 1, 1, turing), (nf4, bfloat, 2, 1, ampere))
    tensor_cores = "bfloat16 tensor cores came with it"
    return (
        *(
            Variant(
                "wna16_mma.cu", "wna16_mma", mma_defines(form, dtype, Tile(8, rows, tokens, 2, 1)), least, None, why
            )
            for form, dtype, rows, tokens, least in mma
            for why in [tensor_cores if dtype == bfloat else ""]
        ),
        *(
            Variant(
                "wna16_wgmma.cu", "wna16_wgmma", wgmma_defines(form, dtype, tile), ampere, hopper, "wgmma is its own"
            )
            for form, dtype, tile in (
                (int4, half, WgmmaTile(16, 4, 5, 2)),
                (nf4, bfloat, WgmmaTile(32, 2, 4, 1)),
                (int8, bfloat, WgmmaTile(64, 4, 3, 1)),
                (int4, bfloat, WgmmaTile(128, 4, 4, 1)),
            )
        ),
        Variant("wna16_layout.cu", "wna16_layout", (*form_defines(int4), ("BITS", 3))),
        Variant("wna16_layout.cu", "wna16_layout", (*form_defines(nf4), ("BITS", NIBBLES))),
        Variant("wna16_dequantize.cu", "wna16_dequantize", dequantize_defines(int2, half)),
        Variant("wna16_dequantize.cu", "wna16_dequantize", dequantize_defines(nf4, bfloat)),
    )


WNA16 = _wna16()
_MATRIX = "its instructions came with that architecture"
_WGMMA = "wgmma exists there and nowhere else"
INT8 = (
    Variant("int8_naive.cu", "int8_naive"),
    Variant("int8_dp4a.cu", "int8_dp4a"),
    Variant("int8_wmma.cu", "int8_wmma"),
    Variant("int8_mma_m8n8k16.cu", "int8_mma_m8n8k16", (("KIND", 0),)),
    Variant("int8_mma_m8n8k16.cu", "int8_mma_m8n8k16", (("KIND", 1),)),
    Variant("int8_mma_m16n8k32.cu", "int8_mma_m16n8k32", (("KIND", 0),), least=(8, 0), why=_MATRIX),
    Variant("int8_mma_m16n8k32.cu", "int8_mma_m16n8k32", (("KIND", 2),), least=(8, 0), why=_MATRIX),
    *(
        Variant("int8_wgmma.cu", "int8_wgmma", (("KIND", kind), *defines), only="sm_90a", why=_WGMMA)
        for kind in range(4)
        for defines in ((), (("ALIGNED", 0), ("TILE_N", 192)))
    ),
    *(
        Variant(
            "int8_wgmma.cu",
            "int8_wgmma",
            (("KIND", kind), ("QUANTIZE", 1), ("WARPS", warps)),
            only="sm_90a",
            why=_WGMMA,
        )
        for kind, warps in ((1, 4), (2, 1))
    ),
    Variant("int8_wgmma_decode.cu", "int8_wgmma_decode", (("KIND", 0),), only="sm_90a", why=_WGMMA),
    *(
        Variant(
            "int8_wgmma_decode.cu",
            "int8_wgmma_decode",
            (("KIND", 2), ("ROWS", rows), ("SPLIT", 4), ("STAGES", 4), ("TOKENS", tokens)),
            only="sm_90a",
            why=_WGMMA,
        )
        for tokens, rows in ((8, 64), (16, 64), (32, 64), (64, 64), (128, 128))
    ),
)
OPTIM = tuple(
    Variant(
        "optim_blockwise.cu",
        "optim_blockwise",
        (
            *(("BITS", bits), ("RULE", rule), ("PARAM", parameter), ("SETS", SETS)),
            *(("THREADS", 512), ("REPLICAS", 8), ("AHEAD", AHEAD)),
        ),
    )
    for bits, rule, parameter in ((8, 0, 0), (8, 1, 1), (4, 0, 1))
)
VARIANTS: tuple[Variant, ...] = (*WNA16, *INT8, *OPTIM)
