"""One layer's turn: statistics in, solution out, the quantized layer put in place, its loss written down."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from lowbit.algorithms.choose import Moments, choose_rows, solve_chosen
from lowbit.algorithms.correction import corrected, corrected_bias
from lowbit.algorithms.gptaq import solve_gptaq, solve_qronos
from lowbit.algorithms.solution import Solution
from lowbit.errors import InputError
from lowbit.model.log import LayerLog, columns_for
from lowbit.model.recipe import SHIFT_METHODS
from lowbit.model.statistics import Statistics
from lowbit.nn.experts import QuantExperts, run_experts_plainly
from lowbit.nn.linear import QuantLinear
from lowbit.nn.rotated import rotation_of
from lowbit.numerics.affine import choose_scale
from lowbit.numerics.scheme import QuantScheme
from lowbit.tensors import PackedWeight, check_finite


def solve_linears(
    module: nn.Module,
    prefix: str,
    names: Sequence[str],
    scheme: QuantScheme,
    observed: Statistics | None,
    log: LayerLog,
) -> None:
    """Quantize linears of `module` that read one input, in place. prefix + name is what the report calls them."""
    if scheme.weights.granularity == "tensor" and len(names) > 1:
        for name in names:
            solve_linears(module, prefix, [name], scheme, observed, log)
        return
    linears = [cast("nn.Linear", module.get_submodule(name)) for name in names]
    full_names = [f"{prefix}.{name}" if prefix else name for name in names]
    if not torch.stack([linear.weight.isfinite().all() for linear in linears]).all():
        for full_name, linear in zip(full_names, linears, strict=True):
            check_finite(linear.weight, f"{full_name}.weight")
    if scheme.weights.format.kind == "codebook":
        for name, full_name, linear in zip(names, full_names, linears, strict=True):
            packed = PackedWeight.from_float(linear.weight, scheme, log.scale_dtype)
            log.note(full_name, scheme, "rtn", linear.weight.float(), packed.dequantize(), None, None)
            _put(module, name, QuantLinear.from_packed(packed, linear.bias, rotation=rotation_of(linear)))
        return
    moment = _moment(observed, full_names[0])
    w = torch.cat([linear.weight for linear in linears]).float()  # [sum of N, K]
    solution, method = _solved(w, scheme, observed, log, moment, ", ".join(full_names))
    grid = _static_grid(full_names[0], scheme, observed, log)
    input_scale, input_zero = (None if part is None else part.to(w.device) for part in grid)
    start = 0
    for name, full_name, linear in zip(names, full_names, linears, strict=True):
        rows = slice(start, start := start + linear.out_features)
        log.note(full_name, scheme, method, w[rows], solution.dequantized[rows], observed, moment)
        packed = _packed(solution, rows, scheme)
        bias: Tensor | None = linear.bias
        if bias is not None and observed is not None and observed.moment is not None and moment is not None:
            shift = None if observed.shift is None else observed.shift.mean
            means = observed.moment.mean, shift
            bias = corrected_bias(bias, w[rows], solution.dequantized[rows], *means, log.scale_dtype)
            log.corrected.add(f"{full_name}.bias")
        _put(module, name, QuantLinear.from_packed(packed, bias, input_scale, input_zero, rotation_of(linear)))
    if log.recipe.effort and moment is not None:
        log.compare(w, scheme, moment, [linear.out_features for linear in linears])


def solve_experts(
    module: nn.Module, prefix: str, name: str, scheme: QuantScheme, observed: dict[int, Statistics], log: LayerLog
) -> None:
    """Quantize a 3-D parameter [E, N, K] of `module`, in place, expert by expert."""
    weights = module.get_parameter(name)
    check_finite(weights, f"{prefix}.{name}")
    layers, few = [], 0
    for expert, w in enumerate(weights.float()):
        statistics = observed.get(expert)
        full_name = f"{prefix}.{name}.{expert}"
        moment = _moment(statistics, full_name)
        tokens = statistics.tokens if statistics is not None else None
        solution, method = log.solve(w, scheme, moment, full_name, tokens)
        few += method != log.recipe.method and moment is not None
        log.note(full_name, scheme, method, w, solution.dequantized, statistics, moment)
        layers.append(QuantLinear.from_packed(_packed(solution, slice(None), scheme)))
    if few:
        log.warnings.append(
            f"{prefix}.{name}: {few} of {len(layers)} experts saw fewer tokens than their {weights.shape[2]} channels, "
            "so they were rounded under weighted scales; calibrate on more text"
        )
    parent, _, attribute = name.rpartition(".")
    delattr(module.get_submodule(parent), attribute)
    _put(module, name, QuantExperts(layers))
    run_experts_plainly(module)


def _moment(observed: Statistics | None, name: str) -> Tensor | None:
    """The second moment [K, K] of a layer's input, where it was taken."""
    if observed is None or observed.moment is None:
        return None
    try:
        return observed.moment.value
    except InputError as error:
        raise InputError(f"the input of {name}: {error}; choose --method rtn") from error


