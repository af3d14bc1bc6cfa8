"""One process of tests/train/test_distributed.py: trains under accelerate's FSDP2, and writes what came of it.

torchrun --nproc-per-node 2 distributed_worker.py FOLDER        writes FOLDER/RANK.json
"""

import io
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from architectures import tiny
from torch import Tensor, nn

from lowbit.nn.linear import QuantLinear
from lowbit.numerics.scheme import QuantScheme
from lowbit.tensors import PackedWeight
from lowbit.train.optim import AdamW8bit, StateOptions
from lowbit.train.qat import prepare
from lowbit.train.qlora import LoraOptions, add_lora

WINDOWS = torch.randint(3, 128, (4, 8, 16), generator=torch.Generator().manual_seed(0))  # [steps, batch, T]


def qat_model() -> nn.Module:
    return prepare(tiny("llama"), QuantScheme.parse("w4a16-g32-asym")).train()


def qlora_model() -> nn.Module:
    model, scheme = tiny("llama"), QuantScheme.parse("nf4-b64-dq")
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            parent, _, attribute = name.rpartition(".")
            packed = PackedWeight.from_float(module.weight.detach(), scheme, torch.float32)
            setattr(model.get_submodule(parent), attribute, QuantLinear.from_packed(packed))
    adapted = add_lora(model, LoraOptions(rank=4))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(0))
    return adapted.train()


def optimizer_of(model: nn.Module, bits: int) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if bits == 32:
        return torch.optim.AdamW(trained, lr=1e-3)
    return AdamW8bit(trained, lr=1e-3, options=StateOptions(min_size=1024))


def prepared(model: nn.Module, bits: int, world: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model and its optimizer; under FSDP2, a unit per decoder block, where there is more than one process."""
    optimizer = optimizer_of(model, bits)
    if world == 1:
        return model, optimizer
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    # accelerate chooses its plugin on accelerators only, and DDP on a CPU; from here on the code is that of a GPU
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    model, _ = accelerator.prepare(model, optimizer)
    assert type(model).__name__.startswith("FSDP")
    return model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor, rank: int, world: int) -> float:
    own = ids.chunk(world)[rank]
    loss = model(input_ids=own, labels=own, use_cache=False).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    value = loss.detach().clone()
    if world > 1:
        dist.all_reduce(value)
    return value.item() / world


def resumed_losses(rank: int, world: int, whole: list[float]) -> bool:
    """Whether two steps, a checkpoint of this rank's shards, and two steps more end as four steps did."""
    model, optimizer = prepared(qat_model(), 8, world)
    losses = [step(model, optimizer, ids, rank, world) for ids in WINDOWS[:2]]
    file = io.BytesIO()
    local = {name: p.to_local() if hasattr(p, "to_local") else p for name, p in model.named_parameters()}
    torch.save({"model": {n: p.detach() for n, p in local.items()}, "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file)
    again, optimizer = prepared(qat_model(), 8, world)
    with torch.no_grad():
        for name, parameter in again.named_parameters():
            (parameter.to_local() if hasattr(parameter, "to_local") else parameter).copy_(saved["model"][name])
    optimizer.load_state_dict(saved["optimizer"])
    losses += [step(again, optimizer, ids, rank, world) for ids in WINDOWS[2:]]
    return losses == whole


def measure(rank: int, world: int) -> dict[str, object]:
    """The losses of every kind of run, whether the 8-bit one resumes bit-equal, and the bytes of its states here."""
    found: dict[str, object] = {}
    for name, make, bits in (("qat", qat_model, 32), ("qat8", qat_model, 8), ("qlora8", qlora_model, 8)):
        model, optimizer = prepared(make(), bits, world)
        found[name] = [step(model, optimizer, ids, rank, world) for ids in WINDOWS]
        if name == "qat8":
            found["resumed"] = resumed_losses(rank, world, found[name])  # type: ignore[arg-type]
            states = (value for state in optimizer.state.values() for value in state.values())
            found["state bytes"] = sum(value.nbytes for value in states if isinstance(value, Tensor))
    return found


def main() -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    (Path(sys.argv[1]) / f"{rank}.json").write_text(json.dumps(measure(rank, world)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
