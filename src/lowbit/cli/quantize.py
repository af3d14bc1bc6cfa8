"""`lowbit quantize` and `lowbit compare`."""

from typing import Annotated

import typer

from lowbit.cli.app import STDERR, STDOUT, app
from lowbit.cli.options import (
    Bits,
    CalibrationText,
    Candidates,
    Device,
    EvalText,
    EvalWindows,
    HeldKld,
    Html,
    Json,
    MaxKld,
    MaxPpl,
    MinCoverage,
    Model,
    Out,
    Overwrite,
    Samples,
    Seed,
    SeqLen,
    check_files,
    copy_to,
    percent,
    raise_failed,
    widths,
)
from lowbit.errors import InputError
from lowbit.model.efforts import EFFORTS, recipe_at
from lowbit.model.recipe import METHODS, Recipe, default_method
from lowbit.model.select import Rule
from lowbit.numerics.scheme import GRAMMAR, QuantScheme
from lowbit.observe.ranges import OBSERVERS
from lowbit.options import Calibration, Evaluation, Gates
from lowbit.terminal import Bar, comparison_table, report_text, samples_text
from lowbit.verbs import Conditions, compare, quantize

DEFAULT_EFFORT = 2  # where the user brings text: three runs, and the closest of them; without, one run of gptq


@app.command("quantize")
def quantize_command(
    model: Model,
    out: Out,
    scheme: Annotated[str, typer.Option(help=GRAMMAR)] = "w4a16-g64",
    method: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(METHODS)}; default: --effort 2 with --calibration, else gptq or rtn."),
    ] = None,
    effort: Annotated[
        int | None,
        typer.Option(help=f"Instead of a method, 0 to 4 ({', '.join(EFFORTS)}), never worse than the one below."),
    ] = None,
    calibration: CalibrationText = None,
    samples: Samples = 128,
    seq_len: SeqLen = 512,
    seed: Seed = 0,
    device: Device = "auto",
    ignore: Annotated[list[str], typer.Option(metavar="GLOB", help="Leave matching layers as they are.")] = [],  # noqa: B006
    rule: Annotated[list[str], typer.Option(metavar="GLOB=SCHEME", help="Another scheme for matching layers.")] = [],  # noqa: B006
    observer: Annotated[str, typer.Option(help=f"For static activations: {', '.join(OBSERVERS)}.")] = "mse",
    bits: Bits = None,
    candidates: Candidates = "2,3,4,5,6,8",
    min_coverage: MinCoverage = 0.9,
    max_kld: HeldKld = None,
    max_ppl_increase: MaxPpl = None,
    no_eval: Annotated[bool, typer.Option("--no-eval", help="Measure nothing.")] = False,
    eval_text: EvalText = None,
    eval_windows: EvalWindows = 20,
    overwrite: Overwrite = False,
    json: Json = None,
    report: Html = None,
) -> None:
    """Quantize MODEL into a folder that transformers, vLLM and lowbit load, with a report of what it cost."""
    check_files(json, report)
    parsed = QuantScheme.parse(scheme)
    rules = (*(Rule.parse(text) for text in rule), *(Rule(glob, None) for glob in ignore))
    if effort is not None and method is not None:
        raise InputError(f"--effort {effort} and --method {method} were both given; give one of them")
    if effort is None and method is None and calibration is not None:
        effort = DEFAULT_EFFORT
    if effort is not None:
        recipe = recipe_at(parsed, effort, rules, observer)
    else:
        recipe = Recipe(parsed, method or default_method(parsed), rules, observer)
    with Bar(STDERR, device) as bar:
        conditions = Conditions(
            Calibration(calibration, samples, seq_len, seed),
            None if no_eval else Evaluation(eval_text, eval_windows),
            Gates(min_coverage, max_kld, percent(max_ppl_increase)),
            device,
            overwrite,
            bar.show,
        )
        result = quantize(model, out, recipe, conditions, bits, widths(candidates))
    STDOUT.print(report_text(result))
    copy_to(out / "report.json", json)
    copy_to(out / "report.html", report)
    STDOUT.print(f"wrote {out} and {report or out / 'report.html'}", soft_wrap=True)
    raise_failed([result])


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
    check_files(json, report)
    parsed = [Recipe.parse(text.strip()) for text in recipes.split(",")]
    with Bar(STDERR, device) as bar:
        conditions = Conditions(
            Calibration(calibration, samples, seq_len, seed),
            Evaluation(eval_text, eval_windows),
            Gates(min_coverage, max_kld, percent(max_ppl_increase)),
            device,
            overwrite,
            bar.show,
        )
        results = compare(model, parsed, out, conditions)
    STDOUT.print(comparison_table(results), samples_text(results))
    copy_to(out / "report.json", json)
    copy_to(out / "report.html", report)
    STDOUT.print(f"wrote {out} and {report or out / 'report.html'}", soft_wrap=True)
    raise_failed(results)
