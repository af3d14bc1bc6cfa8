"""Numbers and results in words: what report.html says, and what a terminal can say too.

Sizes are decimal (1 MB = 10^6 bytes). A share is a fraction in 0..1 and is written in per cent. The verdict is one or
two plain sentences; where a limit that was asked for fails, it begins with that.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from lowbit.errors import SchemeError
from lowbit.numerics.scheme import QuantScheme
from lowbit.report import Fidelity, Gate, LayerRecord, Report

MINUS, DASH = "\N{MINUS SIGN}", "\N{EN DASH}"
UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
SAME_SIZE = 1.005  # recipes of one scheme differ by a few bytes of metadata; within 0.5% they count as equal


def short_name(model: str) -> str:
    """The last part of a hub id or path."""
    return PurePath(model).name or model


def size_text(count: float) -> str:
    """Bytes with three significant digits: "102 MB"."""
    for unit, factor in UNITS:
        if count >= 0.9995 * factor:
            value = count / factor
            return f"{value:.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f} {unit}"
    return f"{count:.0f} bytes"


def tick_text(count: float) -> str:
    """Bytes at a tick of an axis, without trailing zeros: "50 MB"."""
    if not count:
        return "0"
    unit, factor = next(((unit, factor) for unit, factor in UNITS if count >= factor), ("bytes", 1.0))
    return f"{count / factor:g} {unit}"


def number_text(value: float) -> str:
    """Three significant digits with a true minus sign."""
    return f"{value:.3g}".replace("-", MINUS)


def ratio_text(before: float, after: float) -> str:
    """How many times smaller (or larger): "2.63 times smaller"."""
    if not before or not after:
        return "size unknown"
    ratio = before / after
    return f"{ratio:.3g} times smaller" if ratio >= 1 else f"{1 / ratio:.3g} times larger"


def duration_text(seconds: float) -> str:
    if seconds < 99.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def percent_text(fraction: float | None) -> str:
    """Three significant digits; never rounded up to 100%, so that "100%" means all; a dash for None."""
    if fraction is None or not math.isfinite(fraction):
        return DASH
    if fraction in (0, 1):
        return f"{100 * fraction:.0f}%"
    decimals = min(max(2 - math.floor(math.log10(100 * abs(fraction))), 1), 4)
    text = f"{100 * fraction:.{decimals}f}%"
    return "over 99.9%" if text == "100.0%" and fraction < 1 else text


def perplexity_text(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def change_text(value: float, reference: float) -> str:
    """The relative change with its sign: "+29.6%"."""
    return f"{100 * (value / reference - 1):+.1f}%".replace("-", MINUS)


def kld_text(value: float, stderr: float | None = None) -> str:
    """A KL divergence: three significant digits alone, else as many decimals as its standard error allows."""
    if stderr is None:
        return f"{value:.3g}"
    decimals = min(7, max(1, 1 - math.floor(math.log10(stderr)))) if stderr > 0 else 4
    return f"{value:.{decimals}f} ± {stderr:.{decimals}f}"


def limit_text(gate: Gate) -> str:
    """What was found and what was asked for; the direction is in the gate's name ("min-coverage", "max-kld")."""
    bound = "at least" if gate.name.lower().startswith("min") else "at most"
    return f"{gate.value:.4g} found, {bound} {gate.limit:.4g} asked for"


@dataclass(frozen=True)
class RungGains:
    """Output errors by method, lowest rung first and the kept one last: (kind, errors) and (layer, errors)."""

    methods: tuple[str, ...]
    kinds: tuple[tuple[str, tuple[float | None, ...]], ...]
    layers: tuple[tuple[str, tuple[float | None, ...]], ...]


def rung_gains(layers: Sequence[LayerRecord]) -> RungGains:
    """What the rungs of --effort left in each layer and, as a root mean square, in each kind of layer."""
    methods = list(dict.fromkeys(rung.method for layer in layers for rung in layer.below))
    methods += [method for method in dict.fromkeys(layer.method for layer in layers) if method not in methods]
    rows = []
    for layer in layers:
        errors = {rung.method: rung.output_error for rung in layer.below} | {layer.method: layer.output_error}
        rows.append((layer.name, tuple(errors.get(method) for method in methods)))
    kinds: dict[str, list[tuple[float | None, ...]]] = {}
    for name, found in rows:
        kinds.setdefault(name.rpartition(".")[2], []).append(found)
    means = tuple((kind, tuple(_root_mean_square(column) for column in zip(*found, strict=True)))
                  for kind, found in kinds.items())  # fmt: skip
    return RungGains(tuple(methods), means, tuple(rows))


