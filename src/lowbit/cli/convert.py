"""`lowbit convert`."""

import json as json_module
from typing import Annotated

import typer

from lowbit.cli.app import STDERR, STDOUT, app
from lowbit.cli.options import Json, Model, Out, Overwrite
from lowbit.io.conversion import Options, verdict
from lowbit.io.convert import FORMATS, convert
from lowbit.numerics.scheme import QuantScheme
from lowbit.terminal import Bar


@app.command("convert")
def convert_command(
    model: Model,
    out: Out,
    format: Annotated[str, typer.Option("--format", help=f"One of {', '.join(FORMATS)}.")],
    lossy: Annotated[
        str | None, typer.Option(metavar="WAY", help="requantize: round again what the format can't hold.")
    ] = None,
    scheme: Annotated[str | None, typer.Option(help="What --lossy requantize rounds to.")] = None,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Leave the second decoding out.")] = False,
    overwrite: Overwrite = False,
    json: Json = None,
) -> None:
    """Write MODEL in another format, with the same codes: bit-equal by a second decoder, or an error."""
    with Bar(STDERR) as bar:
        parsed = QuantScheme.parse(scheme) if scheme else None
        options = Options(lossy, parsed, not no_verify, overwrite=overwrite, progress=bar.show)
        result = convert(model, out, format, options)
    for words in result.warnings:
        STDERR.print(f"warning: {words}", markup=False, soft_wrap=True)
    if result.requantized:
        STDOUT.print(f"rounded again: {len(result.requantized)} modules, the first is {result.requantized[0]}")
    checked = f"{result.verified} checked by a second decoder" if result.verified else "not checked"
    STDOUT.print(f"wrote {out}: {len(result.schemes)} modules as {format}, {checked}", soft_wrap=True)
    if json is not None:
        json.write_text(json_module.dumps(verdict(result), indent=1) + "\n", encoding="utf-8")
