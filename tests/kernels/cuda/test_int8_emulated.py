"""The int8 wgmma kernels where no GPU is: g++ compiles them against emulated_int8.hpp. Oracles: products of integers in
float64, exact below 2^53, and kernels/cpu.py for the codes of activations.
"""

import ctypes
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch
from emulator import GXX, Map
from torch import Tensor

from lowbit.kernels.cpu import quantize_tokens
from lowbit.kernels.cuda.compiler import SOURCES
from lowbit.kernels.cuda.int8_ladder import EPILOGUE, KINDS, epilogue_arguments
from lowbit.kernels.int8 import Scaling

pytestmark = pytest.mark.skipif(GXX is None, reason="g++ compiles the emulated kernels, and is not installed")
HEADER = Path(__file__).with_name("emulated_int8.hpp")
COPIES = pytest.mark.parametrize("eager", [True, False], ids=["eager", "lazy"])
_PARAMETERS = (
    "void *out, const float *x_scale, const int *x_zero, const void *w_scale, const int *w_sum, const void *bias, "
    "int x_stride, int w_stride, int w_kind, int bias_kind"
)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emulated_int8")


@cache
def build(function: str, defines: tuple[tuple[str, int], ...], folder: Path) -> ctypes.CDLL:
    source = SOURCES / f"{function}.cu"
    found = re.search(rf"\b{function}\((.*?)\)\s*{{", source.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    parameters = " ".join(found[1].split()).replace("EPILOGUE_PARAMETERS", _PARAMETERS)
    names = ", ".join(parameter.split()[-1].lstrip("*") for parameter in parameters.split(","))
    wrapper = folder / f"{function}-{abs(hash(defines))}.cpp"
    wrapper.write_text(
        f'#include "{source}"\n'
        f'extern "C" void launch(int wide, int high, int threads, int cluster, int eager, {parameters}) {{\n'
        f"    emulate({{wide, high, 1}}, threads, cluster, eager, [=] {{ {function}({names}); }});\n}}\n",
        encoding="utf-8",
    )
    assert GXX is not None
    flags = [f"-D{key}={value}" for key, value in defines]
    library = wrapper.with_suffix(".so")
    # contract: one rounding where the source says fmaf, else two. unique: emulated.hpp has variables of the same names
    options = ["-std=c++17", "-O1", "-w", "-ffp-contract=off", "-fno-gnu-unique", "-shared", "-fPIC"]
    command = [GXX, *options, *flags, "-include", str(HEADER)]
    done = subprocess.run([*command, str(wrapper), "-o", str(library)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:3000]
    return ctypes.CDLL(str(library))


def launch(
    function: str, defines: dict[str, int], folder: Path, shape: tuple[int, ...], fields: str, values: tuple
) -> None:
    library = build(function, tuple(sorted(defines.items())), folder)
    types = {"P": ctypes.c_void_p, "i": ctypes.c_int, "128s": lambda made: made}
    typed = [types[field](value) for field, value in zip(re.findall(r"\d*[a-zA-Z]", fields), values, strict=True)]
    library.launch(*map(ctypes.c_int, shape), *typed)


def tensor_map(matrix: Tensor, box_rows: int) -> Map:
    return Map(matrix.data_ptr(), *matrix.shape, box_rows)


def problem(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Scaling]:
    """(x, its codes, w, the scaling of their product); the codes are those of x."""
    M, N, K = shape  # noqa: N806
    generator = torch.Generator().manual_seed(M + N + K)
    x = torch.randn(M, K, generator=generator).to(dtype)
    x[0], x[-1] = x[0] * 1e-30, 0
    w = torch.randint(-128, 128, (N, K), generator=generator).to(torch.int8)
    q, scale = quantize_tokens(x)
    bias = torch.randn(N, generator=generator).to(dtype)
    return x, q, w, Scaling(dtype, scale.float().flatten(), torch.rand(N, generator=generator) * 0.01, bias=bias)


def compare(y: Tensor, q: Tensor, w: Tensor, scaling: Scaling) -> None:
    wanted = scaling.apply((q.double() @ w.double().T).to(torch.int32))
    torch.testing.assert_close(y.float(), wanted.float(), rtol=2.0**-7, atol=1e-6)  # a last bit: one rounding for two
    assert (y != wanted).float().mean() < 1e-3


DECODE = [  # shape, tokens, rows, split
    ((3, 100, 528), 8, 64, 1),
    ((9, 72, 1040), 16, 64, 2),
    ((20, 130, 528), 32, 128, 2),
    ((3, 70, 1040), 8, 64, 4),
]


@COPIES
@pytest.mark.parametrize(("shape", "tokens", "rows", "split"), DECODE, ids=str)
def test_few_tokens(shape: tuple[int, int, int], tokens: int, rows: int, split: int, eager: bool, folder: Path) -> None:
    x, q, w, scaling = problem(shape, torch.float16 if tokens == 16 else torch.bfloat16)
    y = torch.full(shape[:2], torch.nan, dtype=x.dtype)
    defines = {"KIND": KINDS[x.dtype], "TOKENS": tokens, "ROWS": rows, "STAGES": 3, "SPLIT": split}
    grid = -(-shape[1] // rows) * split, -(-shape[0] // tokens), rows * 2 + 32, split, int(eager)
    maps = tensor_map(q, tokens), tensor_map(w, rows)
    values = (*maps, *epilogue_arguments(y, scaling), *shape)
    launch("int8_wgmma_decode", defines, folder, grid, "128s128s" + EPILOGUE + "iii", values)
    compare(y, q, w, scaling)


def test_integers_of_few_tokens_are_exact(folder: Path) -> None:
    _, q, w, _ = problem((17, 130, 528), torch.bfloat16)
    y = torch.full((17, 130), 7, dtype=torch.int32)
    defines = {"KIND": 0, "TOKENS": 32, "ROWS": 64, "STAGES": 2, "SPLIT": 1}
    values = (tensor_map(q, 32), tensor_map(w, 64), *epilogue_arguments(y, None), 17, 130, 528)
    launch("int8_wgmma_decode", defines, folder, (3, 1, 160, 1, 1), "128s128s" + EPILOGUE + "iii", values)
    assert torch.equal(y, (q.double() @ w.double().T).to(torch.int32))


PREFILL = [  # shape, tile_n, warps that hold a row, quantizes
    ((130, 264, 144), 256, 1, False),
    ((70, 251, 144), 192, 1, False),
    ((300, 264, 272), 256, 1, True),
    ((530, 72, 144), 192, 4, True),
]


@COPIES
@pytest.mark.parametrize(("shape", "tile_n", "warps", "quantizes"), PREFILL, ids=str)
def test_many_tokens(
    shape: tuple[int, int, int], tile_n: int, warps: int, quantizes: bool, eager: bool, folder: Path
) -> None:
    x, q, w, scaling = problem(shape, torch.bfloat16)
    y = torch.full(shape[:2], torch.nan, dtype=x.dtype)
    made, counters = torch.zeros_like(q), torch.zeros(64, dtype=torch.int32)
    defines = {"KIND": 2, "TILE_N": tile_n, "FIRST": 1, "GROUP": 2, "WARPS": warps, "ALIGNED": int(shape[1] % 8 == 0)}
    clusters = min(2, -(-shape[0] // 256) * -(-shape[1] // tile_n))
    maps = tensor_map(made if quantizes else q, 128), tensor_map(w, tile_n // 2)
    more = x.data_ptr(), x.stride(0), made.data_ptr(), counters.data_ptr()
    values = (*maps, *epilogue_arguments(y, scaling), *shape, *more)
    grid = clusters * 2, 1, 384, 2, int(eager)
    launch(
        "int8_wgmma", defines | {"QUANTIZE": int(quantizes)}, folder, grid, "128s128s" + EPILOGUE + "iiiPiPP", values
    )
    compare(y, q, w, scaling)
    if quantizes:
        assert torch.equal(made, q)
        assert not counters.any()  # left as the next launch needs them
