"""gptqmodel's whole pipeline on tiny models of five architectures: calibrated, packed and saved by it, loaded by both.

    pip install gptqmodel ; PYTHONPATH=src:tests python bench/interop/by_gptqmodel.py OUT

Each model is quantized from random tokens with gptqmodel's own defaults and saved by it; then gptqmodel loads the
folder again for its plain torch kernel, and lowbit.load loads it packed. gptqmodel computes in float16, so its layers'
weights are taken out of it, in float32, and put into the float model: that is what lowbit's logits are held against.
The way back is the same with a folder that `lowbit convert` made of its checkpoint (GPTQ v2), which gptqmodel loads.
Writes OUT/gptqmodel.json: per architecture and setting the largest difference of logits, relative to the largest logit.
"""

import contextlib
import json
import os
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # on 2 cores its pool has one worker, and its loader asks for two

import torch
from architectures import tiny
from gptqmodel import BACKEND, AWQConfig, GPTQConfig, GPTQModel
from gptqmodel.nn_modules.qlinear import AWQuantLinear, BaseQuantLinear
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import lowbit
from lowbit.io.convert import convert
from lowbit.nn.linear import QuantLinear

SETTINGS: dict[str, dict[str, Any]] = {
    "4 bits": {"bits": 4, "sym": True},
    "4 bits, zero-points": {"bits": 4, "sym": False},
    "4 bits, act-order": {"bits": 4, "sym": True, "desc_act": True, "act_group_aware": False},
    "8 bits": {"bits": 8, "sym": True},
    "AWQ": {"bits": 4, "sym": False, "format": "gemm"},
}
ARCHITECTURES = ("llama", "qwen2", "mistral", "phi3", "qwen3")
FAILING = {"phi3, AWQ": "7.6 ends its process: KeyError 'q_zeros', packing the modules it cut gate_up_proj into"}
TOKENS = torch.arange(24).view(2, 12) * 7 % 100 + 1


def source_of(model_type: str, folder: Path) -> Path:
    """A tiny float model with the tokenizer that gptqmodel looks for."""
    model = tiny(model_type)
    model.config.intermediate_size, model.config.num_key_value_heads = 128, 4  # AWQ here wants 64 rows or more
    model = type(model)(model.config).eval()
    model.save_pretrained(folder)
    vocabulary = {f"t{number}": number for number in range(model.config.vocab_size)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="t0", eos_token="t2").save_pretrained(folder)
    return folder


def quantized_by_them(source: Path, settings: dict[str, Any], folder: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(1, 128, (64, 64), generator=generator).tolist()
    is_awq = "format" in settings
    kind, dtype = (AWQConfig, torch.float16) if is_awq else (GPTQConfig, torch.float32)
    config = kind(group_size=32, offload_to_disk=False, **settings)
    model = GPTQModel.load(str(source), config, device="cpu", dtype=dtype)
    backend = BACKEND.AWQ_TORCH if is_awq else BACKEND.AUTO  # its own choice for AWQ needs a GPU
    with contextlib.chdir(folder.parent):  # it writes a folder "logs" where it runs
        model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows], backend=backend)
    model.save(str(folder))
    return folder


def as_float(folder: Path, source: Path) -> PreTrainedModel:
    """The float model with the weights, in float32, of the layers that gptqmodel loads from `folder`."""
    loaded = GPTQModel.load(str(folder), device="cpu", backend=BACKEND.TORCH, dtype=torch.float16).model
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)  # AWQ changes norms as well
    for name, layer in loaded.named_modules():
        if isinstance(layer, BaseQuantLinear):
            layer.scales = layer.scales.float()
            _place(model, name).copy_(_weight(layer).float().T)
    return model


def _place(model: PreTrainedModel, name: str) -> Tensor:
    """The weight that module `name` is; of Phi-3's gate_up_proj gptqmodel makes two modules."""
    parent, _, last = name.rpartition(".")
    fused = getattr(model.get_submodule(parent), "gate_up_proj", None)
    if fused is None or last not in ("gate_proj", "up_proj"):
        return model.get_submodule(name).weight
    return fused.weight.chunk(2)[last == "up_proj"]


def _weight(layer: BaseQuantLinear) -> Tensor:
    """Its weight [K, N]."""
    if isinstance(layer, AWQuantLinear):
        return dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, layer.bits, layer.group_size)
    return layer.dequantize_weight()


@torch.no_grad()
def compared(model_type: str, settings: dict[str, Any], folder: Path) -> dict[str, object]:
    folder.mkdir()
    source = source_of(model_type, folder / "float")
    theirs = quantized_by_them(source, settings, folder / "theirs")
    ours = lowbit.load(theirs, torch.float32)
    layers = [module for module in ours.modules() if isinstance(module, QuantLinear)]
    convert(theirs, folder / "converted", "gptq-v2")
    row: dict[str, object] = {"layers": len(layers), "schemes": sorted({str(layer.scheme) for layer in layers})}
    logits = ours(TOKENS).logits
    for key, place in (("theirs", theirs), ("ours", folder / "converted")):
        expected = as_float(place, source)(TOKENS).logits
        row[f"logits of {key}"] = float((logits - expected).abs().max() / expected.abs().max())
    return row


def main(out: Path) -> None:
    warnings.simplefilter("ignore")
    path = out / "gptqmodel.json"
    rows: dict[str, object] = json.loads(path.read_text())["rows"] if path.is_file() else {}  # goes on where it ended
    versions = {name: version(name) for name in ("gptqmodel", "transformers", "torch")}
    with tempfile.TemporaryDirectory() as name:
        for model_type in ARCHITECTURES:
            for key, settings in SETTINGS.items():
                label = f"{model_type}, {key}"
                if label in rows:
                    continue
                if label in FAILING:
                    rows[label] = {"gptqmodel fails": FAILING[label]}
                else:
                    rows[label] = compared(model_type, settings, Path(name) / label.replace(" ", "-"))
                print(label, rows[label], flush=True)
                path.write_text(json.dumps({"rows": rows, "versions": versions}, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
