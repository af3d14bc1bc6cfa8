"""CUDA C++ from the wheel to the GPU: NVRTC compiles at first use, the disk remembers, the driver launches.

    kernel.cu + the .cuh it includes + defines ──NVRTC──► cubin ──► ~/.cache/lowbit/kernels/<name>-<arch>-<key>.cubin
                                                             └────► CUmodule on one device ──► Kernel.launch

The key is a hash of the source, its includes, the flags, the defines, the architecture and NVRTC's version: an edit or
an upgrade compiles again, nothing else does. A file lock makes one process compile and the others wait; the result
appears by an atomic rename. A CUDA build of torch brings NVRTC and `cuda.bindings`; no other compiler is needed.

A kernel is loaded, and its dynamic shared memory allowed, when it is first asked for: neither may happen inside the
capture of a CUDA graph, so a graph is warmed up first, as torch asks anyway.
"""

import ctypes
import hashlib
import logging
import re
import struct
import threading
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from lowbit.optional import require

SOURCES = Path(__file__).parent
Defines = Mapping[str, int | str]
_FLAGS = ("--std=c++17", "--device-as-default-execution-space")
_INCLUDE = re.compile(r'^\s*#include\s+"([^"]+)"', re.MULTILINE)
_FIELD = re.compile(r"\d*[a-zA-Z]")
_NOT_INITIALIZED = 3  # CUDA_ERROR_NOT_INITIALIZED
_log = logging.getLogger(__name__)


def cache_directory() -> Path:
    """Where cubins are kept: ~/.cache/lowbit/kernels. Deleting it costs the next first use a few seconds."""
    return Path.home() / ".cache" / "lowbit" / "kernels"


def architecture_of(device: torch.device) -> str:
    """What NVRTC calls the architecture of a CUDA device: "sm_80", "sm_90a" (a: wgmma and its kin exist there)."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}" + "a" * (major == 9)


def compile_source(name: str, architecture: str, defines: Defines) -> bytes:
    """The cubin of the file `name` beside this one, such as "int8_mma.cu". Needs NVRTC, but no GPU.

    Raises InputError when NVRTC is not installed, RuntimeError with the compiler's log when the source is wrong.
    """
    nvrtc = _nvrtc()
    texts = _sources(name)
    headers = [text.encode() for header, text in texts.items() if header != name]
    names = [header.encode() for header in texts if header != name]
    program = _nvrtc_ok(nvrtc.nvrtcCreateProgram(texts[name].encode(), name.encode(), len(names), headers, names))
    options = [option.encode() for option in (*_FLAGS, f"--gpu-architecture={architecture}", *_define_flags(defines))]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        written = bytearray(_nvrtc_ok(nvrtc.nvrtcGetProgramLogSize(program)))
        nvrtc.nvrtcGetProgramLog(program, written)
        raise RuntimeError(f"{name} does not compile for {architecture}:\n{written.decode(errors='replace')}")
    cubin = bytearray(_nvrtc_ok(nvrtc.nvrtcGetCUBINSize(program)))
    _nvrtc_ok(nvrtc.nvrtcGetCUBIN(program, cubin))
    nvrtc.nvrtcDestroyProgram(program)
    return bytes(cubin)


def cached_cubin(name: str, architecture: str, defines: Defines, folder: Path) -> bytes:
    """`compile_source` through the cache in `folder`; a folder that can't be written is told once and not used."""
    key = hashlib.sha256()
    for part in (str(_nvrtc_version()), architecture, *_FLAGS, *_define_flags(defines), *_sources(name).values()):
        key.update(part.encode() + b"\0")
    path = folder / f"{Path(name).stem}-{architecture}-{key.hexdigest()[:24]}.cubin"
    if path.is_file():
        return path.read_bytes()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if not path.is_file():
                unfinished = path.with_suffix(".unfinished")
                unfinished.write_bytes(compile_source(name, architecture, defines))
                unfinished.replace(path)
        return path.read_bytes()
    except OSError as error:
        _log.warning("compiled kernels are not kept, so every process compiles again: %s", error)
        return compile_source(name, architecture, defines)


