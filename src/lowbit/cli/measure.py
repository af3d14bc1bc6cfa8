"""`lowbit evaluate` and `lowbit inspect`."""

from pathlib import Path
from typing import Annotated

import typer

from lowbit import judge
from lowbit.cli.app import STDERR, STDOUT, app
from lowbit.cli.options import Device, EvalWindows, Json, Model, check_files, write_file
from lowbit.inspection import inspect_checkpoint
from lowbit.options import Evaluation
from lowbit.terminal import Bar, contents_table, scores_text
from lowbit.verbs import evaluate


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
    check_files(json)
    named = tuple(name.strip() for name in tasks.split(",") if name.strip())
    with Bar(STDERR, device) as bar:
        wanted = judge.Tasks(named, limit, task_path) if named else None
        scores = evaluate(model, reference, Evaluation(text, windows), wanted, device, bar.show)
    STDOUT.print(scores_text(scores))
    if json is not None:
        write_file(json, f"{scores.to_json()}\n".encode())


@app.command("inspect")
def inspect_command(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A folder, hub id or .gguf file.")],
) -> None:
    """List what a checkpoint holds: every tensor with its shape, dtype, bytes and scheme."""
    STDOUT.print(contents_table(inspect_checkpoint(path)))
