"""A recipe: which numbers (scheme), found how (method), where they differ (rules).

    rtn          nearest code, scales from the smallest and largest weight; needs no data
    rtn-clip     nearest code, scales by clip search on |error|^2.4, or another power; needs no data
    hqq          nearest code, scales by half-quadratic splitting for |error|^0.7 (algorithms/hqq.py); needs no data
    rtn-weighted nearest code, scales by clip search weighted with the inputs' mean squares
    gptq         error feedback on the second moment of the inputs, scales searched under its diagonal
    awq          rtn-weighted after smoothing for the weights (algorithms/smooth.py, model/fold.py)
    smooth       gptq after smoothing for activations in few bits
    gptaq        gptq that answers the errors of its inputs column by column (algorithms/gptaq.py)
    qronos       gptq on the weights that fit its inputs best, first column by first column (algorithms/gptaq.py)
    aligned      gptq, aimed at what the original model computes (algorithms/correction.py), then polished
    chosen       several aligned candidates, each row by the best of them on tokens that no candidate saw
    rotate       aligned, after rotations of the residual stream, of heads and of layers' inputs (model/rotate.py)
    learned      aligned, then rounding, scales and norms learned by the gradient of KL (model/learn.py)

Written METHOD:SCHEME, as in "gptq:w4a16-g64". `--effort` names a rung instead of a method (model/efforts.py), and
then the result is compared with those of the rungs below (effort.py).
"""

from dataclasses import dataclass, field, replace

from lowbit.algorithms.blocks import is_blocks
from lowbit.algorithms.correction import Correction
from lowbit.algorithms.gptq import GptqOptions
from lowbit.algorithms.joint import Joint
from lowbit.algorithms.scales import ScaleSearch
from lowbit.errors import InputError, SchemeError
from lowbit.model.learn import Learning
from lowbit.model.rotation import Rotation
from lowbit.model.select import Rule
from lowbit.model.sensitivity import Sensitivity
from lowbit.numerics.scheme import QuantScheme
from lowbit.observe.ranges import OBSERVERS

SHIFT_METHODS = ("gptaq", "qronos")  # use E[(x - x~) x~^T] in the solver, not in a correction before it
ALIGNED_METHODS = (*SHIFT_METHODS, "rotate", "aligned", "chosen", "learned")
SMOOTHING_METHODS = ("awq", "smooth")
METHODS = ("rtn", "rtn-clip", "hqq", "rtn-weighted", "awq", "gptq", "smooth", *ALIGNED_METHODS)
HESSIAN_METHODS = ("gptq", "smooth", *ALIGNED_METHODS)  # solve under the whole second moment
MOMENT_METHODS = ("rtn-weighted", "awq", *HESSIAN_METHODS)  # awq and rtn-weighted use its diagonal
POLISH, BRIEF_POLISH = 3, 1  # rounds; 6 gained 1 % more (docs/log-accuracy.md), 1 lost 1 % (docs/log-ladder-time.md)


BRIEF_STEPS = 80  # of learning: at 4 bits 450 gained little more


def _loses_little(scheme: QuantScheme) -> bool:
    """Whether integer weights alone are rounded, to 4 bits or more: part of the work has most of the gain."""
    return scheme.activations is None and scheme.weights.format.kind == "int" and scheme.weights.bits >= 4


@dataclass(frozen=True)
class Recipe:
    """What `lowbit.quantize` does to a model. observer finds the ranges of static activations; clip: rtn-clip's search.

    effort: the rung that was asked for, None where a method was named. Methods that need a correction or learning get
    the usual one where none is given.
    """

    scheme: QuantScheme = field(default_factory=lambda: QuantScheme.parse("w4a16-g64"))
    method: str = "gptq"
    rules: tuple[Rule, ...] = ()
    observer: str = "mse"
    clip: ScaleSearch = field(default_factory=lambda: ScaleSearch(norm=2.4))  # the exponent of GPTQ's --mse search
    gptq: GptqOptions = field(default_factory=GptqOptions)
    correction: Correction | None = None
    learning: Learning | None = None
    rotation: Rotation | None = None
    sensitivity: Sensitivity | None = None
    joint: Joint | None = None
    effort: int | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(f"unknown method {self.method!r}; choose one of {', '.join(METHODS)}")
        if self.observer not in OBSERVERS:
            raise InputError(f"unknown observer {self.observer!r}; choose one of {', '.join(OBSERVERS)}")
        schemes = [self.scheme, *(rule.scheme for rule in self.rules if rule.scheme)]
        for scheme in schemes:
            weights = scheme.weights.format
            if self.method != "rtn" and not (weights.kind == "int" or is_blocks(weights)):
                raise SchemeError(
                    f"{self.method} works on integer grids and on nvfp4 and mxfp4, and {scheme} is none; "
                    "use --method rtn with it"
                )
            if self.method == "smooth" and scheme.activations is None:
                raise SchemeError(
                    f"smooth is for activations in 8 bits, and {scheme} has none; use --method awq with it"
                )
            if self.method == "awq" and scheme.activations is not None:
                raise SchemeError(f"awq is for weights alone, and {scheme} rounds activations; use --method smooth")
        kinds = {(scheme.weights.format.name, scheme.weights.nested) for scheme in schemes}
        if len(kinds) > 1 and any(scheme.weights.format.kind == "codebook" for scheme in schemes):
            raise SchemeError(
                "nf4 and fp4 are written as bitsandbytes writes them and can't stand beside other schemes"
            )
        outliers = {scheme.activations.outlier if scheme.activations else None for scheme in schemes}
        if len(outliers) > 1:
            raise SchemeError(
                "LLM.int8() is written as bitsandbytes writes it, under one threshold, and can't stand beside others"
            )

        brief = all(_loses_little(scheme) for scheme in schemes)
        if self.method in ALIGNED_METHODS and self.correction is None:
            plain = self.method in SHIFT_METHODS
            object.__setattr__(self, "correction", Correction(1.0, 0.0) if plain else Correction())
            object.__setattr__(
                self,
                "gptq",
                replace(self.gptq, polish=0 if plain else self.gptq.polish or (BRIEF_POLISH if brief else POLISH)),
            )
        if self.method == "rotate" and self.rotation is None:
            few = any(scheme.activations is not None for scheme in schemes)
            object.__setattr__(self, "rotation", Rotation(online="down" if few else "none"))
        turns_inputs = self.rotation is not None and self.rotation.online != "none"
        if turns_inputs and any(scheme.weights.format.kind == "codebook" for scheme in schemes):
            raise SchemeError(
                "nf4 and fp4 are written as bitsandbytes writes them, which has no form for inputs that turn at run "
                'time; use Rotation(online="none")'
            )
        if self.method == "learned" and self.learning is None:
            object.__setattr__(self, "learning", Learning(steps=BRIEF_STEPS) if brief else Learning())

    @classmethod
    def parse(cls, text: str) -> "Recipe":
        """The recipe that METHOD:SCHEME writes; SCHEME alone means gptq where it works, else rtn. Raises InputError."""
        method, separator, scheme_text = text.rpartition(":")
        scheme = QuantScheme.parse(scheme_text)
        return cls(scheme, method if separator else default_method(scheme))

    def __str__(self) -> str:
        return f"{self.method}:{self.scheme}"


def default_method(scheme: QuantScheme) -> str:
    """gptq for integer weights, rtn for the formats it does not know."""
    return "gptq" if scheme.weights.format.kind == "int" else "rtn"
