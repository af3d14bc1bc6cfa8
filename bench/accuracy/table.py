"""Print rows of measure.py as a table, each beside the first row of the same scheme, window by window.

usage:  python bench/accuracy/table.py ROWS.json...
The last column is the mean difference of KL to that first row and its paired standard error, over windows.
"""

import json
import statistics
import sys
from pathlib import Path


def paired(row: dict, base: dict) -> str:
    """The mean and the standard error of row's KL less base's, over the windows that both were judged on."""
    if row is base or row["evaluation"] != base["evaluation"]:
        return ""
    gaps = [a - b for a, b in zip(row["windows"], base["windows"], strict=True)]
    return f"{statistics.mean(gaps):+.4f} ± {statistics.stdev(gaps) / len(gaps) ** 0.5:.4f}"


def main(paths: list[str]) -> None:
    print("| model | scheme | recipe | KL | perplexity (original) | top-1 | seconds | KL less the first's |")
    print("|---|---|---|---|---|---|---|---|")
    for path in paths:
        first: dict[str, dict] = {}
        for row in json.loads(Path(path).read_text()):
            base = first.setdefault(row["scheme"], row)
            print(
                f"| {row.get('model', '')} | {row['scheme']} | {row['name']} "
                f"| {row['kld']:.4f} ± {row['kld_stderr']:.4f} "
                f"| {row['perplexity']:.2f} ({row['perplexity_reference']:.2f}) | {row['top1']:.3f} "
                f"| {row['seconds']} on {row['device']} | {paired(row, base)} |"
            )


if __name__ == "__main__":
    main(sys.argv[1:])
