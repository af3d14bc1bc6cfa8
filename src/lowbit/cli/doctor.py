"""`lowbit doctor`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from lowbit.cli.app import STDOUT, app
from lowbit.cli.options import Overwrite
from lowbit.doctor import Diagnosis, examine, fix
from lowbit.errors import GateError, InputError


@app.command("doctor")
def doctor_command(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A checkpoint folder or hub id.")],
    repair: Annotated[bool, typer.Option("--fix", help="Write a repaired copy into --out.")] = False,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="The new folder for --fix.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Say what is wrong with a checkpoint and for whom: transformers, vLLM, SGLang, llama.cpp."""
    if repair and out is None:
        raise InputError("--fix writes a new folder: name it with --out")
    diagnosis = examine(path)
    STDOUT.print(diagnosis_table(diagnosis))
    if repair and out is not None:
        result = fix(path, out, overwrite)
        after = examine(out)
        STDOUT.print(f"wrote {out}: {len(result.schemes)} modules, {result.verified} checked", soft_wrap=True)
        STDOUT.print(diagnosis_table(after))
        diagnosis = after
    if not diagnosis.healthy:
        hurting = sum(bool(finding.hurts) for finding in diagnosis.findings)
        raise GateError(
            f"{hurting} of {len(diagnosis.findings)} findings keep a consumer from reading {diagnosis.name}"
        )


def diagnosis_table(diagnosis: Diagnosis) -> Table:
    """Findings and verdicts."""
    table = Table("consumer", "finding", title=f"{diagnosis.name}: {diagnosis.method}")
    for finding in diagnosis.findings:
        table.add_row(", ".join(finding.hurts) or "-", finding.words + " (--fix repairs it)" * finding.fixable)
    table.add_section()
    for consumer, verdict in diagnosis.verdicts.items():
        table.add_row(consumer, verdict)
    return table
