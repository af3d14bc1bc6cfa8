"""What plans need to know of a CUDA device, asked once."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lowbit.optional import installed


@dataclass(frozen=True)
class Gpu:
    """Compute capability, multiprocessors, and the most shared memory that a block may ask for."""

    capability: tuple[int, int]
    processors: int
    shared_bytes: int

    @property
    def overlaps_launches(self) -> bool:
        """Whether a kernel may start before the one before it has ended (programmatic dependent launch)."""
        return self.capability >= (9, 0)


@cache
def gpu_of(device: torch.device) -> Gpu:
    """The facts of a CUDA device (with its index)."""
    properties = torch.cuda.get_device_properties(device)
    shared = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return Gpu((properties.major, properties.minor), properties.multi_processor_count, shared)


def gpu_refusal(x: Tensor, codes: Tensor) -> str | None:
    """Why no CUDA kernel of ours can take x and a weight with these codes, or None."""
    if x.device.type != "cuda":
        return f"x is on {x.device}, this kernel runs on CUDA devices"
    if codes.device != x.device:
        return f"x is on {x.device} and the weight on {codes.device}; move them to one device"
    major, minor = gpu_of(x.device).capability
    if (major, minor) < (7, 5):
        return f"compute capability {major}.{minor} is below 7.5, the first with the instructions it is made of"
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"x is {x.dtype}, this kernel multiplies float16 and bfloat16"
    if x.dtype == torch.bfloat16 and major < 8:
        return f"compute capability {major}.{minor} has no bfloat16 tensor cores; use float16"
    if not installed("cuda.bindings"):
        return 'the package cuda-bindings is missing: pip install "lowbit[cuda]"'
    return None


def on_device_of(x: Tensor, run: Callable[[], Tensor]) -> Tensor:
    """run() with x's device current, which a launch through the driver needs."""
    if x.device.index == torch.cuda.current_device():
        return run()
    with torch.cuda.device(x.device):
        return run()
