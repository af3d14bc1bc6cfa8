"""Bits where they pay: one scheme everywhere against a mix of the same size, and the mix's whole curve.

Each run is `lowbit.quantize` as a user calls it, on the same calibration and held-out tokens; a row holds stored bits a
weight, measured KL with its standard error, expected KL, seconds of the search and of the whole run.

usage:  python bench/accuracy/budget.py MODEL OUT.json --calibration T --evaluation T [--runs w4a16-g64,w4a16-g64@4.25]
        a run is SCHEME, SCHEME@BITS or SCHEME<KL (raise bits until the gate holds)
"""

import argparse
import json
import platform
import subprocess
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch

import lowbit
from lowbit import Calibration, Conditions, Evaluation, Gates, QuantScheme, Recipe, Report


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--runs", default="w4a16-g64,w4a16-g64@4.25,w4a16-g64@3.25,w3a16-g64")
    parser.add_argument("--candidates", default="2,3,4,6,8")
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def quantized(options: argparse.Namespace, text: str) -> tuple[Report, float]:
    """(report, seconds) of one run."""
    bits = float(text.partition("@")[2]) if "@" in text else None
    limit = float(text.partition("<")[2]) if "<" in text else None
    scheme = QuantScheme.parse(text.partition("@")[0].partition("<")[0])
    conditions = Conditions(
        Calibration(options.calibration, options.samples, options.seq_len),
        Evaluation(options.evaluation, options.windows, sample_tokens=0),
        Gates(max_kld=limit),
        options.device,
    )
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        recipe = Recipe(scheme, options.method)
        candidates = [int(part) for part in options.candidates.split(",")]
        report = lowbit.quantize(options.model, Path(folder) / "out", recipe, conditions, bits, candidates)
        return report, time.perf_counter() - started


def main() -> None:
    options, rows = arguments(), []
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
    where = torch.cuda.get_device_name() if options.device.startswith("cuda") else f"CPU ({platform.machine()})"
    for text in options.runs.split(","):
        report, seconds = quantized(options, text)
        fidelity, budget = report.fidelity, report.budget
        assert fidelity is not None
        row = {
            "run": text, "method": options.method, "candidates": options.candidates,
            "bytes": report.bytes_after, "kld": fidelity.kld,
            "kld_stderr": fidelity.kld_stderr, "perplexity": fidelity.perplexity, "top1": fidelity.top1_agreement,
            "seconds": round(seconds, 1), "passed": report.passed, "model": options.model.name, "seed": report.seed,
            "evaluation": fidelity.text_hash, "samples": options.samples, "seq_len": options.seq_len,
            "device": where, "torch": torch.__version__, "commit": commit.strip(),
        }  # fmt: skip
        if budget is not None:
            schemes = [group.scheme for group in budget.groups]
            row |= {
                "bits": budget.bits,
                "groups": {scheme: schemes.count(scheme) for scheme in sorted(set(schemes))},
                "runs": [asdict(run) for run in budget.runs],
                "curve": [asdict(point) for point in budget.curve],
            }
        print(f"{text:22s} {options.method}  {budget.bits if budget else 0:.3f} bits  KL {fidelity.kld:.4f} "
              f"+- {fidelity.kld_stderr:.4f}  {row['bytes'] / 1e6:.1f} MB  {seconds:.0f} s  {row.get('groups', '')}",
              flush=True)  # fmt: skip
        rows.append(row)
        options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
