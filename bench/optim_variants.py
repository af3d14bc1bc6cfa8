"""Variants of the 8-bit AdamW kernel over 2^28 bfloat16 parameters: milliseconds alone, and ten in a row.

    python bench/optim_variants.py OUT.json COMMIT [FILE.cu]

Threads, copies of the tables, and blocks that L2 is asked for ahead. All compute the same codes. Each is timed by CUDA
events around one launch and around ten in a row, three times over all variants so that a clock that moves is seen.
"""

import json
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from lowbit.kernels.cuda import optim
from lowbit.kernels.cuda.compiler import Kernel, current_stream, load_kernel

ELEMENTS, ROUNDS, IN_A_ROW = 2**28, 3, 10
BYTES = 10 + 16 / 256
COLUMNS = ("THREADS", "REPLICAS", "AHEAD")
VARIANTS = [(768, 32, 1), (768, 32, 2), (768, 32, 3), (768, 32, 4), (768, 16, 1), (640, 32, 1), (512, 32, 1)]


def shared_bytes(replicas: int) -> int:
    return optim._shared_bytes("adam", replicas, 8)


def kernel_of(file: str, variant: tuple[int, ...], device: torch.device) -> Kernel:
    defines = (("BITS", 8), ("RULE", 0), ("PARAM", 1), ("SETS", optim.SETS), *zip(COLUMNS, variant, strict=True))
    parameters = f"PiiPPP{optim.SETS * 40}s"
    return load_kernel(file, "optim_blockwise", parameters, device, defines, shared_bytes(variant[1]))


def milliseconds(run: Any, times: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(times):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / times


def step(device: torch.device) -> tuple[optim.KernelStep, optim.Packed]:
    """States as after a step with gradients of 1e-3."""
    p = torch.randn(ELEMENTS, device=device, dtype=torch.bfloat16)
    g = torch.randn(ELEMENTS, device=device).mul_(1e-3).bfloat16()
    states = tuple(torch.zeros(ELEMENTS, dtype=torch.uint8, device=device) for _ in range(2))
    absmax = tuple(torch.zeros(ELEMENTS // 256, device=device) for _ in range(2))
    one = optim.KernelStep("adam", 8, p, g, states, absmax)
    scalars = optim.Scalars(1 - 1e-5, 0.0, 0.9, 0.1, 0.999, 0.001, -1e-8 / 1e-3, -1e-3, -31.6 / 1e-3, 0.0)
    (packed,) = optim.pack_records([(one.record(), scalars)], 8)
    return one, packed


def main() -> None:
    out, commit, file = Path(sys.argv[1]), sys.argv[2], (sys.argv[3:] or ["optim_blockwise.cu"])[0]
    device = torch.device("cuda", torch.cuda.current_device())
    with ThreadPoolExecutor(8) as pool:
        kernels = dict(zip(VARIANTS, pool.map(lambda one: kernel_of(file, one, device), VARIANTS), strict=True))
    one, packed = step(device)
    records = torch.frombuffer(bytearray(packed.records), dtype=torch.uint8).to(device)
    tables = [table.data_ptr() for table in optim._tables(device, 8)]
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    target, source = (torch.empty(ELEMENTS * 5 // 4, device=device) for _ in range(2))
    found: dict[str, list[tuple[float, float]]] = {}

    def launcher(variant: tuple[int, ...]) -> Any:
        grid, block = (processors, 1, 1), (variant[0], 1, 1)
        arguments = (records.data_ptr(), 1, packed.blocks, *tables, packed.numbers)
        return lambda: kernels[variant].launch(grid, block, arguments, shared_bytes(variant[1]), current_stream(device))

    for _ in range(ROUNDS):
        runs = {"copy": lambda: target.copy_(source)} | {str(variant): launcher(variant) for variant in VARIANTS}
        for name, run in runs.items():
            run()
            found.setdefault(name, []).append((milliseconds(run, 1), milliseconds(run, IN_A_ROW)))
    rows = [
        {
            "op": "copy" if name == "copy" else "AdamW step, 8-bit states", "variant": name, "file": file,
            "ms alone": statistics.median(alone for alone, _ in times),
            "ms of ten": statistics.median(row for _, row in times), "all": times,
        }
        for name, times in found.items()
    ]  # fmt: skip
    copied = rows[0]["ms of ten"] / (2 * source.nbytes)
    for row in rows:
        row["share of copy"] = BYTES * ELEMENTS * copied / row["ms of ten"] if row["op"] != "copy" else 1.0
        print(
            file, row["variant"], *(f"{row[key]:.4f}" for key in ("ms alone", "ms of ten", "share of copy")), flush=True
        )
    place = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "commit": commit, "columns": COLUMNS}
    out.write_text(json.dumps(place | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
    del one


if __name__ == "__main__":
    main()
