"""auto-round's learned rounding on given calibration tokens: 200 iterations a block, its other settings the defaults.

Set here: bits, group size and symmetry, the number and length of the sequences, and the seed. In 0.15 each step takes
8 sequences, the rate is 1 / iterations, the model is turned into bf16 (its automatic mixed precision), blocks read what
the original's blocks before them give beside their own quantized inputs, and on a GPU blocks are compiled.
The library masks each sequence's last token out of its loss. After the run a linear holds q * scale.
"""

import time
from importlib.metadata import version

import torch
from rival import Request, parse_request, write_result
from transformers import AutoModelForCausalLM, AutoTokenizer

ITERATIONS = 200
BATCH = 8  # the library's default
OPTIONS = ("iters", "lr", "minmax_lr", "gradient_accumulate_steps", "enable_quanted_input", "enable_minmax_tuning")


def options_used(rounder: object) -> dict[str, object]:
    """The settings read back from the library's objects, where they have these names."""
    places = (rounder, getattr(rounder, "quantize_config", None), getattr(rounder, "model_context", None))
    names = (*OPTIONS, "enable_torch_compile", "amp_dtype", "seed")
    read = {name: str(getattr(place, name)) for name in names for place in places if hasattr(place, name)}
    return read | {"batch_size": BATCH}


def quantize(request: Request) -> tuple[dict[str, torch.Tensor], dict[str, object], float]:
    """The weights, the options used, and the seconds of the quantization call."""
    from auto_round import AutoRound  # noqa: PLC0415 - its import prints on standard output

    model = AutoModelForCausalLM.from_pretrained(request.model, dtype=request.dtype)
    tokenizer = AutoTokenizer.from_pretrained(request.model)
    begin = time.perf_counter()
    rounder = AutoRound(
        model,
        tokenizer=tokenizer,
        bits=request.bits,
        group_size=request.group_size,
        sym=request.symmetric,
        iters=ITERATIONS,
        nsamples=len(request.tokens),
        seqlen=request.tokens.shape[1],
        batch_size=BATCH,
        dataset=list(request.tokens.split(BATCH)),
        device_map=str(request.device),
        seed=42 + request.seed,  # 42 is the library's default
    )
    rounded, _ = rounder.quantize()
    seconds = time.perf_counter() - begin
    weights = {
        f"{name}.weight": module.weight.detach()
        for name, module in rounded.named_modules()
        if hasattr(module, "scale") and hasattr(module, "weight")
    }
    return weights, options_used(rounder), seconds


def main() -> None:
    request = parse_request(__doc__, ("autoround",))
    weights, options, seconds = quantize(request)
    write_result(request, weights, ("auto-round", version("auto-round")), options, seconds)


if __name__ == "__main__":
    main()
