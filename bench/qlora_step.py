"""A QLoRA step on an 8B-shaped model with random weights: tokens a second and peak memory, lowbit and bitsandbytes.

    python bench/qlora_step.py SIDE OUT.json [--layers 32] [--batch 4] [--seq-len 1024] [--steps 6] [--compile]

SIDE: lowbit, or bitsandbytes (Linear4bit and PEFT as they are). Both: nf4 in blocks of 64, doubly quantized, rank 16
on every linear of the blocks, adapters in float32, bfloat16 elsewhere under autocast, gradient checkpointing of
every block, transformers' own loss, the library's own 8-bit AdamW. The median of the steps after two is reported.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lowbit.nn.linear import QuantLinear
from lowbit.numerics.scheme import QuantScheme
from lowbit.optional import require
from lowbit.tensors import PackedWeight
from lowbit.train.compiled import compile_blocks
from lowbit.train.optim import AdamW8bit
from lowbit.train.qlora import LoraOptions, add_lora

SIZES = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=["lowbit", "bitsandbytes"])
    parser.add_argument("out", type=Path)
    for name, default in (("layers", 32), ("batch", 4), ("seq-len", 1024), ("steps", 6), ("vocabulary", 128256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--compile", action="store_true", help="lowbit: torch.compile each block")
    parser.add_argument("--peft-layer", action="store_true", help="lowbit: PEFT's own LoRA layer")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--commit", default="")
    return parser.parse_args()


def float_model(options: argparse.Namespace) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = SIZES
    if options.small:
        sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model(
        "llama", vocab_size=options.vocabulary, num_hidden_layers=options.layers, rope_theta=5e5, **sizes
    )
    with torch.device(options.device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def quantized(model: PreTrainedModel, side: str, device: str) -> PreTrainedModel:
    """`model` with every linear of its blocks in nf4, in place."""
    scheme = QuantScheme.parse("nf4-b64-dq")
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, nn.Linear) or "layers." not in name:
            continue
        made: nn.Module
        if side == "lowbit":
            made = QuantLinear.from_packed(PackedWeight.from_float(layer.weight.detach(), scheme, torch.bfloat16))
        else:
            modules = require("bitsandbytes", "peers").nn
            made = modules.Linear4bit(
                layer.in_features, layer.out_features, bias=False, compute_dtype=torch.bfloat16, device="meta"
            )
            made.weight = modules.Params4bit(
                layer.weight.detach(), requires_grad=False, quant_type="nf4", compress_statistics=True, blocksize=64
            ).to(device)
        model.set_submodule(name, made)
        layer.weight = nn.Parameter(torch.empty(0))
    return model.requires_grad_(False)


def adapted(model: PreTrainedModel, options: argparse.Namespace) -> Any:
    if options.side == "lowbit" and not options.peft_layer:
        return add_lora(model, LoraOptions(rank=16, alpha=32.0))
    peft = require("peft", "train")
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=32, target_modules=names, task_type="CAUSAL_LM"))


def optimizer_of(model: nn.Module, side: str) -> Any:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if side == "lowbit":
        return AdamW8bit(parameters, lr=2e-4, weight_decay=0.0)
    return require("bitsandbytes", "peers").optim.AdamW8bit(parameters, lr=2e-4, weight_decay=0.0)


def main() -> None:
    options = arguments()
    base = quantized(float_model(options), options.side, options.device)
    model = adapted(base, options)
    base.enable_input_require_grads()
    base.gradient_checkpointing_enable({"use_reentrant": False})
    if options.compile:
        compile_blocks(base)
    model.train()
    if options.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated() if options.device == "cuda" else 0
    optimizer = optimizer_of(model, options.side)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(options.vocabulary, (options.batch, options.seq_len), generator=generator).to(options.device)
    times, losses = [], []

    def step() -> None:
        with torch.autocast(options.device, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())

    for _ in range(options.steps + 2):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    median = statistics.median(times[2:])
    row = {
        "side": options.side, "compiled": options.compile, "peft_layer": options.peft_layer, "layers": options.layers,
        "batch": options.batch, "seq_len": options.seq_len, "ms_per_step": 1e3 * median,
        "tokens_per_second": options.batch * options.seq_len / median,
        "peak_bytes": torch.cuda.max_memory_allocated() if options.device == "cuda" else 0, "model_bytes": held,
        "first_step_seconds": times[0], "losses": losses,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu", "torch": torch.__version__,
        "commit": options.commit,
    }  # fmt: skip
    print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
    options.out.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
    if options.profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            step()
        print(profile.key_averages().table(sort_by="cuda_time_total", row_limit=22, max_name_column_width=60))


if __name__ == "__main__":
    main()
