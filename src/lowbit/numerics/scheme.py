"""Schemes: which numbers stand for a tensor, and how that is written.

    w4a16-g64            int4 weights in groups of 64 along K, symmetric; 16-bit activations
    w4a16-g64-asym       the same with a zero-point per group
    w8a16                int8 weights, a scale per channel (row of [N, K]); w8a16-tensor: one scale
    w8a8                 int8 weights per channel x int8 activations per token, scaled at run time
    w8a8-dynamic-asym    activations with a zero-point per token
    w8a8-static          one activation scale per tensor, from calibration; w8a8-static-asym: with a zero-point
    w4a8-g64, w4a4-g64   int4 weights in groups x int8 or int4 activations per token, scaled at run time
    nf4-b64, fp4-b64     16 levels, one absmax per 64 consecutive weights; -dq: the absmax in 8 bits (QLoRA)
    fp8                  e4m3 weights per channel x e4m3 activations per token; fp8a16: 16-bit activations
    fp8-tensor           one scale for the weights; fp8-tile128: one per 128 x 128 weights and per 128 activations
    fp8-tensor-static    one calibrated scale for the activations
    nvfp4, mxfp4         E2M1 weights x E2M1 activations under small scales; nvfp4a16, mxfp4a16: weights only
    int8-t6              LLM.int8(): int8 weights per channel x int8 activations per token, but input columns with a
                         value of 6 or more are multiplied in 16 bits; int8-t0: no such columns
    w4a4-g64-search      each scale of the activations is the best of a few at run time (numerics/dynamic.py); also
                         nvfp4-search, mxfp4-search
    w4a16-g128-order     groups of columns that are not neighbours (GPTQ's act-order), told by weight_order

A `-asym` after `-static` or `-dynamic` speaks of the activations, elsewhere of the weights.
"""

import re
from dataclasses import dataclass
from typing import Literal

from lowbit.errors import SchemeError
from lowbit.numerics.formats import FP4, FP8_E4M3, INT_BITS, MXFP4, NF4, NVFP4, NumberFormat, int_format

Granularity = Literal["tensor", "channel", "group", "token", "block", "tile"]

GRAMMAR = (
    "w<bits>a16[-tensor|-g<size>][-asym] (bits 2 to 8), w<bits>a8[-tensor|-g<size>][-asym][-static|-dynamic][-asym]"
    "[-search] (or a4), nf4-b<size>[-dq], fp4-b<size>[-dq], fp8[a16][-tensor|-tile<size>][-static], "
    "nvfp4[a16][-search], mxfp4[a16][-search], "
    "int8-t<threshold>; for example w4a16-g64, w4a16-g64-asym, w8a16, w8a8, w8a8-static, nf4-b64, fp8"
)
_INT = re.compile(
    r"w(?P<wbits>\d+)a(?P<abits>\d+)(?:-(?P<tensor>tensor)|-g(?P<group>\d+))?(?P<asym>-asym)?"
    r"(?:-(?P<mode>static|dynamic)(?P<act_asym>-asym)?)?(?P<search>-search)?(?P<order>-order)?"
)
_CODEBOOK = re.compile(r"(?P<name>nf4|fp4)-b(?P<block>\d+)(?P<nested>-dq)?")
_FP8 = re.compile(r"fp8(?P<a16>a16)?(?:-(?P<tensor>tensor)|-tile(?P<tile>[1-9]\d*))?(?P<static>-static)?")
_FP4 = re.compile(r"(?P<name>nvfp4|mxfp4)(?P<a16>a16)?(?P<search>-search)?")
_OUTLIERS = re.compile(r"int8-t(?P<threshold>\d+(?:\.\d+)?)")
_FP4_GROUPS = {"nvfp4": 16, "mxfp4": 32}


@dataclass(frozen=True)
class TensorScheme:
    """How one tensor is quantized.

    group_size counts elements along K for "group", consecutive elements of the flattened tensor for "block", the side
    of a square of rows and columns for "tile". dynamic: the scale is computed from the tensor at run time. nested:
    block scales are themselves in 8 bits. outlier: columns of activations that reach this value stay in 16 bits (0:
    none do). ordered: groups follow a stored order of the columns, not their place. searched: a dynamic scale is the
    best of a few candidates.
    """

    format: NumberFormat
    granularity: Granularity
    symmetric: bool = True
    group_size: int | None = None
    dynamic: bool = False
    nested: bool = False
    outlier: float | None = None
    ordered: bool = False
    searched: bool = False

    @property
    def bits(self) -> int:
        return self.format.bits


