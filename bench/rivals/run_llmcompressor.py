"""llmcompressor's GPTQ on given calibration tokens, with its own defaults, the model in float32.

Set here: every torch Linear but lm_head, integer weights of the scheme's bits, group size and symmetry, one sequence a
batch (the library's default batch size; the batch does not change a Hessian). Everything else is the library's default
and is read back into the record: in 0.14 blocks of 128 columns, damping 0.01 of the mean diagonal, act-order with
static groups, scales from the group's minimum and maximum of the original weight (observer memoryless_minmax; symmetric
scale = 2 max|w| / (2^bits - 1)), layers in sequence with the error of the layers before (propagate_error).
The weight that the library leaves in a module after the run is q * scale already, so it is written as it stands.
"""

import time
from importlib.metadata import version

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from rival import Request, parse_request, write_result
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer


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


def calibration_batches(tokens: torch.Tensor) -> DataLoader:
    """Batches of one sequence: input_ids and attention_mask, both [1, seq_len]."""
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens]
    return DataLoader(rows, batch_size=1, shuffle=False)


def quantized_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The float weight [N, K] of every module that the library gave a weight scale."""
    return {name: module.weight.detach() for name, module in model.named_modules() if hasattr(module, "weight_scale")}


def options_used(model: torch.nn.Module, recipe: object) -> dict[str, object]:
    """The settings that the run ended up with, read from the recipe and from the first quantized module."""
    module = next(module for module in model.modules() if hasattr(module, "weight_scale"))
    arguments = module.quantization_scheme.weights
    return {
        "block_size": recipe.block_size,
        "dampening_frac": recipe.dampening_frac,
        "actorder": getattr(arguments.actorder, "name", str(arguments.actorder)).lower(),
        "observer": arguments.observer or "memoryless_minmax (default)",
        "propagate_error": True,
        "pipeline": "sequential, one decoder layer at a time",
        "scale_dtype": str(module.weight_scale.dtype),
        "ignore": recipe.ignore,
        "batch_size": 1,
        "round_to_nearest_instead": recipe._rtn_fallback_module_names,
    }


def quantize(request: Request) -> tuple[torch.nn.Module, dict[str, object], float]:
    """The model quantized, the options used, and the seconds of the quantization call."""
    from llmcompressor import oneshot  # noqa: PLC0415 - its import prints on standard output
    from llmcompressor.modifiers.gptq import GPTQModifier  # noqa: PLC0415 - as above

    model = AutoModelForCausalLM.from_pretrained(request.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(request.model)
    recipe = GPTQModifier(config_groups={"group_0": weight_scheme(request)}, ignore=["lm_head"])
    begin = time.perf_counter()
    oneshot(
        model=model,
        tokenizer=tokenizer,
        recipe=recipe,
        dataset=calibration_batches(request.tokens),
        num_calibration_samples=len(request.tokens),
        max_seq_length=request.tokens.shape[1],
    )
    seconds = time.perf_counter() - begin
    return model, options_used(model, recipe), seconds


def main() -> None:
    request = parse_request(__doc__)
    model, options, seconds = quantize(request)
    write_result(request, quantized_weights(model), "llmcompressor", version("llmcompressor"), options, seconds)


if __name__ == "__main__":
    main()
