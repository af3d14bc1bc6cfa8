"""What the rungs of --effort mean, by what a scheme rounds. A level that a ladder does not list is the one below it.

    weights alone             rtn, rtn-weighted, aligned, chosen, learning
    activations in 8 bits     rtn, rtn-weighted, smooth, rotate (offline), learning
    activations in 4 bits     rtn, rtn-weighted, rotate, -, learning
    LLM.int8()                rtn, rtn-weighted, gptq, -, learning      outliers leave smoothing little to do
    nvfp4, mxfp4              rtn, -, aligned, chosen
    nf4, fp4, fp8             rtn

Learning begins from the closest of the rungs below; the method of its rung is what it does where there is none.

Weights in fewer than 8 bits lose more than activations in 8, so w4a8 climbs the first ladder. What each rung reaches
stands in docs/accuracy.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lowbit.algorithms.blocks import is_blocks
from lowbit.errors import InputError
from lowbit.model.learn import Learning
from lowbit.model.recipe import Recipe
from lowbit.model.rotation import Rotation
from lowbit.model.select import Rule
from lowbit.numerics.scheme import QuantScheme

EFFORTS = ("rtn", "rtn-weighted", "aligned", "chosen", "learned")


@dataclass(frozen=True)
class Rung:
    """A method, and fields of a Recipe that differ from the method's usual ones."""

    method: str
    changes: Mapping[str, Any] = field(default_factory=dict)


_ROUNDED = {0: Rung("rtn")}
_SEARCHED = _ROUNDED | {1: Rung("rtn-weighted")}
_LEARNS = {"learning": Learning()}
_WEIGHTS = {level: Rung(method) for level, method in enumerate(EFFORTS)}
_ACTIVATIONS_8 = _SEARCHED | {
    2: Rung("smooth"), 3: Rung("rotate", {"rotation": Rotation(online="none")}), 4: Rung("smooth", _LEARNS)
}  # fmt: skip
_ACTIVATIONS_4 = _SEARCHED | {2: Rung("rotate"), 4: Rung("rotate", _LEARNS)}
_OUTLIERS = _SEARCHED | {2: Rung("gptq"), 4: Rung("gptq", _LEARNS)}
_BLOCKS = _ROUNDED | {2: Rung("aligned"), 3: Rung("chosen")}


def ladder(scheme: QuantScheme) -> dict[int, Rung]:
    """The rungs of this scheme by their level, 0 always among them."""
    weights, activations = scheme.weights.format, scheme.activations
    if is_blocks(weights):
        return _BLOCKS
    if weights.kind != "int":
        return _ROUNDED
    if activations is not None and activations.outlier is not None:
        return _OUTLIERS
    if activations is not None and activations.bits <= 4:
        return _ACTIVATIONS_4
    if activations is not None and weights.bits >= 8:
        return _ACTIVATIONS_8
    return _WEIGHTS


def recipe_at(scheme: QuantScheme, effort: int, rules: tuple[Rule, ...] = (), observer: str = "mse") -> Recipe:
    """The recipe of level 0 to 4, its `effort` that of the rung it stands on. Raises InputError for other levels."""
    if not 0 <= effort < len(EFFORTS):
        raise InputError(f"there is no effort {effort}; choose one of 0 to {len(EFFORTS) - 1}")
    rungs = ladder(scheme)
    level = max(one for one in rungs if one <= effort)
    return Recipe(scheme, rungs[level].method, rules, observer, effort=level, **rungs[level].changes)


def rungs_below(recipe: Recipe) -> list[Recipe]:
    """The recipes of the rungs below that of `recipe`, lowest first."""
    levels = [level for level in ladder(recipe.scheme) if level < (recipe.effort or 0)]
    return [recipe_at(recipe.scheme, level, recipe.rules, recipe.observer) for level in levels]


def name_of(recipe: Recipe) -> str:
    """The rung in words, for reports."""
    return f"effort {recipe.effort} ({recipe.method})"