@dataclass(frozen=True)
class QuantScheme:
    """A scheme for the weights of a linear layer and, unless they stay in 16 bits, for its input."""

    weights: TensorScheme
    activations: TensorScheme | None = None

    def __str__(self) -> str:
        weights, activations = self.weights, self.activations
        if weights.format.kind == "codebook":
            nested = "-dq" if weights.nested else ""
            return f"{weights.format.name}-b{weights.group_size}{nested}"  # of plain strings only, for Dynamo
        if weights.format.kind == "float":
            return self._float_text()
        if activations and activations.outlier is not None:
            return f"int8-t{activations.outlier:g}"
        text = f"w{weights.bits}a{activations.bits if activations else 16}"
        text += {"tensor": "-tensor", "group": f"-g{weights.group_size}"}.get(weights.granularity, "")
        text += "-asym" * (not weights.symmetric)
        if activations and not (activations.dynamic and activations.symmetric):
            text += ("-dynamic" if activations.dynamic else "-static") + "-asym" * (not activations.symmetric)
        return text + "-search" * bool(activations and activations.searched) + "-order" * weights.ordered

    def _float_text(self) -> str:
        weights, activations = self.weights, self.activations
        text = str(weights.format) + "a16" * (activations is None)
        if weights.format == FP8_E4M3:
            text += {"tensor": "-tensor", "tile": f"-tile{weights.group_size}"}.get(weights.granularity, "")
            text += "-static" * (activations is not None and not activations.dynamic)
        return text + "-search" * bool(activations and activations.searched)

    @classmethod
    def parse(cls, text: str) -> "QuantScheme":
        """The scheme that `text` writes. Raises SchemeError with the grammar when it writes none."""
        if match := _FP8.fullmatch(text):
            return cls._fp8(text, match)
        if match := _FP4.fullmatch(text):
            number_format, size = {"nvfp4": NVFP4, "mxfp4": MXFP4}[match["name"]], _FP4_GROUPS[match["name"]]
            searched = bool(match["search"])
            if match["a16"] and searched:
                raise SchemeError(
                    f"scheme {text!r} leaves activations in 16 bits, so "
                    f"they have no scale to search; a scheme is written {GRAMMAR}"
                )
            inputs = TensorScheme(number_format, "group", group_size=size, dynamic=True, searched=searched)
            return cls(TensorScheme(number_format, "group", group_size=size), None if match["a16"] else inputs)
        if match := _OUTLIERS.fullmatch(text):
            threshold = float(match["threshold"])
            return cls(
                TensorScheme(int_format(8), "channel"),
                TensorScheme(int_format(8), "token", dynamic=True, outlier=threshold),
            )
        if match := _CODEBOOK.fullmatch(text):
            block = int(match["block"])
            if block < 32 or block > 4096 or block & (block - 1):
                raise SchemeError(
                    f"block size {block} in scheme {text!r} is not a power of two from 32 to 4096; "
                    f"a scheme is written {GRAMMAR}"
                )
            number_format = {"nf4": NF4, "fp4": FP4}[match["name"]]
            return cls(TensorScheme(number_format, "block", group_size=block, nested=bool(match["nested"])))
        if match := _INT.fullmatch(text):
            return cls._from_match(text, match)
        raise SchemeError(f"unknown scheme {text!r}; a scheme is written {GRAMMAR}")

    @classmethod
    def _fp8(cls, text: str, match: re.Match[str]) -> "QuantScheme":
        size = int(match["tile"]) if match["tile"] else None
        granularity: Granularity = "tensor" if match["tensor"] else "tile" if size else "channel"
        weights = TensorScheme(FP8_E4M3, granularity, group_size=size)
        if match["a16"] and match["static"]:
            raise SchemeError(f"scheme {text!r} leaves activations in 16 bits, so they can't be static")
        if match["a16"]:
            return cls(weights)
        if match["static"]:
            return cls(weights, TensorScheme(FP8_E4M3, "tensor"))
        return cls(weights, TensorScheme(FP8_E4M3, "group" if size else "token", group_size=size, dynamic=True))

    @classmethod
    def _from_match(cls, text: str, match: re.Match[str]) -> "QuantScheme":
        bits, activation_bits = int(match["wbits"]), int(match["abits"])
        if bits not in INT_BITS or activation_bits not in (4, 8, 16) or (match["group"] and int(match["group"]) == 0):
            raise SchemeError(f"scheme {text!r} is out of range; a scheme is written {GRAMMAR}")
        if activation_bits == 16 and (match["mode"] or match["search"]):
            raise SchemeError(
                f"scheme {text!r} leaves activations in 16 bits, so they can't be {match['mode'] or 'searched'}; "
                f"a scheme is written {GRAMMAR}"
            )
        group = int(match["group"]) if match["group"] else None
        if match["order"] and (group is None or activation_bits != 16):
            raise SchemeError(f"scheme {text!r}: only groups beside 16-bit activations have an order")
        granularity: Granularity = "tensor" if match["tensor"] else "group" if group else "channel"
        weights = TensorScheme(int_format(bits), granularity, not match["asym"], group, ordered=bool(match["order"]))
        if activation_bits == 16:
            return cls(weights)
        dynamic, searched = match["mode"] != "static", bool(match["search"])
        if searched and not dynamic:
            raise SchemeError(f"scheme {text!r}: only dynamic scales are searched; a scheme is written {GRAMMAR}")
        activations = TensorScheme(
            int_format(activation_bits), "token" if dynamic else "tensor", not match["act_asym"], dynamic=dynamic,
            searched=searched,
        )  # fmt: skip
        return cls(weights, activations)


def check_fits(scheme: TensorScheme, in_features: int, name: str) -> None:
    """Raise SchemeError unless `scheme` divides a layer with `in_features` inputs; says which groups do."""
    if scheme.granularity != "group" or in_features % (scheme.group_size or 1) == 0:
        return
    fitting = [str(group) for group in (16, 32, 48, 64, 96, 128, 192, 256) if in_features % group == 0]
    raise SchemeError(
        f"group size {scheme.group_size} does not divide in_features {in_features} of {name}; "
        f"use one of {', '.join([*fitting, 'channel (no -g)'])}, or leave the layer out with --ignore {name!r}"
    )
