"""Times an AdamW step over 2^28 bf16 parameters: ours in 8 and 4 bits, bitsandbytes', torch's fused one, a plain copy.

    python bench/optim_step.py rows.json COMMIT

Milliseconds are the median of 20 steps, each between two CUDA events on a device that has nothing else to do, so that
the host's part counts; and of ten steps in a row, where it is hidden, as in training. "share of copy" is the bytes that
an 8-bit step moves (2 + 2 + 2 for p and g, 4 for the codes, 16/256 for the absmax: 10.06 a parameter) over the time,
against the bytes that a copy of the same size moves. Peers run in the same process, one after another, each with fresh
parameters.
"""

import gc
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.train.optim import AdamW4bit, AdamW8bit, Lion8bit, SGD8bit

ELEMENTS = 2**28
STEP_BYTES = 10 + 16 / 256
# Llama-3-8B's blocks at a quarter of their width, 20 of them: about 2^28 parameters in 291 tensors
MANY = [(1536, 1024), (1024, 1024), (7168, 1024), (1024, 3584), (1024,)] * 20 + [(1024,)] * 191


def milliseconds(run: Callable[[], Any], repeats: int = 20, in_a_row: int = 1) -> float:
    """The median time of `run` between two CUDA events around so many calls of it, after three calls."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(in_a_row):
            run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / in_a_row)
    return statistics.median(times)


def both(run: Callable[[], Any]) -> dict[str, float]:
    return {"ms": milliseconds(run), "ms of ten in a row": milliseconds(run, 3, 10)}


def parameters(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[nn.Parameter]:
    made = []
    for shape in shapes:
        parameter = nn.Parameter(torch.randn(shape, device="cuda", dtype=dtype))
        parameter.grad = torch.randn_like(parameter) * 1e-3
        made.append(parameter)
    return made


def timed(name: str, make: Callable[[list[nn.Parameter]], Any], shapes: list[tuple[int, ...]]) -> dict[str, Any]:
    made = parameters(shapes, torch.bfloat16)
    optimizer, count = make(made), sum(parameter.numel() for parameter in made)
    took = both(optimizer.step)
    del optimizer, made
    gc.collect()
    torch.cuda.empty_cache()
    return {"op": "optimizer step", "kernel": name, "tensors": len(shapes), "parameters": count} | took


def copy_row() -> dict[str, Any]:
    source: Tensor = torch.randn(ELEMENTS * 5 // 4, device="cuda")  # as many bytes as a step moves
    target = torch.empty_like(source)
    took = both(lambda: target.copy_(source))
    return {"op": "copy", "kernel": "torch", "bytes": 2 * source.nbytes} | took


def rows() -> Iterator[dict[str, Any]]:
    one, copied = [(2**14, 2**14)], copy_row()
    yield copied
    makers: dict[str, Callable[[list[nn.Parameter]], Any]] = {
        "lowbit AdamW8bit": AdamW8bit,
        "lowbit Lion8bit": Lion8bit,
        "lowbit SGD8bit": SGD8bit,
        "torch AdamW fused, bf16 states": lambda made: torch.optim.AdamW(made, fused=True),
    }
    if importlib.util.find_spec("bitsandbytes"):
        bnb = importlib.import_module("bitsandbytes")
        makers |= {"bitsandbytes AdamW8bit": bnb.optim.AdamW8bit, "bitsandbytes Lion8bit": bnb.optim.Lion8bit}
    makers["lowbit AdamW4bit"] = AdamW4bit
    for shapes in (one, MANY):
        for name, make in makers.items():
            row = timed(name, make, shapes)
            if name == "lowbit AdamW8bit":
                for ms, share in (("ms", "share of copy"), ("ms of ten in a row", "share of copy in a row")):
                    row[share] = STEP_BYTES * row["parameters"] / row[ms] * copied[ms] / copied["bytes"]
            yield row


def main() -> None:
    place = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "commit": sys.argv[2]}
    found: list[dict[str, Any]] = []
    for row in rows():
        print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
        found.append(row)
        Path(sys.argv[1]).write_text(json.dumps(place | {"rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
