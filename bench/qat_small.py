"""QAT against GPTQ and rounding on a small language model that is trained first: minutes on one CPU core.

    python bench/qat_small.py rows.json COMMIT

The model: llama, 3 blocks of width 96, characters as tokens, trained for 500 steps on lowbit's packaged calibration
text. Each method quantizes it under one scheme; KL to the float model, in nats a character, is measured on 32 windows
of the packaged evaluation text, which is from other books. QAT begins with GPTQ's grids and codes, or with clipped
rounding, and learns from the float model's answers (self-distillation) for 150 steps.
"""

import copy
import json
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import lowbit
from lowbit.model.quantize import Job, quantize_blocks
from lowbit.model.recipe import Recipe
from lowbit.model.select import select
from lowbit.numerics.metrics import kl_divergence
from lowbit.observe.capture import find_blocks
from lowbit.observe.tokens import packaged_text
from lowbit.train.distill import Teacher, frozen, next_token_loss
from lowbit.train.loop import LoopOptions, train

T, BATCH, STEPS, QAT_STEPS = 128, 12, 500, 150
SIZES = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}


def windows(name: str, count: int, seed: int) -> Tensor:
    """int64 [count, T] of a packaged text, a character a token; what is not ASCII becomes 0."""
    text = packaged_text(name)  # type: ignore[arg-type]
    ids = torch.tensor([code if code < 128 else 0 for code in map(ord, text)])
    cut = ids[: len(ids) // T * T].view(-1, T)
    return cut[torch.randperm(len(cut), generator=torch.Generator().manual_seed(seed))[:count]]


def float_model(seed: int, text: Tensor) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = AutoConfig.for_model("llama", vocab_size=128, num_key_value_heads=2, max_position_embeddings=T, **SIZES)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    run = train(model, text, next_token_loss, optimizer, LoopOptions(STEPS, BATCH, 50, seed=seed))
    print(f"seed {seed}: float loss {run.losses[0]:.3f} -> {run.losses[-1]:.3f}", flush=True)
    return model.eval()


@torch.no_grad()
def judged(model: PreTrainedModel, original: PreTrainedModel, held_out: Tensor) -> dict[str, float]:
    wanted, found = (one.eval()(held_out).logits[:, :-1] for one in (original, model))
    targets = held_out[:, 1:].flatten()
    losses = [torch.nn.functional.cross_entropy(one.flatten(0, 1), targets).item() for one in (wanted, found)]
    return {
        "kld": kl_divergence(wanted, found).mean().item(),
        "perplexity": math.exp(losses[1]),
        "perplexity_original": math.exp(losses[0]),
    }


def solved(model: PreTrainedModel, text: str, calibration: Tensor) -> PreTrainedModel:
    recipe, copied = Recipe.parse(text), copy.deepcopy(model)
    selection = select(copied, find_blocks(copied)[0], recipe.scheme)
    batches = list(calibration.split(16)) if recipe.method == "gptq" else []
    quantize_blocks(copied, Job(recipe, selection, batches, torch.float32))
    return copied


def learned(
    model: PreTrainedModel, scheme: str, start: PreTrainedModel | None, text: Tensor, seed: int, lr: float
) -> PreTrainedModel:
    student = lowbit.qat.prepare(copy.deepcopy(model), lowbit.QuantScheme.parse(scheme), start=start)
    teacher = copy.deepcopy(model)
    frozen([teacher])
    scales = {id(p) for p in lowbit.qat.scale_parameters(student)}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in student.parameters() if id(p) not in scales]},
        {"params": lowbit.qat.scale_parameters(student), "lr": lr / 10},
    ]
    optimizer = lowbit.optim.AdamW8bit(groups, lr=lr, weight_decay=0.0)
    train(student, text, Teacher(teacher), optimizer, LoopOptions(QAT_STEPS, BATCH, 20, seed=seed))
    return lowbit.qat.convert(student)


def rows_of(seed: int, text: Tensor, held_out: Tensor, scheme: str, lr: float, model: PreTrainedModel) -> list[Any]:
    """One row per method."""
    gptq = solved(model, f"gptq:{scheme}", text[:128])
    makers: dict[str, Callable[[], PreTrainedModel]] = {
        "rtn-clip": partial(solved, model, f"rtn-clip:{scheme}", text),
        "gptq": lambda: gptq,
        "qat from rtn-clip": partial(learned, model, scheme, None, text, seed, lr),
        "qat from gptq": partial(learned, model, scheme, gptq, text, seed, lr),
    }
    rows = []
    for name, make in makers.items():
        started = time.perf_counter()
        row = {"method": name, "scheme": scheme, "seed": seed, **judged(make(), model, held_out)}
        rows.append(row | {"lr": lr if "qat" in name else None, "seconds": time.perf_counter() - started})
        print({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
    return rows


def main() -> None:
    rows, text, held_out = [], windows("calibration", 3000, 0), windows("evaluation", 32, 0)
    for seed in range(2):
        model = float_model(seed, text)
        for scheme, lr in (("w4a16-g32", 2e-4), ("w2a16-g32-asym", 1e-3)):
            rows += rows_of(seed, text, held_out, scheme, lr, model)
        found = {"device": "cpu", "torch": torch.__version__, "commit": sys.argv[2], "rows": rows}
        Path(sys.argv[1]).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
