"""QAT of SmolLM2 with self-distillation, beside rounding, GPTQ and what it begins with: a row per method and seed.

    python bench/qat_smollm2.py MODEL TOKENS OUT.json --scheme w4a16-g64 --seeds 0 1 --seconds 120 --lr 5e-4
        --calibration CALIBRATION.safetensors --evaluation EVALUATION.safetensors --commit C

TOKENS: the training text as ids, little-endian uint16 in an .xz file (the whole of wiki_train), cut into windows twice,
the second time half a window on. The student is the bfloat16 model as --start quantized it, with float32 masters of its
linears; nothing else is trained. It takes `seconds`, captures included, and the learning rate falls with the time that
has passed. Judged in float32 on windows of other articles (wiki_valid), as bench/accuracy/measure.py does.
"""

import argparse
import copy
import json
import lzma
import math
import time
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import lowbit
from lowbit import judge
from lowbit.model.quantize import Job, batched, quantize_blocks
from lowbit.model.recipe import Recipe
from lowbit.model.select import select
from lowbit.nn.fake import FakeOptions, FakeQuantLinear
from lowbit.numerics.scheme import QuantScheme
from lowbit.observe.capture import find_blocks
from lowbit.observe.tokens import Tokens
from lowbit.train import qat
from lowbit.train.distill import Teacher, frozen
from lowbit.train.graph import Capturable
from lowbit.train.loop import LoopOptions, train

T, MOST_STEPS, WARMUP = 1024, 10**6, 50
JUDGING = 12.0  # seconds kept for it where --end is given


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "tokens", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--scheme", default="w4a16-g64")
    parser.add_argument("--start", default="gptq", help="the method that training begins with, judged too")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="each trains for its share of the time")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--scale-rate", type=float, default=0.1)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--graphed", action="store_true", help="each step is a replayed CUDA graph")
    parser.add_argument("--end", type=float, default=0.0, help="instead of --seconds: the epoch's second to be done by")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--commit", default="")
    return parser.parse_args()


