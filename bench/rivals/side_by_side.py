"""lowbit beside other toolkits: one model, the same calibration tokens, the same format, one judge; a row each.

Each tool runs in a process of its own, one after another in the order of --runs, and leaves the float parameters that
its result computes with. They are put into the original, in float32, whose KL is measured on held-out windows; rows
keep every window's KL, so that two of them can be compared pair by pair (table.py). Rows are written as they come, and
rows of an OUT.json that is there already are kept.

usage:  python bench/rivals/side_by_side.py MODEL OUT.json --calibration TOKENS.safetensors \
            --evaluation TOKENS.safetensors --work DIR [--scheme w4a16-g64-asym] [--device cuda] [--runs A,B,...] \
            [--python TOOL=PYTHON]... [--beside "what else ran on the machine"]
        a run is TOOL:METHOD, of RUNS below; --python names another environment for a tool (README.md)
"""

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lowbit import judge
from lowbit.io.source import load_float, open_source
from lowbit.observe.tokens import Tokens

HERE = Path(__file__).parent
SCRIPTS = {
    "lowbit": "run_lowbit.py",
    "llmcompressor": "run_llmcompressor.py",
    "gptqmodel": "run_gptqmodel.py",
    "auto-round": "run_autoround.py",
    "bitsandbytes": "run_data_free.py",
    "hqq": "run_data_free.py",
}
RUNS = (
    "lowbit:aligned,llmcompressor:gptq,gptqmodel:gptq,llmcompressor:awq,"  # no gradients
    "lowbit:learned,auto-round:autoround,"  # with them
    "bitsandbytes:nf4,hqq:hqq"  # without text
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    for name in ("--calibration", "--evaluation", "--work"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--scheme", default="w4a16-g64-asym")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", default=RUNS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--python", action="append", default=[], metavar="TOOL=PYTHON")
    parser.add_argument("--windows", type=int, help="judge on that many of the evaluation's windows")
    parser.add_argument("--limit", type=float, help="seconds after which a run is given up")
    parser.add_argument("--beside", default="nothing", help="what else ran on the machine, for the rows")
    parser.add_argument("--commit", help="lowbit's commit, where this is no git checkout")
    return parser.parse_args()


def run_tool(options: argparse.Namespace, tool: str, method: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The record of one tool's run and the parameters that it left; raises SubprocessError where it failed."""
    pythons = dict(entry.split("=", 1) for entry in options.python)
    out = options.work / f"{tool}-{method}"
    command = [
        pythons.get(tool, sys.executable), HERE / SCRIPTS[tool], "--model", options.model,
        "--tokens", options.calibration, "--scheme", options.scheme, "--method", method,
        "--device", options.device, "--seed", options.seed, "--out", out,
    ]  # fmt: skip
    with (options.work / f"{tool}-{method}.log").open("w") as log:
        printed = subprocess.run(
            [str(part) for part in command], check=True, stdout=subprocess.PIPE, stderr=log, timeout=options.limit
        )
    parameters = load_file(out / "dequantized.safetensors")
    (out / "dequantized.safetensors").unlink()  # half a gigabyte each
    return json.loads(printed.stdout.strip().splitlines()[-1]), parameters


@torch.no_grad()
def judged(original: nn.Module, reference: judge.Reference, parameters: dict[str, Tensor]) -> dict[str, Any]:
    """Distance of the original with `parameters` in their places; the original is left as it was."""
    kept = {name: original.get_parameter(name).clone() for name in parameters}
    for name, value in parameters.items():
        original.get_parameter(name).copy_(value)
    means = judge.window_means(original, reference)  # type: ignore[arg-type]
    for name, value in kept.items():
        original.get_parameter(name).copy_(value)
    kld = means[:, 2]
    return {
        "kld": kld.mean().item(),
        "kld_stderr": (kld.std() / math.sqrt(len(kld))).item(),
        "perplexity": math.exp(means[:, 0].mean()),
        "perplexity_reference": math.exp(means[:, 1].mean()),
        "top1": means[:, 3].mean().item(),
        "windows": [round(value, 6) for value in kld.tolist()],
    }


def commit() -> str:
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True, check=True
    )
    return found.stdout.strip()


def main() -> None:
    options = arguments()
    options.work.mkdir(parents=True, exist_ok=True)
    with open_source(options.model) as source:
        original = load_float(source, torch.float32).to(options.device)
    held_out = Tokens(load_file(options.evaluation)["input_ids"][: options.windows], options.evaluation.name)
    reference = judge.Reference.of(original, held_out)
    calibration = hashlib.sha256(load_file(options.calibration)["input_ids"].numpy().tobytes()).hexdigest()
    common = {
        "model": options.model.name, "calibration": calibration, "evaluation": held_out.hash,
        "evaluated": list(held_out.ids.shape), "transformers": version("transformers"), "beside": options.beside,
        "cores": os.cpu_count(), "commit": options.commit or commit(),
    }  # fmt: skip
    rows = json.loads(options.out.read_text()) if options.out.exists() else []
    failed = []
    for run in options.runs.split(","):
        tool, _, method = run.partition(":")
        started = time.perf_counter()
        try:
            record, parameters = run_tool(options, tool, method)
        except subprocess.SubprocessError as error:
            failed.append(run)
            print(f"{run} failed ({error}): see {options.work}/{tool}-{method}.log", flush=True)
            continue
        ended = time.perf_counter()
        row = record | common | judged(original, reference, parameters)
        row["seconds_judging"] = round(time.perf_counter() - ended, 2)  # the same work for each: tells how busy it was
        print(f"{options.model.name:16s} {run:26s} KL {row['kld']:.4f} +- {row['kld_stderr']:.4f}  ppl "
              f"{row['perplexity']:.2f} ({row['perplexity_reference']:.2f})  {row['seconds']} s, "
              f"{time.perf_counter() - started:.0f} s with start and judging", flush=True)  # fmt: skip
        rows.append(row)
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
