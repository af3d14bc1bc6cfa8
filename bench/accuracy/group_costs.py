"""What each group of layers costs at several widths by a method, how unequal the densities of cost are, and what the
best mix at one width's size can gain: the table of docs/budget.md.

usage:  python bench/accuracy/group_costs.py MODEL OUT.json --calibration T [--schemes w3a16-g64,w4a16-g64,w5a16-g64]
        [--methods gptq,rtn-clip] [--samples 24] [--seq-len 512]
        python bench/accuracy/group_costs.py --table OUT.json
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowbit.costs import Probe, costs, fused_groups, group_name
from lowbit.model.allocation import Group, Option, allocate
from lowbit.model.recipe import Recipe
from lowbit.model.select import select
from lowbit.numerics.scheme import QuantScheme
from lowbit.observe.capture import find_blocks
from lowbit.observe.tokens import load_tokens

SCALE_BITS = 16


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--schemes", default="w3a16-g64,w4a16-g64,w5a16-g64")
    parser.add_argument("--methods", default="gptq")
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--seq-len", type=int, default=512)
    return parser.parse_args()


def measure(options: argparse.Namespace) -> None:
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokens = load_tokens(options.calibration, tokenizer, options.samples, options.seq_len, 0)
    ids = tokens.ids[: options.samples]
    schemes = [QuantScheme.parse(text) for text in options.schemes.split(",")]
    selection = select(model, find_blocks(model)[0], schemes[0])
    groups = fused_groups(model, list(selection.schemes), ids[:1])
    weights = [sum(model.get_parameter(f"{name}.weight").numel() for name in group) for group in groups]
    rows = json.loads(options.out.read_text()) if options.out.exists() else []
    for method in options.methods.split(","):
        started = time.perf_counter()
        probe = Probe.on(ids, Recipe(schemes[0], method), torch.bfloat16, lambda *_: None)
        found = costs(model, groups, schemes, probe)
        rows.append({
            "model": options.model.name, "method": method, "schemes": [str(scheme) for scheme in schemes],
            "groups": [group_name(group) for group in groups], "weights": weights, "kld": found,
            "calibration": tokens.hash, "seconds": round(time.perf_counter() - started), "torch": torch.__version__,
        })  # fmt: skip
        options.out.write_text(json.dumps(rows) + "\n")


def best_mix(row: dict, widths: tuple[int, ...]) -> float:
    """The least expected KL at the size of w4 everywhere; 6 and 8 bits follow from 5, or from 4, by 6 dB a bit."""
    schemes = [QuantScheme.parse(text) for text in row["schemes"]]
    size = schemes[0].weights.group_size or 1
    groups = []
    for number, (name, weights) in enumerate(zip(row["groups"], row["weights"], strict=True)):
        cost = {scheme.weights.bits: klds[number] for scheme, klds in zip(schemes, row["kld"], strict=True)}
        cost[6] = cost[5] / 4 if 5 in widths else cost[4] / 16
        cost[8] = cost[6] / 16
        options = [Option(QuantScheme.parse(f"w{bits}a16-g{size}"), weights * (bits + SCALE_BITS / size), cost[bits])
                   for bits in widths]  # fmt: skip
        groups.append(Group((name,), weights, tuple(options)))
    return min(allocate(groups, 4 + SCALE_BITS / size).cost, sum(row["kld"][1]))  # one width, where the walk missed it


def table(path: Path) -> None:
    print("| model | method | arithmetic over geometric mean | one width | 3, 4, 6, 8 | with 5 |")
    print("|---|---|---|---|---|---|")
    for row in json.loads(path.read_text()):
        four, total = row["kld"][1], sum(row["weights"])
        pairs = list(zip(four, row["weights"], strict=True))
        geometric = math.exp(sum(w * math.log(kld / w) for kld, w in pairs) / total)
        cells = [sum(four), best_mix(row, (3, 4, 6, 8)), best_mix(row, (3, 4, 5, 6, 8))]
        shown = " | ".join(f"{cell:.4f}" for cell in cells)
        name = f"{row['model']}, {row['schemes'][1]}"
        print(f"| {name} | {row['method']} | {sum(four) / total / geometric:.2f} | {shown} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--table"]:
        table(Path(sys.argv[2]))
    else:
        measure(arguments())
