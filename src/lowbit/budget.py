"""Mixed precision under a budget: the scheme of every group of layers by measured sensitivity.

    bits      the least loss within so many stored bits a weight, scales and zero-points included
    max_kld   the fewest bits with which the gate holds on held-out text: where the recipe as asked misses it, bits are
              raised, and layers left as they are while coverage allows, group by group along the trade-off curve

Costs (costs.py) are measured at the level that the budget affords everywhere and at the one below it (for
max_kld: at the scheme asked for); levels above are derived. Each full run then tells how far measured KL lies from the
expected sum, and the next one aims by that. Everything is decided on calibration text but the question whether the gate
holds.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowbit.costs import Probe
from lowbit.errors import InputError
from lowbit.model.allocation import Allocation
from lowbit.model.quantize import Progress
from lowbit.model.recipe import Recipe
from lowbit.model.select import Selection
from lowbit.numerics.formats import INT_BITS, int_format
from lowbit.numerics.scheme import QuantScheme
from lowbit.numerics.storage import storage_of
from lowbit.report import BudgetRecord, Report, TradeOff
from lowbit.tradeoff import Table, average_bits, check_reachable, measured_table

MARGIN = 0.9  # a new run aims at this share of the gate: costs do not add up exactly
MOST_RUNS = 6


@dataclass(frozen=True)
class Budget:
    """bits: stored bits a weight, None for none asked. candidates: the bits that a code may have."""

    bits: float | None = None
    candidates: tuple[int, ...] = (2, 3, 4, 5, 6, 8)

    def levels(self, scheme: QuantScheme) -> list[QuantScheme]:
        """The candidates in the family of `scheme`, by growing bits. Raises InputError.

        Without a number of bits the scheme itself is the first.
        """
        if scheme.weights.format.kind != "int":
            raise InputError(
                f"a budget spreads the bits of integer weights, and {scheme} has none; use w4a16-g64 or its kin"
            )
        if self.bits is not None and storage_of(scheme) != "packed":
            raise InputError(
                f"{scheme} stores each code in 8 bits whatever its width, so --bits has nothing to spread; use "
                "a scheme of weights alone, such as w4a16-g64, or --max-kld"
            )
        if wrong := [bits for bits in self.candidates if bits not in INT_BITS]:
            raise InputError(f"a code can't have {wrong[0]} bits; give candidates from 2 to 8")
        if self.bits is None:
            widths = [scheme.weights.bits, *(bits for bits in self.candidates if bits > scheme.weights.bits)]
        else:
            widths = list(self.candidates)
        return [replace(scheme, weights=replace(scheme.weights, format=int_format(b))) for b in sorted(set(widths))]


@dataclass(frozen=True)
class Ground:
    """What sensitivities are measured on: the float model, its selection, calibration ids, the dtype of scales."""

    model: PreTrainedModel
    selection: Selection
    ids: Tensor
    scale_dtype: torch.dtype
    progress: Progress


class Search:
    """Finds recipes under a budget and a gate, run by run, and remembers them for the report."""

    def __init__(self, budget: Budget, recipe: Recipe, max_kld: float | None, min_coverage: float | None) -> None:
        self._budget, self._recipe = budget, recipe
        self._max_kld, self._min_coverage = max_kld, min_coverage
        self._table: Table | None = None
        self._now: Allocation | None = None
        self._runs: list[TradeOff] = []
        self._started = time.perf_counter()
        if budget.bits is not None:
            budget.levels(recipe.scheme)  # refuses what can't work before anything is loaded

    @property
    def begins(self) -> bool:
        """Whether the first run needs a recipe of the search."""
        return self._budget.bits is not None

    def first(self, ground: Ground) -> Recipe:
        """The recipe of the first run under a number of bits. Raises InputError for one that can't be reached."""
        assert self._budget.bits is not None
        self._table = self._measured(ground)
        self._now = self._table.within(self._budget.bits)
        return self._ruled()

    def wants_more(self, report: Report) -> bool:
        """Whether `report` misses the gate on KL and another run may hold it."""
        gate = next((gate for gate in report.gates if gate.name == "max-kld"), None)
        if gate is None or gate.passed or self._recipe.scheme.weights.format.kind != "int":
            return False
        if self._table is None:
            return True
        self._note(report)
        return len(self._runs) < MOST_RUNS and self._next(report) is not None

    def next(self, report: Report, ground: Callable[[], Ground]) -> Recipe:
        """The recipe of the run after the one that `report` is about; only where wants_more."""
        if self._table is None:
            self._table = self._measured(ground())
            self._now = self._table.uniform(self._recipe.scheme)
            self._note(report)
        self._now = self._next(report) or self._now
        return self._ruled()

    def finished(self, report: Report) -> Report:
        """The report with what was chosen, the trade-off curve and, where the gate is missed, the nearest thing."""
        if self._table is None or self._now is None:
            return report
        self._note(report)
        last = self._runs[-1]
        scale = last.measured / last.expected if last.measured is not None and last.expected else 1.0
        asked = [f"--bits {self._budget.bits:g}"] if self._budget.bits is not None else []
        asked += [f"--max-kld {self._max_kld:g}"] if self._max_kld is not None else []
        record = BudgetRecord(
            asked=" ".join(asked),
            bits=self._now.bits,
            tokens=self._table.tokens,
            seconds=time.perf_counter() - self._started,
            probes=tuple(name for name, _ in self._table.measured),
            groups=self._table.records(self._now),
            curve=self._table.points(scale),
            runs=tuple(self._runs),
            nearest=self._nearest(report),
        )
        warnings = (*report.warnings, record.nearest) if record.nearest else report.warnings
        return replace(report, scheme=f"{report.scheme} at {self._now.bits:.2f} bits", budget=record, warnings=warnings)

    def _measured(self, ground: Ground) -> Table:
        levels = self._budget.levels(self._recipe.scheme)
        if self._budget.bits is None:
            probes = levels[:1]
        else:
            needed = [average_bits(ground.model, ground.selection, level, ground.scale_dtype) for level in levels]
            check_reachable(self._budget.bits, needed[0], levels[0])
            most = max(place for place, bits in enumerate(needed) if bits <= self._budget.bits)
            probes = levels[max(most - 1, 0) : most + 1]
        may_skip = (self._min_coverage or 0.0) if self._max_kld is not None else None
        probe = Probe.on(ground.ids, self._recipe, ground.scale_dtype, ground.progress)
        return measured_table(ground.model, ground.selection, self._recipe.rules, levels, probes, may_skip, probe)

    def _ruled(self) -> Recipe:
        assert self._table is not None
        assert self._now is not None
        return replace(self._recipe, rules=(*self._recipe.rules, *self._table.rules(self._now)))

    def _note(self, report: Report) -> None:
        """Write the run that `report` is about down, once."""
        assert self._now is not None
        measured = report.fidelity.kld if report.fidelity is not None else None
        run = TradeOff(f"run {len(self._runs) + 1}", self._now.bits, self._now.cost, measured)
        if not self._runs or self._runs[-1].bits != run.bits:
            self._runs.append(run)

    def _next(self, report: Report) -> Allocation | None:
        """The point of the curve with the fewest bits that should hold the gate, or its end; None after that."""
        assert self._table is not None
        assert self._now is not None
        assert self._max_kld is not None
        assert report.fidelity is not None
        points = [point for point in self._table.curve() if point.bits > 1.001 * self._now.bits]
        if not points:
            return None
        if len(self._runs) + 1 >= MOST_RUNS:
            return points[-1]
        target = MARGIN * self._max_kld * self._now.cost / report.fidelity.kld
        return next((point for point in points if point.cost <= target), points[-1])

    def _nearest(self, report: Report) -> str:
        gate = next((gate for gate in report.gates if gate.name == "max-kld" and not gate.passed), None)
        if gate is None or self._now is None:
            return ""
        found = f"the nearest is KL {gate.value:.4g}, at {self._now.bits:.2f} bits a weight"
        return f"{found}; ask for --max-kld {1.02 * gate.value:.2g} or more, or lower --min-coverage"
