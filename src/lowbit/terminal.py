"""What the terminal shows: the progress bar, and reports as tables."""

from collections.abc import Sequence
from types import TracebackType

import torch
from rich import box
from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from lowbit import memory, wording
from lowbit.inspection import Contents
from lowbit.options import Scores
from lowbit.report import BudgetRecord, LayerRecord, Report


class Bar:
    """A progress line per stage: steps, time left, and the peak memory so far of the device that does the work."""

    def __init__(self, console: Console, device: str = "auto") -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(
            *columns, TextColumn("eta"), TimeRemainingColumn(), TextColumn("{task.fields[memory]}"), console=console
        )
        self._tasks: dict[str, int] = {}
        on_cuda = torch.cuda.is_available() and device.startswith(("auto", "cuda"))
        self._device = torch.device("cuda" if on_cuda else "cpu")

    def __enter__(self) -> "Bar":
        self._progress.start()
        return self

    def __exit__(self, *exception: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._progress.stop()

    def show(self, stage: str, done: int, total: int) -> None:
        """A verb's Progress: `done` of `total` steps of `stage`."""
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total, memory="")
        used = f"peak {wording.size_text(memory.peak_bytes(self._device))}"
        self._progress.update(self._tasks[stage], completed=done, total=total, memory=used)  # type: ignore[arg-type]


def report_text(report: Report) -> RenderableType:
    """One report: the verdict, the table, the worst layers, what was skipped, warnings."""
    worst = Table("layer", "scheme", "method", "relative error", "SQNR dB", "output error", title="Worst layers")
    ranked = sorted(report.layers, key=lambda layer: -(layer.output_error or layer.relative_error))
    for layer in ranked[:5]:
        output = "" if layer.output_error is None else f"{layer.output_error:.4f}"
        worst.add_row(
            layer.name, layer.scheme, layer.method, f"{layer.relative_error:.4f}", f"{layer.sqnr_db:.1f}", output
        )
    skipped = Table("reason", "tensors", "parameters", title=f"Not quantized; {_covered(report)}")
    for reason in dict.fromkeys(item.reason for item in report.coverage.skipped):
        items = [item for item in report.coverage.skipped if item.reason == reason]
        skipped.add_row(reason, str(len(items)), f"{sum(item.parameters for item in items):,}")
    parts: list[RenderableType] = [wording.verdict(report), comparison_table([report]), worst, skipped]
    if any(layer.below for layer in report.layers):
        parts.append(rungs_table(report.layers))
    if report.budget is not None:
        parts.append(budget_table(report.budget))
    parts += [*report.notes, *(f"warning: {warning}" for warning in report.warnings)]
    return Group(*parts)


def rungs_table(layers: Sequence[LayerRecord]) -> Table:
    """What each rung of --effort left in each kind of layer; layer by layer it stands in the report."""
    gains = wording.rung_gains(layers)
    table = Table("output error", *gains.methods, title="What each level gained")
    for kind, errors in gains.kinds:
        table.add_row(kind, *(wording.percent_text(error) for error in errors))
    return table


