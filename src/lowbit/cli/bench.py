"""`lowbit bench kernels`."""

import subprocess
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table

from lowbit.cli.app import STDERR, STDOUT, benches
from lowbit.errors import InputError
from lowbit.kernels import bench


def _chosen(text: str, known: list[str], what: str) -> list[str]:
    chosen = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in chosen if name not in known]:
        raise InputError(f"unknown {what} {', '.join(unknown)}; choose from {', '.join(known)}")
    return chosen


@benches.command("kernels")
def kernels_command(
    shapes: Annotated[str, typer.Option(help="Shapes of Llama-3 layers.")] = ",".join(bench.SHAPES),
    schemes: Annotated[str, typer.Option(help="Schemes of the weights.")] = ",".join(bench.SCHEMES),
    tokens: Annotated[str, typer.Option(help="Rows of x.")] = ",".join(map(str, bench.TOKENS)),
    peers: Annotated[bool, typer.Option("--peers", help="Every installed peer, not cuBLAS alone.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the rows here as JSON, and the chart beside it.")] = None,
) -> None:
    """Microseconds, share of the ceiling, and ratio to cuBLAS and to each installed peer, per shape and token count."""
    if not torch.cuda.is_available():
        raise InputError("lowbit bench kernels times GPU kernels, and torch sees no CUDA device here")
    named = _chosen(shapes, list(bench.SHAPES), "shape")
    wanted = _chosen(schemes, list(bench.SCHEMES), "scheme")
    counts = [int(count) for count in _chosen(tokens, [str(n) for n in range(1, 16385)], "token count")]
    ceilings = bench.measure_ceilings()
    STDERR.print(str(ceilings), markup=False)
    rows: list[bench.Row] = []
    for scheme in wanted:
        for shape in named:
            found = list(bench.rows_for(shape, scheme, counts, ceilings, peers))
            rows += found
            STDOUT.print(_table(f"{shape} {found[0].N} x {found[0].K}  {scheme}", found))
            if out is not None:
                bench.write_results(out, ceilings, rows, _commit())
    if out is not None:
        out.with_suffix(".svg").write_text(bench.roofline_svg(ceilings, rows), encoding="utf-8")


def _table(title: str, rows: list[bench.Row]) -> Table:
    """Microseconds by kernel and M; of ours, the share of the ceiling and how much faster than cuBLAS."""
    counts = sorted({row.M for row in rows})
    cublas = {row.M: row.us for row in rows if row.kernel == "cublas bf16"}
    table = Table("kernel", *(f"M={count}" for count in counts), title=title, title_justify="left")
    for kernel in dict.fromkeys(row.kernel for row in rows):
        cells = {row.M: _cell(row, cublas.get(row.M)) for row in rows if row.kernel == kernel}
        table.add_row(kernel, *(cells.get(count, "") for count in counts))
    return table


def _cell(row: bench.Row, cublas_us: float | None) -> str:
    if row.error is None:
        return f"{row.us:.1f}"
    ratio = f" {cublas_us / row.us:.2f}x" if cublas_us else ""
    return f"{row.us:.1f} {row.share:.0%}{ratio}"


def _commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"
