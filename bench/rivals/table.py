"""Print committed rows as a table: those of side_by_side.py (a list), or of compare.py and data_free.py (runs).

usage:  python bench/rivals/table.py bench/results/side_by_side_h200.json [bench/results/data_free_rivals.json ...]

Rows of side_by_side.py: the latest of each model, scheme, tool, method and seed. The column after KL is what the tool's
KL is above that of lowbit's method of the same class (PEER), with its paired standard error over windows: above zero,
lowbit is closer to the original. Rows of one compare.py file were judged on the same windows; rows of two may not be.
"""

import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

PEER = {"auto-round": "learned"}  # everything else stands beside `aligned`
Row = dict[str, Any]


def latest(rows: Sequence[Row]) -> list[Row]:
    """The last row of each model, scheme, tool, method and seed."""
    return list({tuple(row[k] for k in ("model", "scheme", "tool", "method", "seed")): row for row in rows}.values())


def above_lowbit(row: Row, rows: Sequence[Row]) -> str:
    """KL of row less that of lowbit's method of its class, on the same windows, with the paired standard error."""
    if row["tool"] == "lowbit":
        return ""
    method = PEER.get(row["tool"], "aligned")
    same = ("model", "evaluation", "calibration")
    for other in rows:
        if (other["tool"], other["method"]) == ("lowbit", method) and all(other[k] == row[k] for k in same):
            gaps = [a - b for a, b in zip(row["windows"], other["windows"], strict=True)]
            return f"{statistics.mean(gaps):+.4f} ± {statistics.stdev(gaps) / len(gaps) ** 0.5:.4f}"
    return ""


def seconds(row: Row) -> str:
    """Where rows tell the call of a borrowed machine that they come from, only those of one call were alike busy."""
    call = f", call {row['call']}" if "call" in row else ""
    return f"{row['seconds']:.1f} on {row['device']}{call}"


def side_by_side(rows: Sequence[Row]) -> None:
    print("| model | tool | method | format | KL | above lowbit's | perplexity (original) | top-1 | seconds | seed |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    formats = {"nf4": "NF4, blocks of {}", "hqq": "4 bits, groups of {}, float zero"}
    for row in rows:
        group = row["scheme"].split("-g")[1].split("-")[0]
        shown = formats.get(row["method"], row["scheme"]).format(group)
        print(
            f"| {row['model']} | {row['tool']} {row['version']} | {row['method']} | {shown} "
            f"| {row['kld']:.4f} ± {row['kld_stderr']:.4f} | {above_lowbit(row, rows)} "
            f"| {row['perplexity']:.2f} ({row['perplexity_reference']:.2f}) | {row['top1']:.3f} "
            f"| {seconds(row)} | {row['seed']} |"
        )


def judged(result: Row) -> Iterator[tuple[Row, Row]]:
    """(run, row) of the latest row of each tool and scheme that was judged."""
    found: dict[tuple[str, str], tuple[Row, Row]] = {}
    for run in result.get("runs", [result]):
        for row in run["rows"]:
            if "kld" in row:
                found[row["tool"], row["scheme"]] = run, row
    yield from sorted(found.values(), key=lambda pair: (pair[1]["scheme"], pair[1]["kld"]))


def in_runs(result: Row) -> None:
    print("| tool | version | scheme | calibration | judged on | KL | perplexity (original) | top-1 | seconds |")
    print("|---|---|---|---|---|---|---|---|---|")
    for run, row in judged(result):
        text, samples, length = run.get("calibration", ("none", "", ""))
        calibration = f"{text}, {samples} x {length}" if samples else text
        seconds = row["seconds"] if "seconds" in row else f"{row['cpu_seconds']} of CPU"
        print(
            f"| {row['tool']} | {row['version']} | {row['scheme']} | {calibration} "
            f"| {run['held_out']}, {row['tokens']} tokens | {row['kld']:.4f} ± {row['kld_stderr']:.4f} "
            f"| {row['perplexity']:.2f} ({row['perplexity_reference']:.2f}) | {row['top1_agreement']:.3f} "
            f"| {seconds} |"
        )


def main(paths: list[str]) -> None:
    for path in paths:
        result = json.loads(Path(path).read_text())
        if isinstance(result, list):
            side_by_side(latest(result))
        else:
            in_runs(result)


if __name__ == "__main__":
    main(sys.argv[1:])
