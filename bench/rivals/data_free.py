"""Methods that read no text, side by side: bitsandbytes' NF4 and hqq beside lowbit's nf4, hqq and rtn, judged alike.

Each tool quantizes the same float32 weights of the decoder's linears with its own defaults at blocks of 64, and the
original with the weights that they stand for is judged on held-out text. Weights that are equal to the last bit are
judged once. Needs bitsandbytes and hqq in lowbit's environment (hqq's quantizer alone is used: pip install --no-deps
hqq termcolor is enough).

usage:  python bench/rivals/data_free.py --model MODEL --held-out VALID.txt --windows 20 --out ROWS.json
"""

import argparse
import json
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from compare import measured
from hqq.core.quantize import Quantizer
from torch import Tensor

from lowbit import judge
from lowbit.algorithms.hqq import solve_hqq
from lowbit.algorithms.rtn import solve_rtn
from lowbit.io.source import load_float, load_tokenizer, open_source
from lowbit.model.select import select
from lowbit.numerics.scheme import QuantScheme
from lowbit.observe.capture import find_blocks
from lowbit.observe.tokens import load_tokens
from lowbit.tensors import PackedWeight

ASYM = QuantScheme.parse("w4a16-g64-asym")
FOUND = ("perplexity_reference", "perplexity", "kld", "kld_stderr", "top1_agreement", "tokens")


def bitsandbytes_nf4(w: Tensor) -> Tensor:
    return dequantize_4bit(*quantize_4bit(w, blocksize=64, quant_type="nf4"))


def hqq_own(w: Tensor) -> Tensor:
    """axis 1, as transformers' HqqConfig has it; scale and float zero-point in float32."""
    codes, meta = Quantizer.quantize(w, 4, group_size=64, axis=1, device="cpu", compute_dtype=torch.float32)
    return Quantizer.dequantize(codes, meta)


TOOLS: dict[str, tuple[str, str, Callable[[Tensor], Tensor]]] = {
    "lowbit rtn": ("w4a16-g64-asym", "lowbit", lambda w: solve_rtn(w, ASYM.weights, torch.bfloat16).dequantized),
    "bitsandbytes NF4": ("nf4-b64", "bitsandbytes", bitsandbytes_nf4),
    "lowbit nf4": (
        "nf4-b64",
        "lowbit",
        lambda w: PackedWeight.from_float(w, QuantScheme.parse("nf4-b64"), torch.float32).dequantize(),
    ),
    "hqq": ("4 bits, g64, float zero-point", "hqq", hqq_own),
    "lowbit hqq": ("w4a16-g64-asym", "lowbit", lambda w: solve_hqq(w, ASYM.weights, torch.bfloat16).dequantized),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--model", "--held-out", "--out"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--windows", type=int, default=20)
    args = parser.parse_args()
    with open_source(args.model) as source:
        original, tokenizer = load_float(source, torch.float32), load_tokenizer(source)
    names = list(select(original, find_blocks(original)[0], ASYM).schemes)
    reference = judge.Reference.of(original, load_tokens(args.held_out, tokenizer, args.windows, 1024, seed=0))
    rows, judged = [], []
    for tool, (scheme, package, quantized) in TOOLS.items():
        started = time.process_time()
        with torch.no_grad():
            weights = {f"{name}.weight": quantized(original.get_submodule(name).weight.detach()) for name in names}
        seconds = time.process_time() - started
        same = [row for row, known in judged if all(torch.equal(w, known[name]) for name, w in weights.items())]
        found = {key: same[0][key] for key in FOUND} if same else measured(original, reference, weights)
        row = {"tool": tool, "version": version(package), "scheme": scheme, "cpu_seconds": round(seconds, 1)}
        rows.append(row | found | ({"weights_equal_to": same[0]["tool"]} if same else {}))
        judged.append((rows[-1], weights))
        print(json.dumps(rows[-1]), flush=True)
        result = {"model": args.model.name, "held_out": args.held_out.name, "torch": torch.__version__, "rows": rows}
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
