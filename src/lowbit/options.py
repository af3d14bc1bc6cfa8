"""What the verbs take and give besides recipes and reports: frozen options, one concept each."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from lowbit.errors import InputError
from lowbit.model.quantize import Progress
from lowbit.report import Coverage, Fidelity, Gate


@dataclass(frozen=True)
class Calibration:
    """The tokens that activations are observed on; source as in observe/tokens.py, None: the packaged text."""

    source: str | Path | Tensor | None = None
    samples: int = 128
    seq_len: int = 512
    seed: int = 0


@dataclass(frozen=True)
class Evaluation:
    """The held-out text that models are judged on; None: the packaged one.

    `windows` windows of seq_len tokens are drawn with a fixed seed. sample_tokens: the length of the continuation that
    the report shows, 0 for none.
    """

    text: str | Path | None = None
    windows: int = 20
    seq_len: int = 1024
    sample_tokens: int = 32


@dataclass(frozen=True)
class Gates:
    """Limits that the result must hold; None asks for nothing. max_ppl_increase in per cent of the original's."""

    min_coverage: float | None = 0.9
    max_kld: float | None = None
    max_ppl_increase: float | None = None

    def check(self, coverage: Coverage, fidelity: Fidelity | None) -> tuple[Gate, ...]:
        """Each limit that was asked for, with the value found."""
        found = [("min-coverage", self.min_coverage, coverage.fraction)]
        if fidelity is not None:
            increase = 100 * (fidelity.perplexity / fidelity.perplexity_reference - 1)
            found += [("max-kld", self.max_kld, fidelity.kld), ("max-ppl-increase", self.max_ppl_increase, increase)]
        return tuple(
            Gate(name, limit, value, value >= limit if name.startswith("min") else value <= limit)
            for name, limit, value in found
            if limit is not None
        )

    def check_possible(self, evaluation: Evaluation | None) -> None:
        """Raise InputError for a limit on what will not be measured."""
        if evaluation is None and (self.max_kld is not None or self.max_ppl_increase is not None):
            raise InputError("a limit on KL or perplexity needs an evaluation: leave out --no-eval")


@dataclass(frozen=True)
class Scores:
    """What `lowbit.evaluate` measured; fidelity only where a reference was given; tasks: task -> metric -> value."""

    model: str
    perplexity: float
    fidelity: Fidelity | None
    tasks: dict[str, dict[str, float]]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, allow_nan=False)


def silent(stage: str, done: int, total: int) -> None:
    """A Progress that shows nothing."""


@dataclass(frozen=True)
class Conditions:
    """What all recipes of one run share: the data, how results are judged, where the work runs, who watches."""

    calibration: Calibration = Calibration()
    evaluation: Evaluation | None = Evaluation()
    gates: Gates = Gates()
    device: str = "auto"
    overwrite: bool = False
    progress: Progress = silent
