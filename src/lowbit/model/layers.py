"""One layer's turn: statistics in, solution out, the quantized layer put in place, its loss written down."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import cast

import torch
from torch import Tensor, nn

from lowbit.algorithms.choose import Moments, solve_best
from lowbit.algorithms.columns import PLAIN, Columns
from lowbit.algorithms.correction import corrected_bias, cross_fitted
from lowbit.algorithms.gptq import solve_gptq
from lowbit.algorithms.hqq import solve_hqq
from lowbit.algorithms.rtn import solve_rtn
from lowbit.algorithms.scales import ScaleSearch
from lowbit.algorithms.solution import Solution
from lowbit.errors import InputError
from lowbit.kernels.ops import rotate
from lowbit.model.recipe import ALIGNED_METHODS, MOMENT_METHODS, Recipe
from lowbit.model.rungs import errors_below
from lowbit.model.sensitivity import Sensed
from lowbit.nn.experts import QuantExperts, run_experts_plainly
from lowbit.nn.linear import QuantLinear
from lowbit.nn.rotated import rotation_of
from lowbit.numerics import metrics
from lowbit.numerics.affine import choose_scale
from lowbit.numerics.dynamic import round_activations
from lowbit.numerics.hadamard import Hadamard
from lowbit.numerics.scheme import QuantScheme, TensorScheme
from lowbit.observe.moments import CrossMoment, SecondMoment, finite_range
from lowbit.observe.ranges import Observer, make_observer
from lowbit.optional import installed, late
from lowbit.report import Histogram, LayerRecord
from lowbit.tensors import PackedWeight, check_finite

CLIP_SEARCH = ScaleSearch(norm=2.4)  # the exponent of GPTQ's --mse search
BINS = 64
SHOWN_LAYERS = 6  # the worst layers, whose histograms a report keeps


def columns_for(device: torch.device) -> Columns:
    """The solvers' inner loops for tensors on this device: fused where Triton is installed beside a GPU."""
    if device.type != "cuda" or not installed("triton"):
        return PLAIN
    kernels = late("lowbit.kernels.triton.columns")
    return Columns(kernels.round_panel, kernels.descend_panel)


class Statistics:
    """What a solver may ask of one input: its second moment, its range, and a histogram for the report.

    shift and residual (algorithms/correction.py) are there when the original's activations are seen beside it; held_out
    has tokens that judge: candidates made of the others (algorithms/choose.py), or the shares of a correction, and then
    it is a part of the whole (`add`). rounding: how the layer will round its input at run
    time, in so few bits that the moments are taken of what it then multiplies.
    """

    def __init__(
        self,
        moment: SecondMoment | None,
        observer: Observer | None,
        rounding: TensorScheme | None = None,
        rotation: Hadamard | None = None,
    ) -> None:
        self.moment, self.observer, self.rounding, self.rotation = moment, observer, rounding, rotation
        self.shift: CrossMoment | None = None
        self.residual: CrossMoment | None = None
        self.held_out: Statistics | None = None
        self.sample: Histogram | None = None

    def moments(self, moment: Tensor) -> Moments:
        """What algorithms/choose.py and correction.py work on; only where shift was observed."""
        assert self.shift is not None
        return Moments(moment, self.shift.value, None if self.residual is None else self.residual.value)

    def add(self, part: "Statistics") -> None:
        """Add the tokens of a part to the moments."""
        for whole, taken in ((self.shift, part.shift), (self.residual, part.residual)):
            if whole is not None and taken is not None:
                whole.add(taken)
        if self.moment is not None and part.moment is not None:
            self.moment.add(part.moment)

    def turned(self, x: Tensor) -> Tensor:
        """x [..., K] as the layer rotates it; x itself where it does not."""
        return x if self.rotation is None else rotate(x, self.rotation)

    def as_read(self, x: Tensor) -> Tensor:
        """x [..., K] as the quantized layer will multiply it: rotated, and in few bits rounded."""
        x = self.turned(x)
        if self.rounding is None:
            return x
        finite_range(x)
        rows = x.reshape(-1, x.shape[-1])  # [..., K] -> [M, K]
        return round_activations(rows, self.rounding).to(x.dtype).view(x.shape)

    def update(self, x: Tensor, read: Tensor | None = None) -> None:
        """Take the tokens of x [..., K] into account; read is `as_read(x)` where it is at hand."""
        if self.moment is not None:
            self.moment.update(self.as_read(x) if read is None else read)
        if self.observer is not None:
            self.observer.update(self.turned(x))
        if self.sample is None:
            finite_range(x)  # infinity can't be counted
            self.sample = histogram(x, "", "activation")


