"""Measure recipes on one model: quantize, judge on held-out text, write a row each with every window's KL.

All recipes of a run see the same calibration tokens and are judged on the same windows, so that two rows can be
compared window by window (`bench/accuracy/table.py` prints the paired standard error).

usage:  python bench/accuracy/measure.py MODEL RECIPES.json OUT.json --calibration T --evaluation T [--device cuda]
        RECIPES.json: a list of {"name", "scheme", "method", "gptq": {}, "correction": {}, "learning": {},
        "rotation": {}, "seed"}
        T: a text, or tokens as .safetensors (observe/tokens.py)
"""

import argparse
import copy
import json
import math
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowbit import judge
from lowbit.algorithms.correction import Correction
from lowbit.algorithms.gptq import GptqOptions
from lowbit.model.learn import Learning, learn
from lowbit.model.quantize import Job, batched, quantize_blocks
from lowbit.model.recipe import Recipe
from lowbit.model.rotation import Rotation
from lowbit.model.select import Rule, select
from lowbit.numerics.scheme import QuantScheme
from lowbit.observe.capture import find_blocks
from lowbit.observe.tokens import Tokens, load_tokens


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "recipes", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--part", default="0/1", help="I/N: of the recipes only those whose number is I modulo N")
    return parser.parse_args()


KINDS = {"gptq": GptqOptions, "correction": Correction, "learning": Learning, "rotation": Rotation}


def recipe_of(row: dict) -> Recipe:
    options = {name: kind(**row[name]) for name, kind in KINDS.items() if name in row}
    rules = tuple(Rule(glob, None) for glob in row.get("ignore", ()))
    return Recipe(QuantScheme.parse(row["scheme"]), row.get("method", "gptq"), rules, **options)


def quantized(base, row: dict, tokens: Tokens, device: torch.device):
    """(model, root mean square of its layers' output errors or None, what learning did or None)"""
    model, recipe = copy.deepcopy(base), recipe_of(row)
    selection = select(model, find_blocks(model)[0], recipe.scheme, recipe.rules)
    log = quantize_blocks(
        model, Job(recipe, selection, list(batched(tokens.ids, 8192)), torch.bfloat16, device, hidden_device=device)
    )
    learned = learn(model, base, tokens.ids, recipe.learning) if recipe.learning else None
    errors = [record.output_error**2 for record in log.records if record.output_error is not None]
    return model, math.sqrt(sum(errors) / len(errors)) if errors else None, learned


def main() -> None:
    options = arguments()
    device = torch.device(options.device)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval().to(device)
    held_out = load_tokens(options.evaluation, tokenizer, options.windows, options.seq_len, 0)
    reference = judge.Reference.of(base, held_out)
    index, parts = map(int, options.part.split("/"))
    rows = []
    for row in json.loads(options.recipes.read_text())[index::parts]:
        tokens = load_tokens(options.calibration, tokenizer, options.samples, options.seq_len, row.get("seed", 0))
        started = time.perf_counter()
        model, output_error, learned = quantized(base, row, tokens, device)
        seconds = time.perf_counter() - started
        means = judge.window_means(model, reference)
        kld = means[:, 2]
        found = {
            "kld": kld.mean().item(),
            "kld_stderr": (kld.std() / math.sqrt(len(kld))).item(),
            "perplexity": math.exp(means[:, 0].mean()),
            "perplexity_reference": math.exp(means[:, 1].mean()),
            "top1": means[:, 3].mean().item(),
            "seconds": round(seconds, 1),
            "output_error": output_error,
        }
        print(f"{row['name']:44s} KL {found['kld']:.4f} +- {found['kld_stderr']:.4f}  ppl {found['perplexity']:7.2f}  "
              f"top-1 {found['top1']:.3f}  out {output_error or 0:.4f}  {seconds:.1f} s  {learned or ''}",
              flush=True)  # fmt: skip
        rows.append(row | found | {
            "calibration": tokens.hash, "evaluation": held_out.hash, "device": device_name(device),
            "torch": torch.__version__, "windows": [round(value, 6) for value in kld.tolist()],
        })  # fmt: skip
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
        del model


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


if __name__ == "__main__":
    main()
