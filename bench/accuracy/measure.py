"""Measure recipes on one model: quantize, judge on held-out text, write a row each with every window's KL.

All recipes of a run see the same calibration tokens and are judged on the same windows, so that two rows can be
compared window by window (`bench/accuracy/table.py` prints the paired standard error).

usage:  python bench/accuracy/measure.py MODEL RECIPES.json OUT.json --calibration T --evaluation T [--device cuda]
        RECIPES.json: a list of {"name", "scheme", "method", "seed"}, "rules" by glob, and options by the names in KINDS
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
from lowbit.algorithms.joint import Joint
from lowbit.model.learn import Learning, learn
from lowbit.model.quantize import Job, batched, quantize_blocks
from lowbit.model.recipe import Recipe
from lowbit.model.rotation import Rotation
from lowbit.model.select import Rule, select
from lowbit.model.sensitivity import Sensitivity
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
    parser.add_argument("--commit", help="of the code, written into every row")
    parser.add_argument("--part", default="0/1", help="I/N: of the recipes only those whose number is I modulo N")
    return parser.parse_args()


KINDS = {
    "gptq": GptqOptions, "correction": Correction, "learning": Learning, "rotation": Rotation,
    "sensitivity": Sensitivity, "joint": Joint,
}  # fmt: skip


def recipe_of(row: dict) -> Recipe:
    options = {name: kind(**row[name]) for name, kind in KINDS.items() if name in row}
    rules = tuple(Rule(glob, None) for glob in row.get("ignore", ()))
    rules += tuple(Rule(glob, QuantScheme.parse(scheme)) for glob, scheme in row.get("rules", {}).items())
    return Recipe(QuantScheme.parse(row["scheme"]), row.get("method", "gptq"), rules, **options)


def wanted_of(base, tokens: Tokens):
    """The original's logits for windows of `tokens`, made of hidden states that are kept (model/learn.py)."""
    kept = judge.Reference.of(base, tokens)

    @torch.no_grad()
    def wanted(numbers: torch.Tensor) -> torch.Tensor:
        return torch.stack([kept.head(kept.hidden[number].to(kept.device)) for number in numbers.tolist()])

    return wanted


class Solver:
    """Quantizes copies of one model. What was solved last is kept: rows that differ in learning alone start from it."""

    def __init__(self, base, device: torch.device) -> None:
        self.base, self.device = base, device
        self._known: tuple[str, object, float | None] | None = None

    def solved(self, row: dict, recipe: Recipe, tokens: Tokens):
        """(model, root mean square of its layers' output errors or None) before learning; seconds are the caller's."""
        fixed = {name: row[name] for name in sorted(row) if name not in ("name", "learning")}
        key = json.dumps([fixed, "learning" in row, tokens.hash])
        if self._known is None or self._known[0] != key:
            self._known = None
            model = copy.deepcopy(self.base)
            selection = select(model, find_blocks(model)[0], recipe.scheme, recipe.rules)
            seen = len(tokens.ids) - (recipe.learning.apart(len(tokens.ids)) if recipe.learning else 0)
            batches = list(batched(tokens.ids[:seen], 8192))
            job = Job(recipe, selection, batches, torch.bfloat16, self.device, hidden_device=self.device)
            log = quantize_blocks(model, job)
            errors = [record.output_error**2 for record in log.records if record.output_error is not None]
            self._known = key, model, math.sqrt(sum(errors) / len(errors)) if errors else None
        return copy.deepcopy(self._known[1]), self._known[2]

    def quantized(self, row: dict, tokens: Tokens):
        """(model, error as above, what learning did or None, seconds of solving, seconds of learning)"""
        recipe, started = recipe_of(row), time.perf_counter()
        model, output_error = self.solved(row, recipe, tokens)
        solved, learned = time.perf_counter(), None
        if recipe.learning:
            learned = learn(model, self.base, tokens.ids, recipe.learning, wanted=wanted_of(self.base, tokens))
        return model, output_error, learned, solved - started, time.perf_counter() - solved


def main() -> None:
    options = arguments()
    device = torch.device(options.device)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval().to(device)
    held_out = load_tokens(options.evaluation, tokenizer, options.windows, options.seq_len, 0)
    reference = judge.Reference.of(base, held_out)
    index, parts = map(int, options.part.split("/"))
    rows, solver = [], Solver(base, device)
    for row in json.loads(options.recipes.read_text())[index::parts]:
        tokens = load_tokens(options.calibration, tokenizer, options.samples, options.seq_len, row.get("seed", 0))
        model, output_error, learned, solving, learning = solver.quantized(row, tokens)
        means = judge.window_means(model, reference)
        kld = means[:, 2]
        found = {
            "kld": kld.mean().item(),
            "kld_stderr": (kld.std() / math.sqrt(len(kld))).item(),
            "perplexity": math.exp(means[:, 0].mean()),
            "perplexity_reference": math.exp(means[:, 1].mean()),
            "top1": means[:, 3].mean().item(),
            "seconds": round(solving + learning, 1),
            "seconds_learning": round(learning, 1),
            "output_error": output_error,
        }
        print(f"{row['name']:44s} KL {found['kld']:.4f} +- {found['kld_stderr']:.4f}  ppl {found['perplexity']:7.2f}  "
              f"top-1 {found['top1']:.3f}  out {output_error or 0:.4f}  {solving:.1f} + {learning:.1f} s  "
              f"{(learned.before, learned.after, learned.step) if learned else ''}",
              flush=True)  # fmt: skip
        rows.append(row | found | {
            "calibration": tokens.hash, "evaluation": held_out.hash, "device": device_name(device),
            "torch": torch.__version__, "commit": options.commit,
            "windows": [round(value, 6) for value in kld.tolist()],
        })  # fmt: skip
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
        del model
        if device.type == "cuda":
            torch.cuda.empty_cache()


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


if __name__ == "__main__":
    main()
