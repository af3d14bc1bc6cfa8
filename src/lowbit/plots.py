"""The page that a person looks at: `report.html` filled with one Report, or with several recipes of one model.

Python decides what stands where (cells, bars, points, in per cent of their box), lowbit.wording says it, and the
template draws it with inline CSS and SVG; a short script in it adds tooltips, tabs and sorting. The page reads
nothing from a network, and every text of a report is escaped.

    shade in the heat map   t = (v - low) / (high - low), of log v where high > 10 low; 0 pale, 1 strong
    bar of a histogram      log(1 + count) / log(1 + largest count), so that rare outliers stay visible
    scatter chart           x = bytes, from 0 to the original's; y = KL, on a log axis where it spans a factor of 5
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import groupby, takewhile

from jinja2 import Environment, StrictUndefined

from lowbit import wording
from lowbit.budget_plot import budget_chart
from lowbit.errors import InputError
from lowbit.report import Histogram, LayerRecord, Report, TextSample
from lowbit.ticks import decades, round_steps

LABEL_GAP = 6.5  # a line of text, in per cent of the height of the scatter chart
OUTSIDE = "other"  # the column of layers that stand in no block


@dataclass(frozen=True)
class Scale:
    """From the errors of a heat map to shades in 0..1."""

    low: float
    high: float

    @property
    def logarithmic(self) -> bool:
        return self.low > 0 and self.high > 10 * self.low

    @property
    def middle(self) -> float:
        return math.sqrt(self.low * self.high) if self.logarithmic else (self.low + self.high) / 2

    def shade(self, value: float) -> float:
        if self.high == self.low:
            return 0.5
        if self.logarithmic:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class Cell:
    """A square of the heat map: its place, counted from 0, and the layers there: one, or the experts of a block."""

    block: int
    kind: int
    layers: tuple[LayerRecord, ...]

    def worst(self, metric: str) -> LayerRecord | None:
        return worst(self.layers, metric)


@dataclass(frozen=True)
class HeatMap:
    """Blocks by kinds. scales: one per metric that was measured, "relative_error" first."""

    blocks: tuple[str, ...]
    kinds: tuple[str, ...]
    cells: tuple[Cell, ...]
    scales: dict[str, Scale]

    def rows(self) -> list[tuple[str, list[Cell | None]]]:
        """(kind, its cells along the blocks), None where a block has no such layer."""
        placed = {(cell.kind, cell.block): cell for cell in self.cells}
        columns = range(len(self.blocks))
        return [(kind, [placed.get((row, column)) for column in columns]) for row, kind in enumerate(self.kinds)]


@dataclass(frozen=True)
class Point:
    """A recipe in the scatter chart. x, y, the ends of the error bar and the label's height: per cent of the box."""

    report: Report
    x: float
    y: float
    error: tuple[float, float]
    label_y: float
    best: bool


@dataclass(frozen=True)
class Scatter:
    """Size against KL. Ticks are (place in per cent of the box, value)."""

    points: tuple[Point, ...]
    x_ticks: tuple[tuple[float, float], ...]
    y_ticks: tuple[tuple[float, float], ...]
    original_x: float
    logarithmic: bool


def render_report(report: Report) -> str:
    """One self-contained HTML page about one quantization."""
    title = f"{wording.short_name(report.model)}, {report.recipe}"
    return _render(title, wording.verdict(report), [report], comparing=False)


def render_comparison(title: str, reports: Sequence[Report]) -> str:
    """One self-contained HTML page about several recipes of one model. Raises InputError when there is none."""
    if not reports:
        raise InputError("a comparison page needs at least one report; name one or more recipes with --recipes")
    return _render(title, wording.comparison_verdict(reports), reports, comparing=True)


def _render(title: str, verdict: str, reports: Sequence[Report], comparing: bool) -> str:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals |= {"words": wording, "heat_map": heat_map, "bar_path": bar_path, "worst": worst}
    environment.globals |= {"budget_chart": budget_chart}
    template = environment.from_string(files("lowbit").joinpath("report.html").read_text(encoding="utf-8"))
    best = wording.best_for_size(reports)
    return template.render(
        title=title, verdict=verdict, reports=reports, comparing=comparing, best=best, chart=scatter(reports),
        histogram_groups=histogram_groups, divergence=divergence,
    )  # fmt: skip


def worst(layers: Sequence[LayerRecord], metric: str) -> LayerRecord | None:
    """The layer with the largest error in `metric`; None where none was measured."""
    measured = [layer for layer in layers if getattr(layer, metric) is not None]
    return max(measured, key=lambda layer: float(getattr(layer, metric)), default=None)


