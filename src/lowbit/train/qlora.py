"""QLoRA (arXiv:2305.14314): low-rank adapters, trained on a base that stays quantized.

    y = x W^T + alpha/r (x A^T) B^T        W packed and frozen, A [r, K] and B [N, r] trained

PEFT makes and saves the adapters: QuantLinear is an nn.Linear, so its plain LoRA layers wrap it. PEFT's own merge would
write into QuantLinear's weight, which is a read-only view of NaN, so it raises; `merge_lora` merges instead:

    quantized    encode(decode(W) + delta) under the layer's scheme; what this rounding loses is measured
    16-bit       an nn.Linear with decode(W) + delta, for a checkpoint that no quantizer is needed to read
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowbit.algorithms.rtn import solve_rtn
from lowbit.algorithms.scales import ScaleSearch
from lowbit.errors import CheckpointError, InputError
from lowbit.nn.linear import QuantLinear
from lowbit.numerics import metrics
from lowbit.optional import late, require
from lowbit.tensors import PackedWeight, check_finite


@dataclass(frozen=True)
class LoraOptions:
    """rank r and alpha; targets: names or ends of names of linears, () for all that are quantized."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ()


@dataclass(frozen=True)
class MergedLayer:
    """What merging one layer lost: |W' - (W + delta)| over |W + delta|, and over |delta|."""

    name: str
    relative_error: float
    of_delta: float


@dataclass(frozen=True)
class MergeReport:
    """Every merged layer; kld: mean KL of the merged model from the adapted one, in nats, where tokens were given."""

    layers: tuple[MergedLayer, ...]
    kld: float | None

    def __str__(self) -> str:
        worst = max(self.layers, key=lambda layer: layer.relative_error)
        text = f"{len(self.layers)} layers merged; worst relative error {worst.relative_error:.3g} in {worst.name}"
        return text + ("" if self.kld is None else f"; KL to the model with adapters {self.kld:.3g} nats a token")


def add_lora(model: PreTrainedModel, options: LoraOptions = LoraOptions(), seed: int = 0) -> Any:
    """A PeftModel of `model` (in place) with adapters on its quantized linears, everything else frozen.

    Raises InputError where no target is there.
    """
    peft = require("peft", "train")
    quantized = [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]
    targets = [name for name in quantized if not options.targets or name.endswith(options.targets)]
    if not targets:
        ends = sorted({name.rpartition(".")[2] for name in quantized})
        raise InputError(
            f"no quantized linear of the model ends in {', '.join(options.targets) or 'anything'}; "
            f"there are {', '.join(ends) or 'none: quantize it first, as nf4-b64-dq for example'}"
        )
    config = peft.LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    config._register_custom_module({QuantLinear: late("lowbit.train.lora_layer").LoraQuantLinear})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return peft.get_peft_model(model, config)


def load_lora(model: PreTrainedModel, folder: str | Path) -> Any:
    """A PeftModel of `model` with the adapter that PEFT saved in `folder`.

    Raises CheckpointError where the files are damaged or the adapter is another model's.
    """
    peft, folder = require("peft", "train"), Path(folder)
    shapes = _adapter_shapes(folder)
    modules = dict(model.named_modules())
    for name, (rows, columns) in shapes.items():
        found = modules.get(name)
        if not isinstance(found, nn.Linear) or (found.out_features, found.in_features) != (rows, columns):
            have = f"is [{found.out_features}, {found.in_features}]" if isinstance(found, nn.Linear) else "is not there"
            raise CheckpointError(
                f"the adapter {folder} is for another model: it changes {name} [{rows}, {columns}], which {have} in "
                f"{type(model).__name__}"
            )
    return peft.PeftModel.from_pretrained(model, str(folder))


def _adapter_shapes(folder: Path) -> dict[str, tuple[int, int]]:
    """Module -> (N, K) of each linear that the adapter changes."""
    shapes: dict[str, list[int]] = {}
    try:
        json.loads((folder / "adapter_config.json").read_text())
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  (a handle, not a mapping)
                name, _, part = key.removeprefix("base_model.model.").rpartition(".lora_")
                size = file.get_slice(key).get_shape()
                shapes.setdefault(name, [0, 0])[1 if part.startswith("A") else 0] = size[1 if part[0] == "A" else 0]
                check_finite(file.get_tensor(key), f"{folder}: {key}")
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{folder} holds no whole adapter ({error}); PEFT's save_pretrained writes one"
        ) from error
    return {name: (rows, columns) for name, (rows, columns) in shapes.items()}


