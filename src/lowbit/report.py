"""What a quantization did, in numbers: the record that the terminal, report.json and report.html all show.

A `Report` is plain data: frozen dataclasses of numbers and strings, equal after a trip through JSON. Everything that
a claim rests on stands in it: seed, data with its hash, versions, what was skipped and why, and the measured
difference from the original on text that calibration never saw.
"""

import json
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from lowbit.errors import InputError


@dataclass(frozen=True)
class CalibrationRecord:
    """The calibration tokens: where they came from and the SHA-256 of the token ids used."""

    source: str
    hash: str
    samples: int
    seq_len: int


@dataclass(frozen=True)
class Skipped:
    """A weight left as it was, and the reason."""

    name: str
    parameters: int
    bytes: int
    reason: str


@dataclass(frozen=True)
class Coverage:
    """How many of the model's parameters were quantized; fraction = quantized / parameters."""

    parameters: int
    quantized: int
    fraction: float
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True)
class RungRecord:
    """What a lower rung of --effort leaves in a layer, errors as in LayerRecord."""

    method: str
    relative_error: float
    output_error: float | None


@dataclass(frozen=True)
class LayerRecord:
    """One quantized layer. relative_error = |dW| / |W| (Frobenius); sqnr_db = -20 log10 of it;
    output_error = |x dW| / |x W| over the calibration tokens (None where no activations were seen).
    below: the same layer under the rungs below, lowest first; empty where --effort was not asked for."""

    name: str
    scheme: str
    method: str
    relative_error: float
    sqnr_db: float
    output_error: float | None
    below: tuple[RungRecord, ...] = ()


@dataclass(frozen=True)
class Fidelity:
    """Distance from the original on held-out text. kld in nats a token, with its standard error."""

    perplexity_reference: float
    perplexity: float
    kld: float
    kld_stderr: float
    top1_agreement: float
    tokens: int
    text: str
    text_hash: str


@dataclass(frozen=True)
class Gate:
    """A limit that was asked for, the value found, and whether it held."""

    name: str
    limit: float
    value: float
    passed: bool


@dataclass(frozen=True)
class Histogram:
    """Counts of values in equal bins between low and high; of = "weight" | "error" | "activation"."""

    layer: str
    of: str
    low: float
    high: float
    counts: tuple[int, ...]


@dataclass(frozen=True)
class TradeOff:
    """A point of size against loss: stored bits a weight, the expected KL, and the measured one after a full run."""

    name: str
    bits: float
    expected: float
    measured: float | None


@dataclass(frozen=True)
class GroupRecord:
    """Layers that share a scheme. alone: KL of the model with this group alone quantized, at each probed level."""

    name: str
    weights: int
    scheme: str
    bits: float
    alone: tuple[float, ...]


@dataclass(frozen=True)
class BudgetRecord:
    """How bits were spread. bits: what a weight takes on disk; curve: expected KL, levels everywhere with their names;
    runs: what was quantized in full; nearest: where a gate is missed, what would hold."""

    asked: str
    bits: float
    tokens: int
    seconds: float
    probes: tuple[str, ...]
    groups: tuple[GroupRecord, ...]
    curve: tuple[TradeOff, ...]
    runs: tuple[TradeOff, ...]
    nearest: str = ""


@dataclass(frozen=True)
class TextSample:
    """Greedy continuations of one prompt by the original and by the quantized model."""

    prompt: str
    before: str
    after: str


@dataclass(frozen=True)
class Report:
    """Everything one quantization did and cost."""

    model: str
    scheme: str
    method: str
    seed: int
    versions: dict[str, str]
    calibration: CalibrationRecord | None
    coverage: Coverage
    bytes_before: int
    bytes_after: int
    seconds: float
    peak_memory_bytes: int
    layers: tuple[LayerRecord, ...]
    fidelity: Fidelity | None = None
    gates: tuple[Gate, ...] = ()
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    histograms: tuple[Histogram, ...] = ()
    sample: TextSample | None = None
    budget: BudgetRecord | None = None

    @property
    def recipe(self) -> str:
        """method:scheme, as `lowbit compare --recipes` reads it."""
        return f"{self.method}:{self.scheme}"

    @property
    def passed(self) -> bool:
        """True when every gate that was asked for held."""
        return all(gate.passed for gate in self.gates)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """The report that `to_json` wrote. Raises InputError when the text is not one."""
        try:
            return _build(cls, json.loads(text))
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"this is not a lowbit report ({error}); write one with `lowbit quantize --json`"
            ) from None

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json() + "\n")

    def with_fidelity(self, fidelity: Fidelity | None, gates: tuple[Gate, ...]) -> "Report":
        return replace(self, fidelity=fidelity, gates=gates)


def _build(kind: Any, value: Any) -> Any:
    """value from JSON as an instance of the annotated type kind (dataclasses, tuples and X | None nest)."""
    if get_origin(kind) in (Union, UnionType):
        inner = next(option for option in get_args(kind) if option is not type(None))
        return None if value is None else _build(inner, value)
    if get_origin(kind) is tuple:
        return tuple(_build(get_args(kind)[0], item) for item in value)
    if hasattr(kind, "__dataclass_fields__"):
        hints = get_type_hints(kind)
        known = [field for field in fields(kind) if field.name in value or field.default is MISSING]  # older reports
        return kind(**{field.name: _build(hints[field.name], value[field.name]) for field in known})
    return value