class Kernel:
    """A loaded `__global__` function of one device.

    parameters: its parameters as `struct` writes them: P pointer, i int32, q int64, f float32, 128s a structure of 128
    bytes, given as bytes; in order, natural alignment.
    """

    def __init__(self, function: Any, parameters: str, context: Any, keep_alive: Any) -> None:
        self._driver = require("cuda.bindings.driver", "cuda")
        self._function, self._context, self._keep_alive = function, context, keep_alive
        self._layout = struct.Struct("@" + parameters)
        self._values = ctypes.create_string_buffer(self._layout.size)
        fields = _FIELD.findall(parameters)
        ends = [struct.calcsize("@" + "".join(fields[: i + 1])) for i in range(len(fields))]
        starts = [end - struct.calcsize("@" + field) for end, field in zip(ends, fields, strict=True)]
        base = ctypes.addressof(self._values)
        self._pointers = (ctypes.c_void_p * len(starts))(*(base + start for start in starts))
        self._configs: dict[tuple[Any, ...], Any] = {}
        self._lock = threading.Lock()

    def launch(
        self,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: tuple[int | float | bytes, ...],
        shared_bytes: int = 0,
        stream: int = 0,
        early: bool = False,
        cluster: int = 1,
    ) -> None:
        """Enqueue on `stream`, a CUstream as an integer (`current_stream`); tensors are passed as `data_ptr()`.

        early: the blocks may start while the kernel before still runs (programmatic dependent launch). The kernel must
        then execute `griddepcontrol.wait` before it touches anything that an earlier kernel reads or writes.
        cluster: neighbouring blocks along x that share a cluster (sm_90 and later); divides the grid.
        """
        driver = self._driver
        with self._lock:  # the argument buffer is one per kernel
            shape = (grid, block, shared_bytes, early, cluster)
            config = self._configs.get(shape)
            if config is None:
                config = self._configs[shape] = self._config(*shape)
            config.hStream = stream
            self._layout.pack_into(self._values, 0, *arguments)
            (status,) = driver.cuLaunchKernelEx(config, self._function, ctypes.addressof(self._pointers), 0)
            if status == driver.CUresult.CUDA_ERROR_INVALID_CONTEXT:  # a fresh thread, as those of a backward pass are
                _driver_ok(driver.cuCtxSetCurrent(self._context))
                (status,) = driver.cuLaunchKernelEx(config, self._function, ctypes.addressof(self._pointers), 0)
        if status:
            _driver_ok((status,))

    def _config(
        self, grid: tuple[int, ...], block: tuple[int, ...], shared_bytes: int, early: bool, cluster: int
    ) -> Any:
        driver = self._driver
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = block
        config.sharedMemBytes = shared_bytes
        attributes = []
        if early:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            attributes.append(attribute)
        if cluster > 1:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            dimension = attribute.value.clusterDim
            dimension.x, dimension.y, dimension.z = cluster, 1, 1
            attributes.append(attribute)
        config.attrs, config.numAttrs = attributes, len(attributes)
        return config

    def clusters_at_once(self, block: tuple[int, int, int], shared_bytes: int, cluster: int) -> int:
        """How many clusters of this many blocks the current device can run at the same time."""
        config = self._config((cluster, 1, 1), block, shared_bytes, False, cluster)
        return _driver_ok(self._driver.cuOccupancyMaxActiveClusters(self._function, config))


@cache
def load_kernel(
    name: str,
    function: str,
    parameters: str,
    device: torch.device,
    defines: tuple[tuple[str, int | str], ...] = (),
    shared_bytes: int = 0,
) -> Kernel:
    """The function of the file `name`, compiled with `defines` for `device` (with its index) and loaded there.

    shared_bytes: the most dynamic shared memory that a launch will ask for. Loaded once per process; call it before a
    graph is captured.
    """
    driver = require("cuda.bindings.driver", "cuda")
    cubin = cached_cubin(name, architecture_of(device), dict(defines), cache_directory())
    with torch.cuda.device(device):
        context = _driver_ok(driver.cuDevicePrimaryCtxRetain(device.index))  # torch's own
        _driver_ok(driver.cuCtxSetCurrent(context))
        module = _driver_ok(driver.cuModuleLoadData(cubin))
        loaded = _driver_ok(driver.cuModuleGetFunction(module, function.encode()))
        if shared_bytes > 32 * 1024:  # with what the source declares it may be more than the 48 KB a block gets unasked
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _driver_ok(driver.cuFuncSetAttribute(loaded, attribute, shared_bytes))
    return Kernel(loaded, parameters, context, module)


def current_stream(device: torch.device) -> int:
    """torch's current stream on `device` (with its index) as the integer that `Kernel.launch` takes."""
    return torch._C._cuda_getCurrentRawStream(device.index)


def _sources(name: str) -> dict[str, str]:
    """File name -> text of `name` and of everything that it includes from this folder."""
    texts: dict[str, str] = {}
    waiting = [name]
    while waiting:
        file = waiting.pop()
        if file not in texts:
            texts[file] = (SOURCES / file).read_text(encoding="utf-8")
            waiting += _INCLUDE.findall(texts[file])
    return texts


def _define_flags(defines: Defines) -> tuple[str, ...]:
    return tuple(f"-D{name}={value}" for name, value in sorted(defines.items()))


def _nvrtc() -> Any:
    return require("cuda.bindings.nvrtc", "cuda")


@cache
def _nvrtc_version() -> tuple[int, int]:
    status, major, minor = _nvrtc().nvrtcVersion()
    _nvrtc_ok((status,))
    return major, minor


def _nvrtc_ok(answer: tuple[Any, ...]) -> Any:
    status, *result = answer
    if int(status) != 0:
        raise RuntimeError(f"NVRTC answered {status.name}")
    return result[0] if result else None


def _driver_ok(answer: tuple[Any, ...]) -> Any:
    status, *result = answer
    if int(status) == _NOT_INITIALIZED and torch.cuda._is_in_bad_fork():  # type: ignore[attr-defined]
        raise RuntimeError(
            "CUDA was started before this process was forked, and can't be used in the child; start processes with "
            'multiprocessing.get_context("spawn")'
        )
    if int(status) != 0:
        raise RuntimeError(f"the CUDA driver answered {status.name}")
    return result[0] if result else None
