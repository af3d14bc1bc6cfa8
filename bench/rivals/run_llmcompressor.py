"""llmcompressor's GPTQ or AWQ on given calibration tokens, with its own defaults.

Set here: every torch Linear but lm_head, integer weights of the scheme's bits, group size and symmetry. On a CPU one
sequence a batch (the library's default), on a GPU eight: the batch does not change a moment, and is faster. Everything
else is the library's default and is read back into the record. GPTQ, in 0.14: blocks of 128 columns, damping 0.01 of
the mean diagonal, act-order with static groups, scales from the group's minimum and maximum of the original weight
(observer memoryless_minmax; symmetric scale = 2 max|w| / (2^bits - 1)), layers in sequence with the error of the layers
before (propagate_error). AWQ: 20 grid points, scales made of activations and weights (duo_scaling), then rounding by
the QuantizationModifier; it asks for torch's current accelerator, so it runs on no CPU.
The weight that GPTQ leaves in a module is q * scale already; after AWQ it is the float weight, whose rounding is left
to the forward, so it is rounded here by the library's own function. AWQ rewrites norms, which are written as well.
"""

import time
from collections.abc import Mapping
from importlib.metadata import version

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, forward_quantize
from rival import Request, parse_request, write_result
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

GPU_BATCH = 8


def weight_scheme(request: Request) -> QuantizationScheme:
    """Integer weights of the bits, group size and symmetry asked for, on every Linear; defaults elsewhere."""
    weights = QuantizationArgs(
        num_bits=request.bits,
        type="int",
        symmetric=request.symmetric,
        strategy="group",
        group_size=request.group_size,
    )
    return QuantizationScheme(targets=["Linear"], weights=weights)


def calibration_batches(tokens: torch.Tensor, batch: int) -> DataLoader:
    """Batches of input_ids and attention_mask, both [batch, seq_len]."""
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens]
    return DataLoader(rows, batch_size=batch, shuffle=False)


def rounded_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weight [N, K] of every module that the library gave a weight scale, after the library's own rounding."""
    return {
        f"{name}.weight": forward_quantize(module, module.weight.detach(), "weight", module.quantization_scheme.weights)
        for name, module in model.named_modules()
        if hasattr(module, "weight_scale")
    }


def rewritten(model: torch.nn.Module, original: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The parameters of `model` that differ from the original's of the same name."""
    return {
        name: value.detach()
        for name, value in model.named_parameters()
        if name in original and not torch.equal(value.detach().cpu(), original[name])
    }


def options_used(model: torch.nn.Module, recipe: list, batch: int) -> dict[str, object]:
    """The settings that the run ended up with, read from the recipe and from the first quantized module."""
    module = next(module for module in model.modules() if hasattr(module, "weight_scale"))
    arguments = module.quantization_scheme.weights
    names = ("block_size", "dampening_frac", "actorder", "n_grid", "duo_scaling", "ignore")
    read = {name: str(getattr(part, name)) for part in recipe for name in names if hasattr(part, name)}
    return read | {
        "weight_actorder": str(arguments.actorder),
        "observer": f"{arguments.observer} (default)",
        "pipeline": "sequential, one decoder layer at a time",
        "scale_dtype": str(module.weight_scale.dtype),
        "weight_dtype": str(module.weight.dtype),
        "batch_size": batch,
        "round_to_nearest_instead": [
            name for part in recipe for name in getattr(part, "_rtn_fallback_module_names", ())
        ],
    }


def quantize(request: Request) -> tuple[dict[str, torch.Tensor], dict[str, object], float]:
    """The parameters that changed, the options used, and the seconds of the quantization call."""
    from llmcompressor import oneshot  # noqa: PLC0415 - its import prints on standard output
    from llmcompressor.modifiers.gptq import GPTQModifier  # noqa: PLC0415 - as above
    from llmcompressor.modifiers.quantization import QuantizationModifier  # noqa: PLC0415 - as above
    from llmcompressor.modifiers.transform.awq import AWQModifier  # noqa: PLC0415 - as above

    model = AutoModelForCausalLM.from_pretrained(request.model, dtype=request.dtype)
    original = {name: value.detach().clone() for name, value in model.named_parameters()}
    tokenizer = AutoTokenizer.from_pretrained(request.model)
    groups = {"config_groups": {"group_0": weight_scheme(request)}, "ignore": ["lm_head"]}
    recipe = [GPTQModifier(**groups)] if request.method == "gptq" else [AWQModifier(), QuantizationModifier(**groups)]
    batch = 1 if request.device.type == "cpu" else GPU_BATCH
    begin = time.perf_counter()
    oneshot(
        model=model,
        tokenizer=tokenizer,
        recipe=recipe,
        dataset=calibration_batches(request.tokens, batch),
        num_calibration_samples=len(request.tokens),
        max_seq_length=request.tokens.shape[1],
    )
    seconds = time.perf_counter() - begin
    changed = rewritten(model, original) | rounded_weights(model)
    return changed, options_used(model, recipe, batch), seconds


def main() -> None:
    request = parse_request(__doc__, ("gptq", "awq"))
    parameters, options, seconds = quantize(request)
    write_result(request, parameters, ("llmcompressor", version("llmcompressor")), options, seconds)


if __name__ == "__main__":
    main()
