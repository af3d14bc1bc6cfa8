"""lowbit on given calibration tokens, through the public call that the command makes; nothing is judged there.

--method effort2 and effort4 name rungs of --effort, which run every rung below as well and keep calibration windows
apart to compare them; the other names are methods. seconds is the report's: quantizing, without loading and writing.
"""

import tempfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from rival import Request, parse_request, write_result

import lowbit
from lowbit import Calibration, Conditions, QuantLinear, QuantScheme, Recipe, Report

METHODS = ("aligned", "learned", "gptq", "rtn", "effort2", "effort4")


def recipe_of(request: Request) -> Recipe:
    scheme = QuantScheme.parse(request.scheme)
    if request.method.startswith("effort"):
        return lowbit.recipe_at(scheme, int(request.method.removeprefix("effort")))
    recipe = Recipe(scheme, request.method)
    return recipe if recipe.learning is None else replace(recipe, learning=replace(recipe.learning, seed=request.seed))


def quantize(request: Request) -> tuple[dict[str, torch.Tensor], Report]:
    """The parameters that the checkpoint on disk computes with, where they are not the original's, and the report."""
    conditions = Conditions(Calibration(request.tokens), evaluation=None, device=str(request.device))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        report = lowbit.quantize(request.model, out, recipe_of(request), conditions)
        model = lowbit.load(out, torch.float32)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    weights = {f"{name}.weight": layer.packed.dequantize() for name, layer in layers.items()}
    norms = {name: value.detach() for name, value in model.named_parameters() if value.dim() == 1}
    return weights | norms, report


def main() -> None:
    request = parse_request(__doc__, METHODS)
    parameters, report = quantize(request)
    options = {"method": report.method, "notes": list(report.notes), "warnings": list(report.warnings)}
    write_result(request, parameters, ("lowbit", version("lowbit")), options, report.seconds)


if __name__ == "__main__":
    main()
