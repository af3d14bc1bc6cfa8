"""What the scripts that run another library's GPTQ share: arguments, tokens, the record and the weights they write.

A script prints one JSON line on its standard output, whatever the library prints goes to standard error, and writes
OUT/dequantized.safetensors: the float32 weight that each quantized linear computes with, under its name + ".weight".
"""

import argparse
import json
import os
import re
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

SCHEME = re.compile(r"w(?P<bits>\d)a16-g(?P<group>\d+)(?P<asymmetric>-asym)?")


@dataclass(frozen=True)
class Request:
    """What one run was asked for; started is the clock (time.perf_counter) when the script began its work."""

    model: Path
    tokens: torch.Tensor  # int64 [samples, seq_len]
    scheme: str
    bits: int
    group_size: int
    symmetric: bool
    out: Path
    started: float
    record_fd: int


def redirect_output() -> int:
    """A copy of standard output's descriptor; standard output itself is sent to standard error from here on."""
    sys.stdout.flush()
    copy = os.dup(1)
    os.dup2(2, 1)
    return copy


def parse_request(description: str) -> Request:
    """The request on the command line, its tokens read and cut to --samples rows of --seq-len tokens."""
    started = time.perf_counter()
    record_fd = redirect_output()
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model in float")
    parser.add_argument("--tokens", type=Path, required=True, help="file that calibration_tokens.py wrote")
    parser.add_argument("--scheme", required=True, help="w4a16-g64 or w4a16-g64-asym; other bits and group sizes alike")
    parser.add_argument("--out", type=Path, required=True, help="folder for dequantized.safetensors")
    parser.add_argument("--samples", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--seq-len", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    match = SCHEME.fullmatch(args.scheme)
    if match is None:
        parser.error(f"scheme {args.scheme} is not w<bits>a16-g<group>[-asym], such as w4a16-g64 or w4a16-g64-asym")
    tokens = load_file(args.tokens)["input_ids"][: args.samples, : args.seq_len].contiguous()
    return Request(
        model=args.model,
        tokens=tokens,
        scheme=args.scheme,
        bits=int(match["bits"]),
        group_size=int(match["group"]),
        symmetric=match["asymmetric"] is None,
        out=args.out,
        started=started,
        record_fd=record_fd,
    )


def write_result(
    request: Request,
    weights: Mapping[str, torch.Tensor],
    tool: str,
    version: str,
    options: Mapping[str, object],
    seconds: float,
) -> None:
    """Write the weights (module name -> [N, K]) and print the JSON line; seconds is the quantization call alone.

    seconds_total goes from the script's first step to this call: loading and quantizing, without the imports.
    peak_memory_bytes is the process's largest resident size, imports and loading included (ru_maxrss, KiB on Linux).
    """
    record = {
        "tool": tool,
        "version": version,
        "options": dict(options),
        "scheme": request.scheme,
        "samples": request.tokens.shape[0],
        "seq_len": request.tokens.shape[1],
        "layers": len(weights),
        "seconds": round(seconds, 2),
        "seconds_total": round(time.perf_counter() - request.started, 2),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    request.out.mkdir(parents=True, exist_ok=True)
    arrays = {f"{name}.weight": weight.to(torch.float32).contiguous() for name, weight in weights.items()}
    save_file(arrays, request.out / "dequantized.safetensors")
    os.write(request.record_fd, (json.dumps(record) + "\n").encode())
