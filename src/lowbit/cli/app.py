"""The typer application that every verb registers with, the group of `lowbit bench` commands, and the two consoles: results on stdout, the rest on stderr."""

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
