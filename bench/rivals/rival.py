"""What the scripts that run one library share: arguments, tokens, the record and the weights they write.

A script prints one JSON line on its standard output, whatever the library prints goes to standard error, and writes
OUT/dequantized.safetensors: every parameter that the quantized model computes with and that is not the original's,
in float32 and under the original's name: weights of linears, and of norms where a method rewrites them.
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
    method: str
    device: torch.device
    dtype: torch.dtype | str
    seed: int
    out: Path
    started: float
    record_fd: int


def redirect_output() -> int:
    """A copy of standard output's descriptor; standard output itself is sent to standard error from here on."""
    sys.stdout.flush()
    copy = os.dup(1)
    os.dup2(2, 1)
    return copy


def parse_request(description: str | None, methods: tuple[str, ...]) -> Request:
    """The request on the command line, its tokens read and cut to --samples rows of --seq-len tokens."""
    started = time.perf_counter()
    record_fd = redirect_output()
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model in float")
    parser.add_argument("--tokens", type=Path, required=True, help="file that calibration_tokens.py wrote")
    parser.add_argument("--scheme", required=True, help="w4a16-g64 or w4a16-g64-asym; other bits and group sizes alike")
    parser.add_argument("--method", choices=methods, default=methods[0])
    parser.add_argument("--device", default="cpu", help="cpu (the model in float32), cuda (the checkpoint's dtype)")
    parser.add_argument("--seed", type=int, default=0, help="for what draws numbers beside the tokens' own order")
    parser.add_argument("--out", type=Path, required=True, help="folder for dequantized.safetensors")
    parser.add_argument("--samples", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--seq-len", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    match = SCHEME.fullmatch(args.scheme)
    if match is None:
        parser.error(f"scheme {args.scheme} is not w<bits>a16-g<group>[-asym], such as w4a16-g64 or w4a16-g64-asym")
    tokens = load_file(args.tokens)["input_ids"][: args.samples, : args.seq_len].contiguous()
    device = torch.device("cuda:0" if args.device == "cuda" else args.device)
    return Request(
        model=args.model,
        tokens=tokens,
        scheme=args.scheme,
        bits=int(match["bits"]),
        group_size=int(match["group"]),
        symmetric=match["asymmetric"] is None,
        method=args.method,
        device=device,
        dtype=torch.float32 if device.type == "cpu" else "auto",
        seed=args.seed,
        out=args.out,
        started=started,
        record_fd=record_fd,
    )


def write_result(
    request: Request,
    parameters: Mapping[str, torch.Tensor],
    tool: tuple[str, str],
    options: Mapping[str, object],
    seconds: float,
) -> None:
    """Write the parameters by their full names and print the JSON line; seconds is the quantization call alone.

    tool: its name and version. seconds_total goes from the script's first step to this call: loading and quantizing,
    without the imports. peak_memory_bytes is the process's largest resident size, imports and loading included
    (ru_maxrss, KiB on Linux); device_memory_bytes is what torch took at most of a GPU.
    """
    on_gpu = request.device.type == "cuda"
    record = {
        "tool": tool[0],
        "version": tool[1],
        "method": request.method,
        "options": dict(options),
        "scheme": request.scheme,
        "seed": request.seed,
        "samples": request.tokens.shape[0],
        "seq_len": request.tokens.shape[1],
        "parameters": len(parameters),
        "seconds": round(seconds, 2),
        "seconds_total": round(time.perf_counter() - request.started, 2),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(request.device) if on_gpu else "CPU",
        "torch": torch.__version__,
    }
    if on_gpu:
        record["device_memory_bytes"] = torch.cuda.max_memory_allocated(request.device)
    request.out.mkdir(parents=True, exist_ok=True)
    arrays = {name: value.detach().to("cpu", torch.float32).contiguous() for name, value in parameters.items()}
    save_file(arrays, request.out / "dequantized.safetensors")
    os.write(request.record_fd, (json.dumps(record) + "\n").encode())
