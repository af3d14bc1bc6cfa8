"""`lowbit bench int8-ladder`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table

from lowbit.cli.app import STDOUT, benches
from lowbit.kernels.int8_bench import RungTime, ladder


@benches.command("int8-ladder")
def int8_ladder_command(
    tokens: Annotated[int, typer.Option("--tokens", "-m", help="Rows of the activations.")] = 4096,
    width: Annotated[int, typer.Option("--out-features", "-n", help="Rows of the weight.")] = 4096,
    columns: Annotated[int, typer.Option("--in-features", "-k", help="Length of a row.")] = 4096,
    device: Annotated[str, typer.Option(help="cuda or cuda:N.")] = "cuda:0",
    out: Annotated[Path | None, typer.Option("--json", help="Write the rows here too.")] = None,
) -> None:
    """Time every rung of the int8 ladder: TOPS, share of the chip's ceiling, and what each instruction gained."""
    rows = ladder(tokens, width, columns, torch.device(device))
    STDOUT.print(_table(rows, f"int8 [{tokens}, {columns}] x [{width}, {columns}] transposed"))
    if out is not None:
        name = torch.cuda.get_device_name(torch.device(device))
        found = {"gpu": name, "torch": torch.__version__, "M": tokens, "N": width, "K": columns}
        out.write_text(json.dumps(found | {"rows": [asdict(row) for row in rows]}, indent=1) + "\n", encoding="utf-8")


def _table(rows: list[RungTime], title: str) -> Table:
    table = Table(title=title)
    for heading in ("rung", "us", "TOPS", "of ceiling", "gain"):
        table.add_column(heading, justify="left" if heading == "rung" else "right")
    for row in rows:
        if row.us is None or row.tops is None:
            table.add_row(row.kernel, row.refusal or "", "", "", "")
            continue
        share = "" if row.share is None else f"{row.share:.1%}"
        gain = "" if row.gain is None else f"{row.gain:.2f}x"
        table.add_row(row.kernel, f"{row.us:.1f}", f"{row.tops:.1f}", share, gain)
    return table
