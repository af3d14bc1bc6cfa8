"""Loss curves of SmolLM2 over 300 steps: AdamW with states of 32 and of 8 bits, over several seeds.

    python bench/optim_curve_smollm2.py MODEL TOKENS OUT.json COMMIT [--device cuda] [--seeds 3] [--batch 8]

TOKENS as in qat_smollm2.py. The whole model is trained on next tokens, in float32 with bfloat16 products. A row holds
the mean loss of each 50 steps, which see the same windows under every optimizer; the seeds' difference says how far
apart two equally good curves lie. Rows are written as they come.
"""

import argparse
import json
from pathlib import Path

import torch
from qat_smollm2 import training_text
from torch import nn
from transformers import AutoModelForCausalLM

from lowbit.train.distill import next_token_loss
from lowbit.train.graph import Capturable
from lowbit.train.loop import LoopOptions, train
from lowbit.train.optim import AdamW8bit, parameter_groups

STEPS, EVERY, LR = 300, 50, 2e-4


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "tokens", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("commit")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--graphed", action="store_true", help="each step is a replayed CUDA graph")
    return parser.parse_args()


def optimizer_of(name: str, model: nn.Module) -> torch.optim.Optimizer:
    if name == "lowbit AdamW8bit":
        return AdamW8bit(parameter_groups(model), lr=LR, weight_decay=0.0)
    return torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)


def curve(name: str, seed: int, options: argparse.Namespace) -> list[float]:
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).to(options.device)
    text = training_text(options.tokens).reshape(-1, options.seq_len)
    loop = LoopOptions(STEPS, options.batch, 20, seed=seed, autocast=True, graphed=options.graphed)
    optimizer = optimizer_of(name, model)
    called = Capturable(model) if options.graphed else model
    return train(called, text, next_token_loss, optimizer, loop).losses


def main() -> None:
    options = arguments()
    place = {"device": options.device, "torch": torch.__version__, "commit": options.commit}
    if options.device == "cuda":
        place["device"] = torch.cuda.get_device_name()
    rows = []
    for seed in range(options.seeds):
        for name in ("torch AdamW, 32 bits", "lowbit AdamW8bit"):
            losses = curve(name, seed, options)
            means = [sum(losses[start : start + EVERY]) / EVERY for start in range(0, STEPS, EVERY)]
            row = {
                "optimizer": name, "seed": seed, "steps": STEPS, "lr": LR,
                "mean loss of each 50": means,
                "model": f"SmolLM2-135M-Instruct, permuted, {options.batch} x {options.seq_len} tokens a step",
            }  # fmt: skip
            print(row, flush=True)
            rows.append(row)
            options.out.write_text(json.dumps(place | {"rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
