"""Runs a .cu file of lowbit without a GPU: g++ compiles it against emulated.hpp, ctypes calls it.

`EmulatedKernel` has the launch method of `lowbit.kernels.cuda.compiler.Kernel`, so a launcher can be tested as it is.
"""

import ctypes
import hashlib
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

from lowbit.kernels.cuda.compiler import SOURCES

GXX = shutil.which("g++")
HEADER = Path(__file__).with_name("emulated.hpp")


class Map(ctypes.Structure):
    """128 bytes by value, as emulated.hpp reads them."""

    _fields_ = (("address", ctypes.c_uint64), ("rows", ctypes.c_int), ("row_bytes", ctypes.c_int),
                ("box_rows", ctypes.c_int), ("unused", ctypes.c_uint8 * 108))  # fmt: skip


_C_TYPES = {"P": ctypes.c_void_p, "i": ctypes.c_int, "f": ctypes.c_float, "128s": lambda made: made}
Defines = tuple[tuple[str, int | str], ...]


def _entry(source: str, function: str) -> str:
    """C++ that calls `function` of the source for a grid; its parameters follow those of the launch."""
    found = re.search(rf"\b{function}\((.*?)\)\s*{{", source, re.DOTALL)
    assert found is not None
    parameters = " ".join(found[1].split())
    names = ", ".join(parameter.split()[-1].lstrip("*") for parameter in parameters.split(","))
    return (
        f'extern "C" void launch(int gx, int gy, int threads, int cluster, int bytes, int eager, {parameters}) {{\n'
        f"    emulate({{gx, gy, 1}}, threads, cluster, bytes, eager, [=] {{ {function}({names}); }});\n}}\n"
    )


@cache
def build(name: str, function: str, defines: Defines, architecture: int, folder: Path) -> ctypes.CDLL:
    """The compiled file as a library; architecture as in __CUDA_ARCH__: 750, 800, 900."""
    assert GXX is not None
    source = SOURCES / name
    flags = [f"-D{key}={value}" for key, value in (*defines, ("__CUDA_ARCH__", architecture))]
    key = hashlib.sha256(repr((name, function, flags)).encode()).hexdigest()[:16]
    wrapper, library = folder / f"{key}.cpp", folder / f"{key}.so"
    wrapper.write_text(f'#include "{source}"\n{_entry(source.read_text(encoding="utf-8"), function)}', encoding="utf-8")
    command = [GXX, "-std=c++17", "-O1", "-w", "-shared", "-fPIC", *flags, "-include", str(HEADER), str(wrapper)]
    done = subprocess.run([*command, "-o", str(library)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:3000]
    return ctypes.CDLL(str(library))


class EmulatedKernel:
    """A kernel that is compiled when it is first launched; eager: when its copies land, see emulated.hpp."""

    def __init__(
        self, name: str, function: str, parameters: str, defines: Defines, how: tuple[int, bool, Path]
    ) -> None:
        self.what, self.parameters = (name, function, defines), parameters
        self.architecture, self.eager, self.folder = how

    def clusters_at_once(self, block: tuple[int, int, int], shared_bytes: int, cluster: int) -> int:
        return 2

    def launch(
        self,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: tuple[int | float, ...],
        shared_bytes: int = 0,
        stream: int = 0,
        early: bool = False,
        cluster: int = 1,
    ) -> None:
        library = build(*self.what, self.architecture, self.folder)
        shape = (grid[0], grid[1], block[0], cluster, shared_bytes, int(self.eager))
        fields = re.findall(r"\d*[a-zA-Z]", self.parameters)
        typed = [_C_TYPES[letter](value) for letter, value in zip(fields, arguments, strict=True)]
        library.launch(*map(ctypes.c_int, shape), *typed)
