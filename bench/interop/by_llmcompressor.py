"""llmcompressor's own checkpoints of tiny models of four architectures in lowbit, beside transformers' reader of them.

    pip install --no-deps llmcompressor ; PYTHONPATH=src:tests python bench/interop/by_llmcompressor.py OUT

Writes OUT/llmcompressor.json: per architecture and preset the largest difference of logits, relative to the largest
logit, between lowbit's packed model and what transformers and compressed-tensors make of the same files.
"""

import json
import logging
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path

import torch
from architectures import tiny
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils.quantization_config import CompressedTensorsConfig

import lowbit
from lowbit.nn.linear import QuantLinear
from lowbit.tensors import PackedWeight

GPTQ = "W4A16 by GPTQ"  # calibrated, block by block; the others are rounded without data
PRESETS = (GPTQ, "W4A16", "W4A16_ASYM", "W8A16", "W8A8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4A16", "MXFP4A16")
# these load in no other way in float32 (5.23); activations are not rounded then, so FP8_BLOCK's logits differ
DEQUANTIZED = ("W4A16_ASYM", "FP8_BLOCK", "NVFP4A16", "MXFP4A16")
ARCHITECTURES = ("llama", "qwen2", "mistral", "phi3")
PROCESSOR = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0})))  # it looks for one
TOKENS = torch.arange(24).view(2, 12) * 7 % 100 + 1


def _equal(packed: PackedWeight, theirs: Tensor) -> bool:
    """Equal in float32, or in bfloat16, in which compressed-tensors decodes nvfp4."""
    return any(
        torch.equal(packed.dequantize(dtype).float(), theirs.float()) for dtype in (torch.float32, torch.bfloat16)
    )


@torch.no_grad()
def difference(model_type: str, preset: str, folder: Path) -> dict[str, object]:
    model = tiny(model_type)
    model.config.intermediate_size = 128
    source = folder.with_name(f"{folder.name}-float")
    type(model)(model.config).eval().save_pretrained(source)
    PROCESSOR.save_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    if preset in (GPTQ, "W4A16", "W4A16_ASYM", "W8A16"):
        weights = {"num_bits": int(preset[1]), "type": "int", "symmetric": not preset.endswith("ASYM"),
                   "strategy": "group", "group_size": 32}  # fmt: skip
        groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
        kind = GPTQModifier if preset == GPTQ else QuantizationModifier
        recipe = kind(config_groups=groups, ignore=["lm_head"])
    else:
        recipe = QuantizationModifier(targets="Linear", scheme=preset, ignore=["lm_head"])
    if preset == GPTQ:
        rows = torch.randint(1, 128, (16, 32), generator=torch.Generator().manual_seed(0))
        batches = DataLoader([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows])
        with torch.enable_grad():
            oneshot(model=model, recipe=recipe, dataset=batches, num_calibration_samples=16, max_seq_length=32)
    else:
        oneshot(model=model, recipe=recipe, pipeline="datafree")
    model.save_pretrained(folder, save_compressed=True)
    how = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if preset in DEQUANTIZED else {}
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how)
    ours = lowbit.load(folder, torch.float32)
    layers = [module for module in ours.modules() if isinstance(module, QuantLinear)]
    expected = theirs(TOKENS).logits
    weights_equal = all(
        _equal(layer.packed, theirs.get_submodule(name).weight)
        for name, layer in ours.named_modules()
        if isinstance(layer, QuantLinear)
    )
    error = (ours(TOKENS).logits - expected).abs().max() / expected.abs().max()
    schemes = sorted({str(layer.scheme) for layer in layers})
    return {"layers": len(layers), "schemes": schemes, "weights_equal": weights_equal, "logits": float(error)}


def main(out: Path) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    rows: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as name:
        for model_type in ARCHITECTURES:
            for preset in PRESETS:
                key = f"{model_type} {preset}"
                try:
                    rows[key] = difference(model_type, preset, Path(name) / key.replace(" ", "-"))
                except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
                    rows[key] = {"failed": f"{type(error).__name__}: {str(error)[:200]}"}
                print(key, rows[key], flush=True)
    versions = {name: version(name) for name in ("llmcompressor", "compressed-tensors", "transformers", "torch")}
    (out / "llmcompressor.json").write_text(json.dumps({"rows": rows, "versions": versions}, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
