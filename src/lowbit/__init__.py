"""lowbit: make a Hugging Face language model small and fast, prove what that cost, and write files that others load."""

from lowbit.errors import CheckpointError, GateError, InputError, LowbitError, SchemeError
from lowbit.io.load import load
from lowbit.judge import Tasks
from lowbit.model.recipe import Recipe
from lowbit.model.select import Rule
from lowbit.nn.linear import QuantLinear
from lowbit.numerics.scheme import QuantScheme
from lowbit.options import Calibration, Evaluation, Gates, Scores
from lowbit.report import Report
from lowbit.verbs import Conditions, compare, evaluate, quantize

__all__ = [
    "Calibration",
    "CheckpointError",
    "Conditions",
    "Evaluation",
    "GateError",
    "Gates",
    "InputError",
    "LowbitError",
    "QuantLinear",
    "QuantScheme",
    "Recipe",
    "Report",
    "Rule",
    "SchemeError",
    "Scores",
    "Tasks",
    "compare",
    "evaluate",
    "load",
    "quantize",
]
