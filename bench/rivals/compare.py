"""lowbit's GPTQ beside other libraries', on one model, one machine and the same calibration tokens, judged alike.

Each tool runs in a process of its own, one after another, `--rounds` times in turn; what counts are medians and, for
the time, the ratio to llmcompressor. Then one evaluator puts each tool's dequantized weights into the float32 original
and measures the distance on held-out text.

usage:  python bench/rivals/compare.py --model MODEL --text TRAIN.txt --held-out VALID.txt --envs ENVS --work DIR \
            [--schemes w4a16-g64,w4a16-g64-asym] [--rounds 1] [--windows 20] --out bench/results/gptq_rivals.json
ENVS holds the environments llmc and gptqm that README.md describes.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from lowbit import judge, load
from lowbit.io.source import load_float, load_tokenizer, open_source
from lowbit.nn.linear import QuantLinear
from lowbit.observe.tokens import load_tokens

HERE = Path(__file__).parent
RIVALS = {"llmcompressor": ("llmc", "run_llmcompressor.py"), "gptqmodel": ("gptqm", "run_gptqmodel.py")}


def run(command: list[str]) -> str:
    """Standard output of a command that runs on every core."""
    environment = os.environ | {"OMP_NUM_THREADS": str(os.cpu_count())}
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout


def run_rival(tool: str, args: argparse.Namespace, scheme: str, tokens: Path) -> dict[str, Any]:
    """The record of one rival's run; its weights are left in work/TOOL-SCHEME."""
    environment, script = RIVALS[tool]
    python = args.envs / environment / "bin" / "python"
    out = args.work / f"{tool}-{scheme}"
    command = [python, HERE / script, "--model", args.model, "--tokens", tokens, "--scheme", scheme, "--out", out]
    return json.loads(run([str(part) for part in command]).strip().splitlines()[-1])


def run_lowbit(args: argparse.Namespace, scheme: str, tokens: Path) -> dict[str, Any]:
    """The record of lowbit's run, its checkpoint left in work/lowbit-SCHEME; seconds are the report's own."""
    out = args.work / f"lowbit-{scheme}"
    command = [
        sys.executable,
        "-m",
        "lowbit",
        "quantize",
        args.model,
        "-o",
        out,
        "--scheme",
        scheme,
        "--method",
        "gptq",
    ]
    command += ["--calibration", tokens, "--no-eval", "--overwrite", "--device", "cpu"]
    run([str(part) for part in command])
    report = json.loads((out / "report.json").read_text())
    return {"tool": "lowbit", "version": report["versions"]["lowbit"], "scheme": scheme} | {
        key: report[key] for key in ("seconds", "peak_memory_bytes")
    }


def weights_of(tool: str, folder: Path) -> dict[str, torch.Tensor]:
    """Parameter name -> float32 weight [N, K] that the quantized model computes with."""
    if tool != "lowbit":
        return load_file(folder / "dequantized.safetensors")
    model = load(folder, torch.float32)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    return {f"{name}.weight": layer.packed.dequantize() for name, layer in layers.items()}


@torch.no_grad()
def measured(original: nn.Module, reference: judge.Reference, weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Fidelity of the original with `weights` in their places; the original is left as it was."""
    kept = {name: original.get_parameter(name).clone() for name in weights}
    for name, weight in weights.items():
        original.get_parameter(name).copy_(weight)
    found = judge.fidelity(original, reference)  # type: ignore[arg-type]
    for name, weight in kept.items():
        original.get_parameter(name).copy_(weight)
    names = ("perplexity_reference", "perplexity", "kld", "kld_stderr", "top1_agreement", "tokens")
    return {name: getattr(found, name) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--model", "--text", "--held-out", "--envs", "--work", "--out"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--schemes", default="w4a16-g64")
    parser.add_argument("--tools", default="lowbit,llmcompressor,gptqmodel")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--windows", type=int, default=20)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    tokens = args.work / "tokens.safetensors"
    common = ["--model", args.model, "--text", args.text, "--out", tokens]
    run([str(part) for part in [sys.executable, HERE / "calibration_tokens.py", *common]])
    rows = [row for scheme in args.schemes.split(",") for row in timed(args, scheme, tokens)]
    with open_source(args.model) as source:
        original, tokenizer = load_float(source, torch.float32), load_tokenizer(source)
    held_out = load_tokens(args.held_out, tokenizer, args.windows, 1024, seed=0)
    reference = judge.Reference.of(original, held_out)
    for row in rows:
        row |= measured(original, reference, weights_of(row["tool"], args.work / f"{row['tool']}-{row['scheme']}"))
        print(json.dumps(row), flush=True)
    machine = {"cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__}
    result = {"machine": machine, "calibration": [args.text.name, 128, 512], "held_out": args.held_out.name}
    args.out.write_text(json.dumps(result | {"rows": rows}, indent=1) + "\n")


def timed(args: argparse.Namespace, scheme: str, tokens: Path) -> list[dict[str, Any]]:
    """One row a tool: its last record, with the median of its seconds and their ratio to llmcompressor's."""
    tools = args.tools.split(",")
    records: dict[str, list[dict[str, Any]]] = {tool: [] for tool in tools}
    for _ in range(args.rounds):
        for tool in tools:
            one = run_lowbit(args, scheme, tokens) if tool == "lowbit" else run_rival(tool, args, scheme, tokens)
            records[tool].append(one)
            print(json.dumps(one), file=sys.stderr, flush=True)
    seconds = {tool: statistics.median(record["seconds"] for record in found) for tool, found in records.items()}
    base = seconds.get("llmcompressor")
    return [
        records[tool][-1] | {"seconds": round(seconds[tool], 1), "rounds": args.rounds}
        | ({"time_to_llmcompressor": round(seconds[tool] / base, 3)} if base else {})
        for tool in tools
    ]  # fmt: skip


if __name__ == "__main__":
    main()
