"""lowbit: make a Hugging Face language model small and fast, prove what that cost, and write files that others load."""

from lowbit import qat
from lowbit.cache.quantized import QuantizedCache
from lowbit.errors import (
    CheckpointError,
    GateError,
    InputError,
    LowbitError,
    MethodError,
    SchemeError,
    TrainingError,
)
from lowbit.finetuning import Finetuned, Finetuning, finetune
from lowbit.io.convert import convert
from lowbit.io.hf import LowbitConfig, register
from lowbit.io.load import load
from lowbit.judge import Tasks
from lowbit.model.efforts import recipe_at
from lowbit.model.recipe import Recipe
from lowbit.model.select import Rule
from lowbit.nn.linear import QuantLinear
from lowbit.numerics.scheme import QuantScheme
from lowbit.options import Calibration, Evaluation, Gates, Scores
from lowbit.report import Report
from lowbit.train import optim
from lowbit.train.qlora import add_lora, load_lora, merge_lora
from lowbit.verbs import Conditions, compare, evaluate, quantize

__all__ = [
    "Calibration",
    "CheckpointError",
    "Conditions",
    "Evaluation",
    "Finetuned",
    "Finetuning",
    "GateError",
    "Gates",
    "InputError",
    "LowbitConfig",
    "LowbitError",
    "MethodError",
    "QuantLinear",
    "QuantScheme",
    "QuantizedCache",
    "Recipe",
    "Report",
    "Rule",
    "SchemeError",
    "Scores",
    "Tasks",
    "TrainingError",
    "add_lora",
    "compare",
    "convert",
    "evaluate",
    "finetune",
    "load",
    "load_lora",
    "merge_lora",
    "optim",
    "qat",
    "quantize",
    "recipe_at",
]

register()  # from_pretrained knows our method id from here on
