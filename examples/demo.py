"""Quantize a real model by four recipes and show what each of them cost.

usage:  python examples/demo.py MODEL OUT_DIR        (make demo does all of it)
"""

import sys
from pathlib import Path

from rich.console import Console

from lowbit import Calibration, Conditions, Evaluation, Recipe, compare
from lowbit.terminal import Bar, comparison_table, samples_text

RECIPES = ("rtn:w8a8", "rtn:w4a16-g64", "gptq:w4a16-g64", "gptq:w4a16-g64-asym")


def main(model: str, out: str) -> None:
    """One comparison, as a table, a sample of text, and a page."""
    console = Console()
    with Bar(Console(stderr=True)) as bar:
        calibration, evaluation = Calibration(samples=64, seq_len=512), Evaluation(windows=16, seq_len=512)
        conditions = Conditions(calibration, evaluation, overwrite=True, progress=bar.show)
        reports = compare(model, [Recipe.parse(text) for text in RECIPES], out, conditions)
    console.print(comparison_table(reports))
    console.print(samples_text(reports))
    console.print(f"\nThe report: {(Path(out) / 'report.html').absolute()}", soft_wrap=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