def _root_mean_square(values: Sequence[float | None]) -> float | None:
    known = [value**2 for value in values if value is not None]
    return math.sqrt(sum(known) / len(known)) if known else None


def verdict(report: Report) -> str:
    """One quantization in a sentence, after the limits that fail, if any do."""
    name, ratio = short_name(report.model), ratio_text(report.bytes_before, report.bytes_after)
    text = f"{_subject(report.scheme)} {name} {ratio}; "
    text += (
        _fidelity_text(report.fidelity) if report.fidelity else "how close it stays to the original was not measured."
    )
    failed = [gate for gate in report.gates if not gate.passed]
    if not failed:
        return text
    limits = "; ".join(f"{gate.name}, {limit_text(gate)}" for gate in failed)
    return f"Not good enough: {len(failed)} of {len(report.gates)} limits failed ({limits}). {text}"


def comparison_verdict(reports: Sequence[Report]) -> str:
    """Which recipe stays closest to the original and which is the smallest, after the recipes that fail a limit."""
    failed = sum(not report.passed for report in reports)
    start = f"Not good enough: {failed} of {_recipes(len(reports))} failed a limit. " if failed else ""
    start += f"{short_name(reports[0].model)}, quantized with {_recipes(len(reports))}: "
    measured = [report for report in reports if report.fidelity]
    if not measured:
        sizes = sorted(report.bytes_after for report in reports)
        return f"{start}{size_text(sizes[0])} to {size_text(sizes[-1])}; no distance to the original was measured."
    closest = min(measured, key=kld)
    least = min(report.bytes_after for report in measured)
    smallest = min((report for report in measured if report.bytes_after <= SAME_SIZE * least), key=kld)
    if closest is smallest:
        return f"{start}{closest.recipe} is the smallest and stays closest to the original ({_cost(closest)})."
    return (
        f"{start}{closest.recipe} stays closest to the original ({_cost(closest)}); "
        f"{smallest.recipe} is the best of the smallest ({_cost(smallest)})."
    )


def best_for_size(reports: Iterable[Report]) -> list[Report]:
    """The reports with which no other compares at most as large and closer (Pareto); only measured ones."""
    measured = [report for report in reports if report.fidelity]
    return [report for report in measured if not any(_beats(other, report) for other in measured)]


def _beats(other: Report, report: Report) -> bool:
    if kld(other) < kld(report):
        return other.bytes_after <= SAME_SIZE * report.bytes_after
    return kld(other) == kld(report) and SAME_SIZE * other.bytes_after < report.bytes_after


def kld(report: Report) -> float:
    """Mean KL(original || quantized) in nats a token; infinite where it was not measured, so that it sorts last."""
    return report.fidelity.kld if report.fidelity else math.inf


def _cost(report: Report) -> str:
    return f"{ratio_text(report.bytes_before, report.bytes_after)}, KL {kld_text(kld(report))}"


def _recipes(count: int) -> str:
    return f"{count} recipe" + "s" * (count != 1)


def _subject(text: str) -> str:
    """Subject and verb of the verdict: "4-bit weights make"."""
    try:
        scheme = QuantScheme.parse(text)
    except SchemeError:
        return f"The scheme {text} makes"
    weights = scheme.weights
    subject = (
        f"{weights.bits}-bit weights" if weights.format.kind == "int" else f"{str(weights.format).upper()} weights"
    )
    if scheme.activations is None:
        return f"{subject} make"
    same = scheme.activations.format == weights.format
    return f"{subject} and {'' if same else f'{scheme.activations.bits}-bit '}activations make"


def _fidelity_text(fidelity: Fidelity) -> str:
    before, after = perplexity_text(fidelity.perplexity_reference), perplexity_text(fidelity.perplexity)
    change = change_text(fidelity.perplexity, fidelity.perplexity_reference)
    verb = "rises" if fidelity.perplexity > fidelity.perplexity_reference else "falls"
    moved = f"stays at {before} ({change})" if before == after else f"{verb} from {before} to {after} ({change})"
    return (
        f"on {fidelity.tokens:,} held-out tokens its perplexity {moved}, "
        f"and its top choice agrees with the original on {percent_text(fidelity.top1_agreement)} of tokens."
    )
