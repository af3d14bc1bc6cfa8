"""Options that several verbs share, and how their texts are read."""

from pathlib import Path
from typing import Annotated

import typer

from lowbit.errors import GateError, InputError
from lowbit.io.folder import why_not_writable
from lowbit.report import Report

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A hub id, a folder or a .gguf file.")]
Out = Annotated[Path, typer.Option("-o", "--out", help="The folder to write.")]
CalibrationText = Annotated[
    str | None, typer.Option("--calibration", help="Text, .jsonl or tokens file, or hub data set; default: packaged.")
]
Samples = Annotated[int, typer.Option(help="Calibration windows.")]
SeqLen = Annotated[int, typer.Option(help="Tokens per calibration window.")]
Seed = Annotated[int, typer.Option(help="Chooses the calibration windows.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
MinCoverage = Annotated[float, typer.Option(help="Least share of the blocks' weights that must be quantized.")]
Bits = Annotated[
    float | None, typer.Option(help="Not one scheme everywhere: the best mix in so many stored bits a weight.")
]
Candidates = Annotated[str, typer.Option(help="Widths that --bits and --max-kld may mix.")]
MaxKld = Annotated[float | None, typer.Option(help="Largest mean KL to the original, in nats a token.")]
HeldKld = Annotated[
    float | None,
    typer.Option("--max-kld", help="Largest mean KL to the original, in nats a token: bits are raised to hold it."),
]
MaxPpl = Annotated[str | None, typer.Option(metavar="P%", help="Largest rise of perplexity, such as 2%.")]
EvalText = Annotated[Path | None, typer.Option(help="Held-out text to judge on; default: packaged.")]
EvalWindows = Annotated[int, typer.Option(help="Windows of 1024 tokens to judge on.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the folder if it exists.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the report here too, as JSON.")]
Html = Annotated[Path | None, typer.Option("--report", help="Write the report here too, as one HTML page.")]


def percent(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        return float(text.removesuffix("%"))
    except ValueError:
        raise InputError(f"--max-ppl-increase {text!r} is not a percentage such as 2%") from None


def widths(text: str) -> tuple[int, ...]:
    """The candidates that "2,3,4" writes. Raises InputError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise InputError(f"--candidates {text!r} is not a list of bits such as 3,4,6")
    return tuple(int(part) for part in parts)


def check_files(*wanted: Path | None) -> None:
    """Raise InputError for a file that can't be written: before the long work, not after it."""
    for path in wanted:
        reason = None if path is None else "it is a folder" if path.is_dir() else why_not_writable(path)
        if reason:
            raise InputError(f"{path} can't be written, since {reason}; choose another file")


def copy_to(written: Path, wanted: Path | None) -> None:
    if wanted is not None:
        write_file(wanted, written.read_bytes())


def write_file(path: Path, content: bytes) -> None:
    """Raises InputError where the file can't be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise InputError(f"{path} could not be written ({error.strerror}); choose another file") from error


def raise_failed(reports: list[Report]) -> None:
    failed = [
        f"{report.recipe} has {gate.name} {gate.value:.4g}, and {gate.limit:.4g} was asked for"
        + (f": {report.budget.nearest}" if report.budget and gate.name == "max-kld" else "")
        for report in reports
        for gate in report.gates
        if not gate.passed
    ]
    if failed:
        raise GateError("; ".join(failed))