CANDIDATES = (  # strength, residual: see docs/log-accuracy.md
    (0.5, 1.0),
    (0.0, 0.0),
    (0.5, 0.0),
    (1.0, 1.0),
)


def _solved(
    w: Tensor, scheme: QuantScheme, observed: Statistics | None, log: LayerLog, moment: Tensor | None, name: str
) -> tuple[Solution, str]:
    """(solution, method used) for w [N, K], aimed at the original's outputs where both models were observed."""
    recipe = log.recipe
    if recipe.correction is None or moment is None or observed is None:
        return log.solve(w, scheme, moment, name)
    if observed.wanted is not None:
        cross = observed.wanted.value - w @ moment
        return log.solve(corrected(w, moment, cross, recipe.correction), scheme, moment, name)
    if observed.shift is None:
        return log.solve(w, scheme, moment, name)
    seen = observed.moments(moment)
    if recipe.method in SHIFT_METHODS:
        solve = solve_gptaq if recipe.method == "gptaq" else partial(solve_qronos, columns=columns_for(w.device))
        return solve(w, moment, seen.shift, scheme.weights, log.scale_dtype, recipe.gptq), recipe.method
    if recipe.method != "chosen" or observed.held_out is None or observed.held_out.moment is None:
        return log.solve(seen.aim(w, recipe.correction), scheme, moment, name)
    return _solved_by_choice(w, scheme, observed, seen, log), recipe.method


def _solved_by_choice(w: Tensor, scheme: QuantScheme, observed: Statistics, seen: Moments, log: LayerLog) -> Solution:
    """w [N, K], each row by the best of CANDIDATES; they are compared before polishing, which serves all alike."""
    recipe, kept = log.recipe, observed.held_out
    assert recipe.correction is not None
    assert kept is not None
    assert kept.moment is not None
    held_out = kept.moments(kept.moment.value)
    corrections = [replace(recipe.correction, strength=s, residual=r) for s, r in CANDIDATES]
    rough = [(replace(recipe.gptq, polish=0), correction) for correction in corrections]
    columns, dtype = columns_for(w.device), log.scale_dtype
    choice = choose_rows(w, seen, held_out, scheme.weights, dtype, rough, columns)
    whole = seen.joined(held_out, observed.tokens / (observed.tokens + kept.tokens))
    candidates = [(recipe.gptq, correction) for correction in corrections]
    return solve_chosen(w, whole, choice, scheme.weights, dtype, candidates, columns)


def _static_grid(
    name: str, scheme: QuantScheme, observed: Statistics | None, log: LayerLog
) -> tuple[Tensor | None, Tensor | None]:
    """The activation scale and zero-point [1] that the observer chose; (None, None) where the scheme has none."""
    if scheme.activations is None or scheme.activations.dynamic:
        return None, None
    if observed is None or observed.observer is None:
        raise InputError(
            f"no calibration token reached {name}, so its static activations have no range; calibrate on more text, "
            "or give it a dynamic scheme by a rule"
        )
    low, high = observed.observer.range()
    return choose_scale(low.reshape(1), high.reshape(1), scheme.activations, log.scale_dtype)


def _packed(solution: Solution, rows: slice, scheme: QuantScheme) -> PackedWeight:
    per_row = solution.scale.dim() == 2
    scale = solution.scale[rows] if per_row else solution.scale
    zero = solution.zero if solution.zero is None or not per_row else solution.zero[rows]
    return PackedWeight.from_codes(solution.q[rows], scale, zero, scheme, solution.global_scale)


def _put(module: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(module.get_submodule(parent), attribute, layer)
