"""A recipe: which numbers (scheme), found how (method), where they differ (rules).

    rtn          nearest code, scales from the smallest and largest weight; needs no data
    rtn-clip     nearest code, scales by clip search on |error|^2.4; needs no data
    rtn-weighted nearest code, scales by clip search weighted with the inputs' mean squares
    gptq         error feedback on the second moment of the inputs, scales searched under what an error costs

Written METHOD:SCHEME, as in "gptq:w4a16-g64".
"""

from dataclasses import dataclass, field

from lowbit.algorithms.correction import Correction
from lowbit.algorithms.gptq import GptqOptions
from lowbit.errors import InputError, SchemeError
from lowbit.model.select import Rule
from lowbit.numerics.scheme import QuantScheme
from lowbit.observe.ranges import OBSERVERS

METHODS = ("rtn", "rtn-clip", "rtn-weighted", "gptq")
MOMENT_METHODS = ("rtn-weighted", "gptq")


@dataclass(frozen=True)
class Recipe:
    """What `lowbit.quantize` does to a model. observer finds the ranges of static activations."""

    scheme: QuantScheme = field(default_factory=lambda: QuantScheme.parse("w4a16-g64"))
    method: str = "gptq"
    rules: tuple[Rule, ...] = ()
    observer: str = "mse"
    gptq: GptqOptions = field(default_factory=GptqOptions)
    correction: Correction | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(f"unknown method {self.method!r}; choose one of {', '.join(METHODS)}")
        if self.observer not in OBSERVERS:
            raise InputError(f"unknown observer {self.observer!r}; choose one of {', '.join(OBSERVERS)}")
        schemes = [self.scheme, *(rule.scheme for rule in self.rules if rule.scheme)]
        for scheme in schemes:
            if self.method != "rtn" and scheme.weights.format.kind != "int":
                raise SchemeError(
                    f"{self.method} works on integer grids, and {scheme} is none; use --method rtn with it"
                )
        kinds = {(scheme.weights.format.name, scheme.weights.nested) for scheme in schemes}
        if len(kinds) > 1 and any(scheme.weights.format.kind == "codebook" for scheme in schemes):
            raise SchemeError(
                "nf4 and fp4 are written as bitsandbytes writes them and can't stand beside other schemes"
            )

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
