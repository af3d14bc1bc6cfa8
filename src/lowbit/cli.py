"""The command: verbs and options, tables and progress; what they do stands in verbs.py.

Exit code 0 when everything asked for holds, 2 for input that cannot work, 3 for a gate that failed, 1 after Ctrl-C.
"""

import logging
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from transformers.utils import logging as transformers_logging

from lowbit import judge
from lowbit.errors import GateError, InputError, LowbitError
from lowbit.inspection import inspect_checkpoint
from lowbit.model.recipe import METHODS, Recipe, default_method
from lowbit.model.select import Rule
from lowbit.numerics.scheme import GRAMMAR, QuantScheme
from lowbit.observe.ranges import OBSERVERS
from lowbit.options import Calibration, Evaluation, Gates
from lowbit.report import Report
from lowbit.terminal import Bar, comparison_table, contents_table, report_text, samples_text, scores_text
from lowbit.verbs import Conditions, compare, evaluate, quantize

app = typer.Typer(
    help="Quantize a Hugging Face language model, measure what it cost, and write files that other programs load.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_STDOUT, _STDERR = Console(soft_wrap=False), Console(stderr=True)

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
MaxKld = Annotated[float | None, typer.Option(help="Largest mean KL to the original, in nats a token.")]
MaxPpl = Annotated[str | None, typer.Option(metavar="P%", help="Largest rise of perplexity, such as 2%.")]
EvalText = Annotated[Path | None, typer.Option(help="Held-out text to judge on; default: packaged.")]
EvalWindows = Annotated[int, typer.Option(help="Windows of 1024 tokens to judge on.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the folder if it exists.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the report here too, as JSON.")]
Html = Annotated[Path | None, typer.Option("--report", help="Write the report here too, as one HTML page.")]


@app.command("quantize")
def quantize_command(
    model: Model,
    out: Out,
    scheme: Annotated[str, typer.Option(help=GRAMMAR)] = "w4a16-g64",
    method: Annotated[
        str | None, typer.Option(help=f"{', '.join(METHODS)}; default: gptq, or rtn for nf4, fp4, fp8.")
    ] = None,
    calibration: CalibrationText = None,
    samples: Samples = 128,
    seq_len: SeqLen = 512,
    seed: Seed = 0,
    device: Device = "auto",
    ignore: Annotated[list[str], typer.Option(metavar="GLOB", help="Leave matching layers as they are.")] = [],  # noqa: B006
    rule: Annotated[list[str], typer.Option(metavar="GLOB=SCHEME", help="Another scheme for matching layers.")] = [],  # noqa: B006
    observer: Annotated[str, typer.Option(help=f"For static activations: {', '.join(OBSERVERS)}.")] = "mse",
    min_coverage: MinCoverage = 0.9,
    max_kld: MaxKld = None,
    max_ppl_increase: MaxPpl = None,
    no_eval: Annotated[bool, typer.Option("--no-eval", help="Measure nothing.")] = False,
    eval_text: EvalText = None,
    eval_windows: EvalWindows = 20,
    overwrite: Overwrite = False,
    json: Json = None,
    report: Html = None,
) -> None:
    """Quantize MODEL into a folder that transformers, vLLM and lowbit load, with a report of what it cost."""
    parsed = QuantScheme.parse(scheme)
    rules = (*(Rule.parse(text) for text in rule), *(Rule(glob, None) for glob in ignore))
    recipe = Recipe(parsed, method or default_method(parsed), rules, observer)
    with Bar(_STDERR) as bar:
        conditions = Conditions(
            Calibration(calibration, samples, seq_len, seed),
            None if no_eval else Evaluation(eval_text, eval_windows),
            Gates(min_coverage, max_kld, _percent(max_ppl_increase)),
            device,
            overwrite,
            bar.show,
        )
        result = quantize(model, out, recipe, conditions)
    _STDOUT.print(report_text(result))
    _copy(out / "report.json", json)
    _copy(out / "report.html", report)
    _STDOUT.print(f"wrote {out} and {report or out / 'report.html'}", soft_wrap=True)
    _raise_failed([result])


@app.command("compare")
def compare_command(
    model: Model,
    out: Out,
    recipes: Annotated[
        str, typer.Option(help="METHOD:SCHEME,METHOD:SCHEME,...")
    ] = "rtn:w8a8,rtn:w4a16-g64,gptq:w4a16-g64",
    calibration: CalibrationText = None,
    samples: Samples = 128,
    seq_len: SeqLen = 512,
    seed: Seed = 0,
    device: Device = "auto",
    min_coverage: MinCoverage = 0.9,
    max_kld: MaxKld = None,
    max_ppl_increase: MaxPpl = None,
    eval_text: EvalText = None,
    eval_windows: EvalWindows = 20,
    overwrite: Overwrite = False,
    json: Json = None,
    report: Html = None,
) -> None:
    """Quantize MODEL by several recipes: one run, one table, one page; each result in its own folder under OUT."""
    parsed = [Recipe.parse(text.strip()) for text in recipes.split(",")]
    with Bar(_STDERR) as bar:
        conditions = Conditions(
            Calibration(calibration, samples, seq_len, seed),
            Evaluation(eval_text, eval_windows),
            Gates(min_coverage, max_kld, _percent(max_ppl_increase)),
            device,
            overwrite,
            bar.show,
        )
        results = compare(model, parsed, out, conditions)
    _STDOUT.print(comparison_table(results), samples_text(results))
    _copy(out / "report.json", json)
    _copy(out / "report.html", report)
    _STDOUT.print(f"wrote {out} and {report or out / 'report.html'}", soft_wrap=True)
    _raise_failed(results)


@app.command("evaluate")
def evaluate_command(
    model: Model,
    reference: Annotated[
        str | None, typer.Option(metavar="ORIGINAL", help="The model to measure the distance to.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Held-out text; default: packaged.")] = None,
    windows: EvalWindows = 20,
    tasks: Annotated[str, typer.Option(help="lm-eval tasks, such as hellaswag,piqa.")] = "",
    limit: Annotated[int | None, typer.Option(help="Examples per task.")] = None,
    task_path: Annotated[Path | None, typer.Option(help="A folder with more lm-eval task files.")] = None,
    device: Device = "auto",
    json: Json = None,
) -> None:
    """Measure MODEL: perplexity, distance from its original, lm-eval tasks."""
    named = tuple(name.strip() for name in tasks.split(",") if name.strip())
    with Bar(_STDERR) as bar:
        wanted = judge.Tasks(named, limit, task_path) if named else None
        scores = evaluate(model, reference, Evaluation(text, windows), wanted, device, bar.show)
    _STDOUT.print(scores_text(scores))
    if json is not None:
        json.write_text(scores.to_json() + "\n", encoding="utf-8")


@app.command("inspect")
def inspect_command(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A folder, hub id or .gguf file.")],
) -> None:
    """List what a checkpoint holds: every tensor with its shape, dtype, bytes and scheme."""
    _STDOUT.print(contents_table(inspect_checkpoint(path)))


def _percent(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        return float(text.removesuffix("%"))
    except ValueError:
        raise InputError(f"--max-ppl-increase {text!r} is not a percentage such as 2%") from None


def _copy(written: Path, wanted: Path | None) -> None:
    if wanted is not None:
        wanted.parent.mkdir(parents=True, exist_ok=True)
        wanted.write_bytes(written.read_bytes())


def _raise_failed(reports: list[Report]) -> None:
    failed = [
        f"{report.recipe} has {gate.name} {gate.value:.4g}, and {gate.limit:.4g} was asked for"
        for report in reports
        for gate in report.gates
        if not gate.passed
    ]
    if failed:
        raise GateError("; ".join(failed))


def main() -> None:
    """Run the command; turn lowbit's exceptions into a sentence and an exit code."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").setLevel(logging.ERROR)
    warnings.simplefilter("default")
    try:
        app()
    except GateError as error:
        _fail("limit not held", error, 3)
    except LowbitError as error:
        _fail("error", error, 2)


def _fail(kind: str, error: LowbitError, code: int) -> None:
    _STDERR.print(f"[bold red]{kind}:[/] ", end="")
    _STDERR.print(str(error), markup=False, highlight=False, soft_wrap=True)
    sys.exit(code)
