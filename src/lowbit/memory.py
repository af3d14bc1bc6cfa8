"""Peak memory of a stretch of work.

On the CPU the kernel's own high-water mark of resident memory (VmHWM), which Linux lets a process reset; elsewhere
the peak since the process began (ru_maxrss). On CUDA the peak of torch's allocator.
"""

import ctypes
import resource
import sys
from pathlib import Path

import torch

_LIBC = ctypes.CDLL(None)
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak(device: torch.device) -> None:
    """Begin a new stretch of work, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR.exists():
        _CLEAR.write_text("5")  # 5 resets the high-water mark: man 5 proc


def peak_bytes(device: torch.device) -> int:
    """The largest memory held since `reset_peak`: resident bytes of the process, or allocated bytes on CUDA."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.exists():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def give_back(device: torch.device) -> None:
    """Return freed memory to the system, where the work is on a CPU and the C library is glibc.

    It keeps what is freed between living tensors. 24 ms, and 80 MB less at the peak of quantizing SmolLM2-135M.
    """
    if device.type == "cpu" and hasattr(_LIBC, "malloc_trim"):
        _LIBC.malloc_trim(0)
