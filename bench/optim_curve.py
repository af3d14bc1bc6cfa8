"""Loss curves of a small language model over 300 steps: AdamW with states of 32, 8 and 4 bits, two seeds each.

    python bench/optim_curve.py rows.json COMMIT

The model and text are those of qat_small.py. A row holds the mean loss of each 50 steps; the seeds' difference under
32 bits says how far apart two equally good curves lie.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from qat_small import SIZES, T, windows
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lowbit.train.distill import next_token_loss
from lowbit.train.loop import LoopOptions, train
from lowbit.train.optim import AdamW4bit, AdamW8bit, parameter_groups

STEPS, EVERY, LR = 300, 50, 3e-3
MAKERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "torch AdamW, 32 bits": lambda model: torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0),
    "lowbit AdamW8bit": lambda model: AdamW8bit(parameter_groups(model), lr=LR),
    "lowbit AdamW4bit": lambda model: AdamW4bit(parameter_groups(model), lr=LR),
}


def curve(name: str, seed: int) -> list[float]:
    torch.manual_seed(seed)
    config = AutoConfig.for_model("llama", vocab_size=128, num_key_value_heads=2, max_position_embeddings=T, **SIZES)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    text = windows("calibration", 3000, 0)
    run = train(model, text, next_token_loss, MAKERS[name](model), LoopOptions(STEPS, 12, 50, seed=seed))
    return [sum(run.losses[start : start + EVERY]) / EVERY for start in range(0, STEPS, EVERY)]


def main() -> None:
    rows = []
    for name in MAKERS:
        for seed in range(2):
            rows.append({"optimizer": name, "seed": seed, "steps": STEPS, "mean loss of each 50": curve(name, seed)})
            print(rows[-1], flush=True)
    found = {"device": "cpu", "torch": torch.__version__, "commit": sys.argv[2], "rows": rows}
    Path(sys.argv[1]).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
