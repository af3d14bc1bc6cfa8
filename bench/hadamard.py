"""Times the rotation of a layer's input: our Triton kernel, the Kronecker products in torch, one dense product, a copy.

    python bench/hadamard.py rows.json COMMIT

bfloat16; microseconds of one call in a CUDA graph (kernels/timing.py), rotating through enough inputs to leave the L2.
GB/s counts one read and one write of x. Every row was compared with the dense product in float64 first.
"""

import json
import sys
from pathlib import Path

import torch

from lowbit.kernels.hadamard import rotated
from lowbit.kernels.timing import copies_of, graph_us
from lowbit.numerics.hadamard import Hadamard

SHAPES = ((1, 1536), (16, 1536), (1024, 1536), (1024, 576), (1, 14336), (1024, 14336), (4096, 8192), (1024, 11008))
TOLERANCE = 2e-2  # relative: bfloat16 in, out and, in the dense product, in the matrix


def main(path: str, commit: str) -> None:
    rows = []
    for tokens, columns in SHAPES:
        rotation = Hadamard.of(columns)
        inputs = [torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
                  for _ in range(copies_of(2 * tokens * columns))]  # fmt: skip
        matrix = rotation.apply(torch.eye(columns, device="cuda", dtype=torch.float64))
        dense, exact = matrix.bfloat16(), inputs[0].double() @ matrix
        kernels = {
            "triton_hadamard": lambda x, r=rotation: rotated(x, r, inverse=False),
            "torch_kronecker": lambda x, r=rotation: r.apply(x),
            "torch_dense": lambda x, q=dense: x @ q,
            "copy": lambda x: x.clone(),
        }
        for name, kernel in kernels.items():
            error = float((kernel(inputs[0]).double() - exact).norm() / exact.norm())
            assert name == "copy" or error < TOLERANCE, (name, str(rotation), error)
            us = graph_us([lambda x=x, k=kernel: k(x) for x in inputs])
            rows.append({
                "op": "rotate", "kernel": name, "rotation": str(rotation), "shape": [tokens, columns],
                "us": round(us, 2),
                "gb_per_s": round(4 * tokens * columns / us / 1e3, 1), "error": None if name == "copy" else error,
                "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "commit": commit,
            })  # fmt: skip
            print(f"{name:16s} {rotation!s:26s} {tokens:5d} x {columns:5d} {us:9.2f} us", flush=True)
    Path(path).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