@dataclass
class LayerLog:
    """Collects what the pipeline did: a record and histograms per layer, and warnings."""

    recipe: Recipe
    scale_dtype: torch.dtype
    records: list[LayerRecord] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rewritten: set[str] = field(default_factory=set)  # float parameters that were changed
    corrected: set[str] = field(default_factory=set)  # biases that were
    untied: bool = False  # the head has a weight of its own now
    seen: dict[str, tuple[Histogram, ...]] = field(default_factory=dict)
    observed: bool = False
    sensed: dict[str, Sensed] = field(default_factory=dict)

    def statistics(
        self, in_features: int, scheme: QuantScheme, device: torch.device, rotation: Hadamard | None = None
    ) -> Statistics:
        """Empty statistics of an input of `in_features` channels, as far as this recipe needs them.

        rotation: what the layer does to its input first.
        """
        self.observed = True
        static = scheme.activations is not None and not scheme.activations.dynamic
        observer = make_observer(self.recipe.observer, scheme.activations) if static and scheme.activations else None
        moment = SecondMoment(in_features, device) if self.recipe.method in MOMENT_METHODS else None
        few = scheme.activations is not None and scheme.activations.dynamic and scheme.activations.bits < 8
        return Statistics(moment, observer, scheme.activations if few else None, rotation)

    def solve(self, w: Tensor, scheme: QuantScheme, moment: Tensor | None, name: str) -> tuple[Solution, str]:
        """(solution, method used) for w [N, K]; without a second moment gptq falls back to rtn, with a warning."""
        method = self.recipe.method
        if method in MOMENT_METHODS and moment is None:
            self.warnings.append(f"{name}: no calibration token was seen there, so it was rounded to nearest")
            method = "rtn"
        if method in ("rtn-weighted", "awq"):
            assert moment is not None
            importance = moment.diagonal()
            return solve_rtn(w, scheme.weights, self.scale_dtype, ScaleSearch(), importance), method
        if method in ("gptq", "smooth", *ALIGNED_METHODS):
            assert moment is not None
            outputs = self.sensed[name].outputs if name in self.sensed else None
            joint = None if outputs is None or self.recipe.joint is None else (outputs.to(w.device), self.recipe.joint)
            solution = solve_gptq(
                w, moment, scheme.weights, self.scale_dtype, self.recipe.gptq, columns_for(w.device), joint
            )
            if solution.damping != self.recipe.gptq.damping:
                self.warnings.append(f"{name}: its second moment needed damping {solution.damping:g}")
            return solution, method
        if method == "hqq":
            return solve_hqq(w, scheme.weights, self.scale_dtype), method
        search = CLIP_SEARCH if method == "rtn-clip" else None
        return solve_rtn(w, scheme.weights, self.scale_dtype, search), method

    def note(
        self, name: str, scheme: QuantScheme, method: str, w: Tensor, dequantized: Tensor, observed: Statistics | None,
        moment: Tensor | None,
    ) -> None:  # fmt: skip
        """Write down what layer `name` lost."""
        error = w - dequantized
        relative = metrics.relative_error(w, dequantized)
        output = None if moment is None else metrics.output_error(error, w, moment)
        self.records.append(LayerRecord(name, str(scheme), method, relative, metrics.sqnr_db(relative), output))
        shown = [histogram(w, name, "weight"), histogram(error, name, "error")]
        if observed is not None and observed.sample is not None:
            sample = observed.sample
            shown.append(Histogram(name, sample.of, sample.low, sample.high, sample.counts))
        self.seen[name] = tuple(shown)

    def compare(self, w: Tensor, scheme: QuantScheme, moment: Tensor, sizes: Sequence[int]) -> None:
        """Add what lower rungs leave to the latest records, whose layers are w [N, K] cut into rows of these sizes."""
        ends = list(accumulate(sizes))
        rows = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
        below = errors_below(w, scheme, moment, self.scale_dtype, self.recipe.effort or 0, rows)
        latest = self.records[-len(sizes) :]
        self.records[-len(sizes) :] = [
            replace(record, below=rungs) if record.method != "rtn" else record
            for record, rungs in zip(latest, below, strict=True)
        ]

    @property
    def histograms(self) -> tuple[Histogram, ...]:
        """Those of the worst layers: by output error where it is known, else by relative error."""
        ranked = sorted(self.records, key=lambda record: -(record.output_error or record.relative_error))
        return tuple(item for record in ranked[:SHOWN_LAYERS] for item in self.seen[record.name])


def histogram(x: Tensor, layer: str, of: str) -> Histogram:
    """Counts of x in 64 equal bins from its smallest to its largest element."""
    values = x.detach().flatten().float()
    low, high = (bound.item() for bound in torch.aminmax(values))
    counts = torch.histc(values, BINS, low, high) if low < high else torch.tensor([float(values.numel())])
    return Histogram(layer, of, low, high, tuple(int(count) for count in counts.tolist()))


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
    layers = []
    for expert, w in enumerate(weights.float()):
        statistics = observed.get(expert)
        full_name = f"{prefix}.{name}.{expert}"
        moment = _moment(statistics, full_name)
        solution, method = log.solve(w, scheme, moment, full_name)
        log.note(full_name, scheme, method, w, solution.dequantized, statistics, moment)
        layers.append(QuantLinear.from_packed(_packed(solution, slice(None), scheme)))
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
    if recipe.correction is None or moment is None or observed is None or observed.shift is None:
        return log.solve(w, scheme, moment, name)
    seen = observed.moments(moment)
    if observed.held_out is None or observed.held_out.moment is None or not observed.held_out.moment.tokens:
        return log.solve(seen.aim(w, recipe.correction), scheme, moment, name)
    held_out = observed.held_out.moments(observed.held_out.moment.value)
    if recipe.method != "chosen":
        assert observed.moment is not None
        others = seen.without(held_out, observed.held_out.moment.tokens / observed.moment.tokens)
        correction = cross_fitted(w, (others, held_out), recipe.correction)
        return log.solve(seen.aim(w, correction), scheme, moment, name)
    options = [(recipe.gptq, replace(recipe.correction, strength=s, residual=r)) for s, r in CANDIDATES]
    columns = columns_for(w.device)
    return solve_best(w, seen, held_out, scheme.weights, log.scale_dtype, options, columns), recipe.method


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
