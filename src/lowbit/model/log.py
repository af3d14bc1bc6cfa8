"""What a run writes down: a record and histograms per layer, warnings and notes; and which solver a layer gets."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor

from lowbit.algorithms.columns import PLAIN, Columns
from lowbit.algorithms.gptq import solve_gptq
from lowbit.algorithms.hqq import solve_hqq
from lowbit.algorithms.rtn import solve_rtn
from lowbit.algorithms.scales import ScaleSearch
from lowbit.algorithms.solution import Solution
from lowbit.model.recipe import HESSIAN_METHODS, MOMENT_METHODS, Recipe
from lowbit.model.rungs import errors_below
from lowbit.model.sensitivity import Sensed
from lowbit.model.statistics import Statistics, histogram
from lowbit.numerics import metrics
from lowbit.numerics.hadamard import Hadamard
from lowbit.numerics.scheme import QuantScheme
from lowbit.observe.moments import SecondMoment
from lowbit.observe.ranges import make_observer
from lowbit.optional import installed, late
from lowbit.report import Histogram, LayerRecord

SHOWN_LAYERS = 6  # the worst layers, whose histograms a report keeps


def columns_for(device: torch.device) -> Columns:
    """The solvers' inner loops for tensors on this device: fused where Triton is installed beside a GPU."""
    if device.type != "cuda" or not installed("triton"):
        return PLAIN
    kernels = late("lowbit.kernels.triton.columns")
    return Columns(kernels.round_panel, kernels.descend_panel)


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

    def solve(
        self, w: Tensor, scheme: QuantScheme, moment: Tensor | None, name: str, tokens: int | None = None
    ) -> tuple[Solution, str]:
        """(solution, method used) for w [N, K]; without a second moment gptq falls back to rtn, with a warning.

        tokens: how many the moment was taken of, None for enough. Under fewer than K its diagonal alone is used.
        """
        method = self.recipe.method
        if method in HESSIAN_METHODS and moment is not None and tokens is not None and tokens < w.shape[1]:
            method = "rtn-weighted"
        if method in MOMENT_METHODS and moment is None:
            self.warnings.append(f"{name}: no calibration token was seen there, so it was rounded to nearest")
            method = "rtn"
        if method in ("rtn-weighted", "awq"):
            assert moment is not None
            importance = moment.diagonal()
            return solve_rtn(w, scheme.weights, self.scale_dtype, ScaleSearch(), importance), method
        if method in HESSIAN_METHODS:
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
        search = self.recipe.clip if method == "rtn-clip" else None
        return solve_rtn(w, scheme.weights, self.scale_dtype, search), method

    def note(
        self, name: str, scheme: QuantScheme, method: str, w: Tensor, dequantized: Tensor, observed: Statistics | None,
        moment: Tensor | None,
    ) -> None:  # fmt: skip
        """Write down what layer `name` lost."""
        error = w - dequantized
        relative, output = metrics.layer_errors(w, error, moment)
        self.records.append(LayerRecord(name, str(scheme), method, relative, metrics.sqnr_db(relative), output))
        if name not in self._worst():
            return
        shown = [histogram(w, name, "weight"), histogram(error, name, "error")]
        if observed is not None and observed.sample is not None:
            shown.append(histogram(observed.sample, name, "activation"))
        self.seen[name] = tuple(shown)

    def _worst(self) -> list[str]:
        """The names of the worst layers so far: by output error where it is known, else by relative error."""
        ranked = sorted(self.records, key=lambda record: -(record.output_error or record.relative_error))
        return [record.name for record in ranked[:SHOWN_LAYERS]]

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
        """Those of the worst layers."""
        return tuple(item for name in self._worst() for item in self.seen[name])