def heat_map(layers: Sequence[LayerRecord]) -> HeatMap:
    """Where each layer stands: the block is the first integer in its name, the kind is what follows.

    Later integers (experts) become "*" and share a cell. A layer without an integer stands in the last column.
    """
    places = [_place(layer.name) for layer in layers]
    blocks = sorted({block for _, block, _ in places if block is not None})
    columns: dict[int | None, int] = {block: column for column, block in enumerate(blocks)} | {None: len(blocks)}
    rows = list(dict.fromkeys((stem, kind) for stem, _, kind in places))
    cells: dict[tuple[int, int], list[LayerRecord]] = {}
    for layer, (stem, block, kind) in zip(layers, places, strict=True):
        cells.setdefault((columns[block], rows.index((stem, kind))), []).append(layer)
    scales = {}
    for metric in ("relative_error", "output_error"):
        errors = [getattr(layer, metric) for layer in layers if getattr(layer, metric) is not None]
        if errors:
            scales[metric] = Scale(min(errors), max(errors))
    outside = (OUTSIDE,) if any(block is None for _, block, _ in places) else ()
    return HeatMap(
        (*map(str, blocks), *outside),
        _kind_labels(rows),
        tuple(Cell(block, kind, tuple(group)) for (block, kind), group in cells.items()),
        scales,
    )


def _place(name: str) -> tuple[str, int | None, str]:
    """(path before the block, block, kind): "model.layers.3.mlp.up_proj" -> ("model.layers", 3, "mlp.up_proj")."""
    parts = name.split(".")
    index = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if index is None:
        return "", None, name
    kind = ".".join("*" if part.isdecimal() else part for part in parts[index + 1 :])
    return ".".join(parts[:index]), int(parts[index]), kind or parts[max(index - 1, 0)]


def _kind_labels(rows: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """The shortest of last part, kind, and kind with the path before the block that no other row has."""
    lasts, kinds = [kind.rpartition(".")[2] for _, kind in rows], [kind for _, kind in rows]
    return tuple(
        last if lasts.count(last) == 1 else kind if kinds.count(kind) == 1 else f"{stem}: {kind}"
        for last, (stem, kind) in zip(lasts, rows, strict=True)
    )


def bar_path(counts: Sequence[int]) -> str:
    """The bars of a histogram as an SVG path in a box of len(counts) x 100."""
    top = math.log1p(max(counts, default=0)) or 1.0
    heights = ((place, 100 * math.log1p(count) / top) for place, count in enumerate(counts) if count)
    return "".join(f"M{place} 100v{-height:.1f}h1v{height:.1f}z" for place, height in heights)


def histogram_groups(histograms: Sequence[Histogram]) -> list[tuple[str, list[Histogram]]]:
    """(layer, its histograms), layers in the order in which they first appear."""
    order = list(dict.fromkeys(histogram.layer for histogram in histograms))
    ordered = sorted(histograms, key=lambda histogram: order.index(histogram.layer))
    return [(layer, list(group)) for layer, group in groupby(ordered, key=lambda histogram: histogram.layer)]


def divergence(sample: TextSample) -> int:
    """How many characters the two continuations share, cut back to a whole word."""
    if sample.before == sample.after:
        return len(sample.before)
    shared = list(takewhile(lambda pair: pair[0] == pair[1], zip(sample.before, sample.after, strict=False)))
    return sample.before[: len(shared)].rfind(" ") + 1


def scatter(reports: Sequence[Report]) -> Scatter | None:
    """The measured recipes as points; None where nothing was measured."""
    measured = sorted((r for r in reports if r.fidelity), key=lambda report: -wording.kld(report))
    if not measured:
        return None
    widest = 1.05 * max(max(r.bytes_before, r.bytes_after) for r in measured)
    klds = [wording.kld(report) for report in measured]
    logarithmic = min(klds) > 0 and max(klds) > 5 * min(klds)
    low, high = (min(klds) / 1.8, max(klds) * 1.8) if logarithmic else (0.0, 1.15 * max(*klds, 1e-6))

    def height(value: float) -> float:
        if not logarithmic:
            return 100 * (min(max(value, low), high) - low) / (high - low)
        return 100 * math.log(min(max(value, low), high) / low) / math.log(high / low)

    best, points, label_y = wording.best_for_size(reports), [], 100.0
    for report in measured:
        fidelity, y = report.fidelity, height(wording.kld(report))
        assert fidelity is not None
        label_y = max(min(y, label_y - LABEL_GAP), 0.0)
        error = (height(fidelity.kld - fidelity.kld_stderr), height(fidelity.kld + fidelity.kld_stderr))
        points.append(Point(report, 100 * report.bytes_after / widest, y, error, label_y, report in best))
    y_values = decades(low, high) if logarithmic else round_steps(high)
    return Scatter(
        tuple(points),
        tuple((100 * size / widest, size) for size in round_steps(widest)),
        tuple((height(value), value) for value in y_values),
        100 * measured[0].bytes_before / widest,
        logarithmic,
    )
