"""CPU seconds and peak memory of a method's first blocks: what a run on quiet cores would take, read on a busy machine.

usage:  python bench/accuracy/cpu_seconds.py MODEL METHOD:SCHEME --calibration TRAIN.txt --out ROW.json
            [--blocks 2] [--samples 56] [--seq-len 1024]
Every block of a decoder costs about the same, so a run takes (seconds of a block) x (number of blocks).
"""

import argparse
import json
import resource
import time
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowbit.model.quantize import Job, batched, quantize_blocks
from lowbit.model.recipe import Recipe
from lowbit.model.select import Rule, select
from lowbit.observe.capture import find_blocks
from lowbit.observe.tokens import load_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("recipe")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--samples", type=int, default=56)
    parser.add_argument("--seq-len", type=int, default=1024)
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    ids = load_tokens(options.calibration, tokenizer, options.samples, options.seq_len, 0).ids
    name, blocks = find_blocks(model)
    recipe = Recipe.parse(options.recipe)
    rules = tuple(Rule(f"{name}.{index}.*", None) for index in range(options.blocks, len(blocks)))
    recipe = replace(recipe, rules=rules)
    ends: list[float] = []
    started = time.process_time()
    progress = lambda stage, done, total: ends.append(time.process_time())  # noqa: E731
    selection = select(model, name, recipe.scheme, rules)
    quantize_blocks(model, Job(recipe, selection, list(batched(ids)), torch.bfloat16, progress=progress))
    row = {
        "recipe": options.recipe, "samples": options.samples, "seq_len": options.seq_len, "blocks": len(blocks),
        "threads": torch.get_num_threads(), "torch": torch.__version__,
        "cpu_seconds_by_block": [round(b - a, 1) for a, b in zip([started, *ends], ends, strict=False)],
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }  # fmt: skip
    print(json.dumps(row))
    options.out.write_text(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    main()
