"""The typer application that verbs register with, its group of benches, and the consoles: results on stdout alone."""

import typer
from rich.console import Console

app = typer.Typer(
    help="Quantize a Hugging Face language model, measure what it cost, and write files that other programs load.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
STDOUT, STDERR = Console(soft_wrap=False), Console(stderr=True)
benches = typer.Typer(help="Measure lowbit's kernels on this machine.", no_args_is_help=True)
app.add_typer(benches, name="bench")