@torch.no_grad()
def merge_lora(
    peft_model: Any, to_16bit: bool = False, batches: Sequence[Tensor] = ()
) -> tuple[PreTrainedModel, MergeReport]:
    """(the base model with its adapters merged, in place, and what that lost).

    Each layer is quantized again under its own scheme, or becomes an nn.Linear in the model's dtype (`to_16bit`).
    batches: token ids int64 [b, T] on which the KL to the model with adapters is measured.
    """
    wrapped = list(_adapted(peft_model))
    if not wrapped:
        raise InputError("the model has no LoRA layers to merge; give a PeftModel, from lowbit's load_lora for example")
    before = [peft_model(input_ids=ids.to(peft_model.device), use_cache=False).logits.cpu() for ids in batches]
    model: PreTrainedModel = peft_model.get_base_model()
    layers = []
    for name, wrapper in wrapped:
        base, delta = wrapper.get_base_layer(), _delta(wrapper)
        merged, layer = _merged_linear(base, delta, model.dtype) if to_16bit else _merged_quant(base, delta, name)
        model.set_submodule(name, layer)
        wanted = base.packed.dequantize() + delta
        error = (wanted - merged).norm().item()
        of_delta = error / delta.norm().item() if delta.any() else 0.0
        layers.append(MergedLayer(name, metrics.relative_error(wanted, merged), of_delta))
    model.eval()
    distances = [
        metrics.kl_divergence(wanted, model(input_ids=ids.to(model.device), use_cache=False).logits.cpu()).mean().item()
        for ids, wanted in zip(batches, before, strict=True)
    ]
    return model, MergeReport(tuple(layers), sum(distances) / len(distances) if distances else None)


def _adapted(peft_model: Any) -> Iterator[tuple[str, Any]]:
    """(name within the base model, PEFT's layer) of every adapted QuantLinear."""
    base = peft_model.get_base_model() if hasattr(peft_model, "get_base_model") else peft_model
    for name, module in base.named_modules():
        if hasattr(module, "lora_A") and isinstance(module.get_base_layer(), QuantLinear):
            yield name, module


def _delta(wrapper: Any) -> Tensor:
    """What the active adapters add to the weight, float32 [N, K]."""
    base = wrapper.get_base_layer()
    total = torch.zeros(base.out_features, base.in_features, device=next(wrapper.parameters()).device)
    for adapter in wrapper.active_adapters:
        total += wrapper.get_delta_weight(adapter).float()
    return total if base.rotation is None else base.rotation.apply(total)  # as the weight it is added to


def _merged_quant(base: QuantLinear, delta: Tensor, name: str) -> tuple[Tensor, QuantLinear]:
    """(the weight after rounding, the layer that holds it)."""
    scheme, w = base.scheme, base.packed.dequantize() + delta
    check_finite(w, f"{name} with its adapter")
    dtype = base.packed.scale.dtype if isinstance(base.packed.scale, Tensor) else torch.float32
    if scheme.weights.format.kind == "int":
        solution = solve_rtn(w, scheme.weights, dtype, ScaleSearch())
        packed = PackedWeight.from_codes(solution.q, solution.scale, solution.zero, scheme)
    else:
        packed = PackedWeight.from_float(w, scheme, dtype)
    buffers = dict(base.named_buffers())
    grid = buffers.get("input_scale"), buffers.get("input_zero_point")
    layer = QuantLinear.from_packed(packed, base.bias, *grid, base.rotation)
    return packed.dequantize(), layer


def _merged_linear(base: QuantLinear, delta: Tensor, dtype: torch.dtype) -> tuple[Tensor, nn.Linear]:
    w = base.packed.dequantize() + delta
    w = (w if base.rotation is None else base.rotation.undo(w)).to(dtype)
    layer = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
    layer.weight, layer.bias = nn.Parameter(w, requires_grad=False), base.bias
    return w, layer
