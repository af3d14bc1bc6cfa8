"""Loss curves of SmolLM2's last blocks over 300 steps on a CPU: AdamW with states of 32 and of 8 bits, two seeds each.

    python bench/optim_curve_smollm2.py MODEL TOKENS OUT.json COMMIT [--blocks 3] [--seq-len 64]

TOKENS as in qat_smollm2.py. The model is trained on next tokens, in float32, one window a step; what lies before the
last blocks stands still, so that a step fits on one core. A row holds the mean loss of each 50 steps, which see the
same windows under every optimizer; the seeds' difference says how far apart two equally good curves lie. Rows are
added to OUT.json beside those of optim_curve.py.
"""

import argparse
import json
from pathlib import Path

import torch
from qat_smollm2 import training_text
from torch import nn
from transformers import AutoModelForCausalLM

from lowbit.observe.capture import find_blocks
from lowbit.train.distill import next_token_loss
from lowbit.train.loop import LoopOptions, train
from lowbit.train.optim import AdamW8bit, parameter_groups

STEPS, EVERY, LR = 300, 50, 1e-4


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "tokens", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("commit")
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--seq-len", type=int, default=64)
    return parser.parse_args()


def optimizer_of(name: str, model: nn.Module) -> torch.optim.Optimizer:
    if name == "lowbit AdamW8bit":
        return AdamW8bit(parameter_groups(model), lr=LR, weight_decay=0.0)
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=0.0)


def curve(name: str, seed: int, options: argparse.Namespace) -> list[float]:
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).requires_grad_(False)
    for block in find_blocks(model)[1][-options.blocks :]:
        block.requires_grad_()
    text = training_text(options.tokens).reshape(-1, options.seq_len)
    loop = LoopOptions(STEPS, 1, 20, seed=seed)
    losses = train(model, text, next_token_loss, optimizer_of(name, model), loop).losses
    return [sum(losses[start : start + EVERY]) / EVERY for start in range(0, STEPS, EVERY)]


def main() -> None:
    options = arguments()
    found = json.loads(options.out.read_text())
    for seed in range(2):
        for name in ("torch AdamW, 32 bits", "lowbit AdamW8bit"):
            losses = curve(name, seed, options)
            row = {
                "optimizer": name, "seed": seed, "steps": STEPS, "mean loss of each 50": losses,
                "model": f"SmolLM2-135M-Instruct, last {options.blocks} blocks, {options.seq_len} tokens a step",
                "commit": options.commit,
            }  # fmt: skip
            print(row, flush=True)
            found["rows"].append(row)
            options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
