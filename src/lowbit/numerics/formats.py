"""Number formats as data: what a code can hold.

Integers of B bits are signed two's complement ranges [-2^(B-1), 2^(B-1) - 1], symmetric or not: an unsigned code u of
the literature is our q + 2^(B-1), and its zero-point is our zero + 2^(B-1).
fp8 e4m3: OCP 8-bit floating point (arXiv:2209.05433), "fn" flavour: no infinities, largest value 448.
nf4, fp4: 16 levels in [-1, 1] looked up in numerics/codebook.py.
nvfp4, mxfp4: E2M1 codes (OCP Microscaling 1.0, section 5.3.3), largest value 6, under small scales: one e4m3 per 16
values and one float32 per tensor (nvfp4), or one power of two per 32 values (mxfp4); numerics/microscale.py.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class NumberFormat:
    """name, width in bits, and the smallest and largest number that a code stands for before scaling."""

    name: str
    kind: Literal["int", "float", "codebook"]
    bits: int
    low: float
    high: float

    def __str__(self) -> str:
        return self.name


def int_format(bits: int) -> NumberFormat:
    """The signed integer format of `bits` bits, 2 to 8."""
    return NumberFormat(f"int{bits}", "int", bits, float(-(2 ** (bits - 1))), float(2 ** (bits - 1) - 1))


INT_BITS = range(2, 9)
FP8_E4M3 = NumberFormat("fp8", "float", 8, -448.0, 448.0)
NF4 = NumberFormat("nf4", "codebook", 4, -1.0, 1.0)
FP4 = NumberFormat("fp4", "codebook", 4, -1.0, 1.0)
NVFP4 = NumberFormat("nvfp4", "float", 4, -6.0, 6.0)
MXFP4 = NumberFormat("mxfp4", "float", 4, -6.0, 6.0)
