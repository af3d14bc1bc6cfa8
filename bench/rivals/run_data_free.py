"""bitsandbytes' NF4 or hqq's own quantizer over every linear of the decoder, with their defaults; no text is read.

NF4 has blocks of the scheme's group size along each row's elements and float32 block maxima (no double quantization).
hqq: the scheme's bits and groups along the inputs (axis 1, as transformers' HqqConfig has it), scale and zero-point in
float32, the zero-point not an integer. The tokens are not read; they stand in the record like everywhere.
hqq's quantizer alone is used: pip install --no-deps hqq termcolor is enough.
"""

import time
from collections.abc import Callable
from importlib.metadata import version

import torch
from rival import Request, parse_request, write_result
from torch import Tensor
from transformers import AutoModelForCausalLM


def nf4_of(request: Request) -> Callable[[Tensor], Tensor]:
    """weight [N, K] -> the float weight that its NF4 codes stand for."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit  # noqa: PLC0415 - one of two libraries is needed

    return lambda w: dequantize_4bit(*quantize_4bit(w, blocksize=request.group_size, quant_type="nf4"))


def hqq_of(request: Request) -> Callable[[Tensor], Tensor]:
    """weight [N, K] -> the float weight that its codes, scales and float zero-points stand for."""
    from hqq.core.quantize import Quantizer  # noqa: PLC0415 - as above

    def rounded(w: Tensor) -> Tensor:
        options = {"group_size": request.group_size, "axis": 1, "device": str(w.device)}
        return Quantizer.dequantize(*Quantizer.quantize(w, request.bits, compute_dtype=torch.float32, **options))

    return rounded


TOOLS = {"nf4": ("bitsandbytes", nf4_of), "hqq": ("hqq", hqq_of)}


def main() -> None:
    request = parse_request(__doc__, tuple(TOOLS))
    package, make = TOOLS[request.method]
    model = AutoModelForCausalLM.from_pretrained(request.model, dtype=torch.float32).to(request.device)
    head = model.get_output_embeddings()
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    rounded = make(request)
    begin = time.perf_counter()
    with torch.no_grad():
        weights = {f"{name}.weight": rounded(module.weight.detach()) for name, module in linears.items()}
    if request.device.type == "cuda":
        torch.cuda.synchronize(request.device)
    seconds = time.perf_counter() - begin
    write_result(request, weights, (package, version(package)), {"axis": 1}, seconds)


if __name__ == "__main__":
    main()
