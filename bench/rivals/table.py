"""Print the committed rows of compare.py and data_free.py as one table: the latest judged row of each tool and scheme.

usage:  python bench/rivals/table.py bench/results/gptq_rivals.json bench/results/data_free_rivals.json

Rows of one file were judged on the same windows; rows of two files may not be. Each file's text is in its own column.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def judged(path: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """(run, row) of the latest row of each tool and scheme that was judged."""
    result = json.loads(path.read_text())
    latest: dict[tuple[str, str], tuple[dict[str, Any], dict[str, Any]]] = {}
    for run in result.get("runs", [result]):
        for row in run["rows"]:
            if "kld" in row:
                latest[row["tool"], row["scheme"]] = run, row
    yield from sorted(latest.values(), key=lambda pair: (pair[1]["scheme"], pair[1]["kld"]))


def main(paths: list[str]) -> None:
    print("| tool | version | scheme | calibration | judged on | KL | perplexity (original) | top-1 | seconds |")
    print("|---|---|---|---|---|---|---|---|---|")
    for path in paths:
        for run, row in judged(Path(path)):
            text, samples, length = run.get("calibration", ("none", "", ""))
            calibration = f"{text}, {samples} x {length}" if samples else text
            seconds = row["seconds"] if "seconds" in row else f"{row['cpu_seconds']} of CPU"
            print(
                f"| {row['tool']} | {row['version']} | {row['scheme']} | {calibration} "
                f"| {run['held_out']}, {row['tokens']} tokens | {row['kld']:.4f} ± {row['kld_stderr']:.4f} "
                f"| {row['perplexity']:.2f} ({row['perplexity_reference']:.2f}) | {row['top1_agreement']:.3f} "
                f"| {seconds} |"
            )


if __name__ == "__main__":
    main(sys.argv[1:])