def budget_table(budget: BudgetRecord) -> Table:
    """The trade-off: full runs with their measured KL, one scheme everywhere, and points of the curve between."""
    table = Table("point", "bits a weight", "expected KL", "measured KL", title=f"Trade-off for {budget.asked}")
    between = [point for point in budget.curve if not point.name]
    thin = between[:: max(len(between) // 8, 1)]
    for point in (*budget.runs, *(point for point in budget.curve if point.name), *thin):
        measured = "" if point.measured is None else wording.kld_text(point.measured)
        expected = wording.kld_text(point.expected) if point.measured is None else ""
        table.add_row(point.name or "mixed", f"{point.bits:.3f}", expected, measured)
    return table


def _covered(report: Report) -> str:
    return f"{wording.percent_text(report.coverage.fraction)} of the decoder blocks' weights are"


def comparison_table(reports: Sequence[Report]) -> Table:
    """The original and each recipe in a row: size, perplexity, KL, top-1, seconds, peak memory; fits in 80 columns."""
    table = Table(title=reports[0].model, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("recipe", no_wrap=True)
    for name in ("size", "ppl", "KL", "top-1", "seconds", "peak"):
        table.add_column(name, justify="right", no_wrap=True)
    first = reports[0].fidelity
    table.add_row(
        "original",
        wording.size_text(reports[0].bytes_before),
        *_measures(first.perplexity_reference if first else None),
    )
    for report in reports:
        fidelity = report.fidelity
        table.add_row(
            report.recipe,
            wording.size_text(report.bytes_after),
            *_measures(
                fidelity.perplexity if fidelity else None,
                f"{fidelity.kld:.4f} ± {fidelity.kld_stderr:.4f}" if fidelity else "",
                wording.percent_text(fidelity.top1_agreement) if fidelity else "",
            ),
            f"{report.seconds:.1f}",
            wording.size_text(report.peak_memory_bytes),
        )
    table.caption = "ppl: perplexity; KL(original || quantized) in nats a token; peak: memory"
    if failed := [report.recipe for report in reports if not report.passed]:
        table.caption += f"\n[red]a limit that was asked for is not held by {', '.join(failed)}[/]"
    return table


def samples_text(reports: Sequence[Report]) -> RenderableType:
    """What the original and each recipe make of the same beginning."""
    samples = [(report.recipe, report.sample) for report in reports if report.sample]
    if not samples:
        return ""
    first = samples[0][1]
    table = Table("model", f"{first.prompt} ...", title="Text before and after", show_lines=True)
    table.add_row("original", first.before.strip())
    for recipe, sample in samples:
        table.add_row(recipe, sample.after.strip())
    return table


def _measures(perplexity: float | None, kld: str = "0", agreement: str = "100%") -> tuple[str, str, str]:
    if perplexity is None:
        return "", "", ""
    return wording.perplexity_text(perplexity), kld, agreement


def scores_text(scores: Scores) -> RenderableType:
    """What `evaluate` measured."""
    table = Table("measure", "value", title=scores.model)
    table.add_row("perplexity", f"{scores.perplexity:.4f}")
    if scores.fidelity is not None:
        fidelity = scores.fidelity
        table.add_row("perplexity of the original", f"{fidelity.perplexity_reference:.4f}")
        table.add_row("KL to the original (nats/token)", f"{fidelity.kld:.5f} ± {fidelity.kld_stderr:.5f}")
        table.add_row("top-1 agreement", wording.percent_text(fidelity.top1_agreement))
        table.add_row("tokens", f"{fidelity.tokens:,}")
    for task, values in scores.tasks.items():
        for name, value in values.items():
            table.add_row(f"{task} {name}", f"{value:.4f}")
    return table


def contents_table(contents: Contents) -> RenderableType:
    """A checkpoint's tensors, and its modules by scheme."""
    table = Table("tensor", "shape", "dtype", "bytes", "scheme", title=contents.name)
    for tensor in contents.tensors:
        shape = " x ".join(str(size) for size in tensor.shape) or "scalar"
        table.add_row(tensor.name, shape, tensor.dtype, f"{tensor.bytes:,}", tensor.scheme)
    total = sum(tensor.bytes for tensor in contents.tensors)
    summary = Table("scheme", "tensors", "bytes", "share", title=f"{contents.method}, {wording.size_text(total)}")
    for scheme in dict.fromkeys(tensor.scheme for tensor in contents.tensors):
        sizes = [tensor.bytes for tensor in contents.tensors if tensor.scheme == scheme]
        share = wording.percent_text(sum(sizes) / total) if total else ""
        summary.add_row(scheme or "not quantized", str(len(sizes)), f"{sum(sizes):,}", share)
    return Group(table, summary)