def training_text(path: Path) -> Tensor:
    """int64 [n, T]."""
    ids = torch.from_numpy(numpy.frombuffer(lzma.decompress(path.read_bytes()), dtype="<u2").astype("int64"))
    return torch.cat([part[: len(part) // T * T].view(-1, T) for part in (ids, ids[T // 2 :])])


def stored(path: str, count: int) -> Tokens:
    """The first windows of a .safetensors file of ids."""
    (ids,) = load_file(path).values()
    return Tokens(ids[:count].long(), path)


def judged(model: PreTrainedModel, reference: judge.Reference) -> dict[str, Any]:
    means = judge.window_means(model.eval(), reference)
    kld = means[:, 2]
    return {
        "kld": kld.mean().item(),
        "kld_stderr": (kld.std() / math.sqrt(len(kld))).item(),
        "perplexity": math.exp(means[:, 0].mean()),
        "perplexity_original": math.exp(means[:, 1].mean()),
        "top1": means[:, 3].mean().item(),
        "windows": [round(value, 5) for value in kld.tolist()],
    }


def solved(base: PreTrainedModel, method: str, options: argparse.Namespace) -> PreTrainedModel:
    """`base` quantized by `method`."""
    model, recipe = copy.deepcopy(base), Recipe(QuantScheme.parse(options.scheme), method)
    tokens = stored(options.calibration, options.samples)
    device = torch.device(options.device)
    selection = select(model, find_blocks(model)[0], recipe.scheme)
    batches = list(batched(tokens.ids, 8192))
    quantize_blocks(model, Job(recipe, selection, batches, torch.bfloat16, device, hidden_device=device))
    return model


def student_of(start: PreTrainedModel) -> PreTrainedModel:
    """`start` with linears that learn, in place."""
    return qat.reopen(start.to(torch.bfloat16).requires_grad_(False), qat.QatOptions(FakeOptions(masters=True)))


def optimizer_of(student: nn.Module, lr: float, scale_rate: float) -> torch.optim.Optimizer:
    weights = [module.weight for module in student.modules() if isinstance(module, FakeQuantLinear)]
    groups = [{"params": weights}, {"params": qat.scale_parameters(student), "lr": lr * scale_rate}]
    return lowbit.optim.AdamW8bit(
        groups, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, options=lowbit.optim.StateOptions(min_size=1)
    )


def learned(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    text: Tensor,
    seed: int,
    budget: float,
    options: argparse.Namespace,
) -> tuple[list[float], list[float]]:
    """(losses, seconds after which each step had ended)."""
    optimizer = optimizer_of(student, options.lr, options.scale_rate)
    loop = LoopOptions(
        MOST_STEPS, options.batch, WARMUP, seed=seed, diverged=5.0, graphed=options.graphed, seconds=budget
    )
    started, times = time.perf_counter(), list[float]()

    def progress(stage: str, done: int, total: int) -> None:
        times.append(time.perf_counter() - started)
        if done % 100 == 0:
            print(f"  {options.scheme} {done} steps, {times[-1]:.0f} of {budget:.0f} s", flush=True)

    return train(Capturable(student), text, Teacher(Capturable(teacher)), optimizer, loop, None, progress).losses, times


class Rows:
    """The rows of one run: printed and written as they come."""

    def __init__(self, options: argparse.Namespace, reference: judge.Reference) -> None:
        self.out, self.reference, self.rows = options.out, reference, list[dict[str, Any]]()
        self.common = {
            "model": "SmolLM2-135M-Instruct, permuted", "scheme": options.scheme,
            "device": _device_name(torch.device(options.device)), "torch": torch.__version__, "commit": options.commit,
        }  # fmt: skip

    def add(self, row: dict[str, Any], model: PreTrainedModel) -> None:
        self.rows.append(self.common | row | judged(model, self.reference))
        _show(self.rows[-1])
        self.out.write_text(json.dumps(self.rows, indent=1) + "\n", encoding="utf-8")


def trained_row(
    start: PreTrainedModel, teacher: PreTrainedModel, text: Tensor, seed: int, budget: float,
    options: argparse.Namespace,
) -> tuple[dict[str, Any], PreTrainedModel]:  # fmt: skip
    """A row's settings and times, and the quantized model that training from `start` gave; start is used up."""
    student, clock = student_of(start), time.perf_counter()
    losses, times = learned(student, teacher, text, seed, budget, options)
    seconds = time.perf_counter() - clock
    row = {
        "seed": seed, "method": f"qat, self-distillation from {options.start}", "steps": len(losses),
        "batch": options.batch, "tokens": len(losses) * options.batch * T, "lr": options.lr,
        "scale_lr": options.lr * options.scale_rate, "graphed": options.graphed,
        "seconds": seconds, "first_step_seconds": times[0],
        "ms_per_step": 1e3 * (times[-1] - times[0]) / max(1, len(times) - 1),
        "peak_bytes": torch.cuda.max_memory_allocated() if options.device == "cuda" else 0,
        "losses": [round(sum(part) / len(part), 5) for part in _parts(losses, 50)],
    }  # fmt: skip
    return row, qat.convert(student).to(torch.float32)


def main() -> None:
    options = arguments()
    device, text = torch.device(options.device), training_text(options.tokens)
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval().to(device)
    rows = Rows(options, judge.Reference.of(base, stored(options.evaluation, options.windows)))
    for method in dict.fromkeys(["rtn", "gptq", options.start]):
        clock = time.perf_counter()
        start = solved(base, method, options)
        rows.add({"method": method, "seconds": time.perf_counter() - clock}, start)
    teacher = copy.deepcopy(base).to(torch.bfloat16)
    frozen([teacher])
    for done, seed in enumerate(options.seeds):
        runs = len(options.seeds) - done
        left = max(1.0, (options.end - time.time()) / runs - JUDGING)
        budget = left if options.end else options.seconds
        rows.add(*trained_row(copy.deepcopy(start), teacher, text, seed, budget, options))


def _parts(losses: list[float], size: int) -> list[list[float]]:
    return [losses[start : start + size] for start in range(0, len(losses), size)]


def _show(row: dict[str, Any]) -> None:
    print(f"{row['scheme']} {row['method']}: KL {row['kld']:.4f} +- {row['kld_stderr']:.4f}, perplexity "
          f"{row['perplexity']:.2f} of {row['perplexity_original']:.2f}, {row['seconds']:.0f} s", flush=True)  # fmt: skip  # noqa: E501
    if "losses" in row:
        print("  losses", row["losses"], flush=True)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


if __name__ == "__main__":
    main()
