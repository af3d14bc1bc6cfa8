"""The weight-only kernels' logic where no GPU is, by emulated.hpp; the oracle is the product in float64.

What the emulator can't see: speed, and whether an instruction is used as the hardware wants it. tests/gpu does.
"""

from collections.abc import Callable

import emulator
import pytest
import torch
from torch import Tensor

from lowbit.kernels import layout
from lowbit.kernels.cuda import wna16_dequantize, wna16_layout, wna16_mma, wna16_wgmma
from lowbit.kernels.cuda.device import Gpu
from lowbit.numerics.codebook import levels_of
from lowbit.numerics.scheme import QuantScheme
from lowbit.numerics.storage import storage_of
from lowbit.tensors import PackedWeight

pytestmark = pytest.mark.skipif(emulator.GXX is None, reason="the emulator needs g++")
Emulate = Callable[[int, bool], None]
GPUS = {900: Gpu((9, 0), 2, 232448), 800: Gpu((8, 0), 2, 166912), 750: Gpu((7, 5), 2, 65536)}
HALF, BFLOAT = torch.float16, torch.bfloat16


@pytest.fixture
def emulate(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Emulate:
    folder = tmp_path_factory.getbasetemp()

    def on(architecture: int, eager: bool) -> None:
        def load(
            name: str, function: str, parameters: str, device: torch.device, defines: tuple, shared_bytes: int = 0
        ):
            return emulator.EmulatedKernel(name, function, parameters, defines, (architecture, eager, folder))

        for module in (wna16_mma, wna16_wgmma, wna16_dequantize, wna16_layout):
            monkeypatch.setattr(module, "load_kernel", load)
            monkeypatch.setattr(module, "current_stream", lambda device: 0)
            monkeypatch.setattr(module, "gpu_of", lambda device: GPUS[architecture], raising=False)
        monkeypatch.setattr(wna16_wgmma, "tensor_map", emulator.Map)
        for cached in (wna16_mma.plan_of, wna16_mma.sum_kernel, wna16_wgmma.plan_of, wna16_dequantize.kernel):
            cached.cache_clear()

    return on


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weight_of(scheme: str, rows: int, columns: int, dtype: torch.dtype) -> PackedWeight:
    return PackedWeight.from_float(random(rows, columns, dtype=torch.float32) * 0.02, QuantScheme.parse(scheme), dtype)


def fast_of(weight: PackedWeight) -> layout.FastWeight:
    form = layout.form_of(weight)
    _, factor, _ = layout.normalized_scales(weight, form)
    levels = None
    if form.codes == "lut":
        table = levels_of(weight.scheme.weights.format.name)
        levels = {dtype: table.to(dtype) for dtype in (HALF, BFLOAT, torch.float32)}
    return layout.FastWeight(form, layout.records(weight), factor, levels)


def check(product: Callable, scheme: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    tokens, rows, columns = shape
    weight, x = weight_of(scheme, rows, columns, dtype), random(tokens, columns, dtype=dtype, seed=1)
    bias = random(rows, dtype=dtype, seed=2)
    y = product(x, fast_of(weight), weight.shape, bias).double()
    exact = x.double() @ weight.dequantize().double().T + bias.double()
    error = float((y - exact).norm() / exact.norm())
    assert error < (3e-3 if dtype == BFLOAT else 1e-3), error


MMA = (
    # architecture, copies eager, scheme, (M, N, K), dtype
    (900, True, "w4a16-g128", (3, 200, 2560), BFLOAT),  # several units a block, rings refilled, ragged rows
    (900, False, "w4a16-g32-asym", (11, 40, 320), HALF),  # two token tiles, K not whole records
    (900, True, "nf4-b64", (8, 40, 640), BFLOAT),  # the table among the rings
    (900, False, "w8a16-g64-asym", (2, 104, 2176), BFLOAT),  # rings refilled, late copies
    (900, True, "w2a16-g16", (20, 24, 256), HALF),  # token blocks; fewer records than warps
    (900, True, "w4a16-g128", (1, 16, 1024), BFLOAT),  # a block without rows
    (900, False, "nf4-b64", (16, 24, 10240), BFLOAT),  # a cluster that splits K, with a table
    (800, False, "w4a16-g128-asym", (16, 40, 6144), BFLOAT),  # partial sums and wna16_sum; cp.async
    (800, True, "w8a16", (1, 40, 257), HALF),  # odd K, no vectors
    (750, True, "w3a16-g64-asym", (5, 40, 512), HALF),  # no ring
)


@pytest.mark.parametrize(("architecture", "eager", "scheme", "shape", "dtype"), MMA)
def test_mma_computes_the_product(
    emulate: Emulate, architecture: int, eager: bool, scheme: str, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    emulate(architecture, eager)
    check(wna16_mma._linear, scheme, shape, dtype)


WGMMA = (
    # copies eager, workers (negative: they finish tiles together), scheme, (M, N, K), dtype
    (True, 3, "w4a16-g128", (40, 600, 768), BFLOAT),  # ragged rows and tokens, tiles of 64, a tile over two blocks
    (False, 2, "w4a16-g32-asym", (17, 56, 1152), HALF),  # one tile in two, three rounds of stages, copies late,
    (True, 1, "w4a16-g64", (3, 40, 1152), BFLOAT),  # and early
    (False, 5, "nf4-b64", (9, 264, 1088), BFLOAT),  # a block inside a tile, pieces of two tiles in one block
    (True, 2, "w8a16-g64-asym", (70, 130, 1024), BFLOAT),  # three stages
    (True, 3, "w2a16-g16", (390, 264, 208), HALF),  # whole tiles after the shared ones
    (False, 7, "w4a16-g128", (5, 257, 1920), BFLOAT),  # an odd number of rows
    (True, -6, "w4a16-g128", (70, 280, 640), BFLOAT),  # six workers finish two tiles together
    (False, -4, "w4a16-g64-asym", (40, 280, 640), HALF),
)


@pytest.mark.parametrize(("eager", "workers", "scheme", "shape", "dtype"), WGMMA)
def test_wgmma_computes_the_product(
    emulate: Emulate, monkeypatch: pytest.MonkeyPatch, eager: bool, workers: int, scheme: str,
    shape: tuple[int, int, int], dtype: torch.dtype,
) -> None:  # fmt: skip
    emulate(900, eager)
    monkeypatch.setattr(wna16_wgmma, "workers_of", lambda tile, *sizes: [(abs(workers), workers < 0)])
    check(wna16_wgmma._linear, scheme, shape, dtype)


@pytest.mark.parametrize("tokens", [8, 16])
@pytest.mark.parametrize("scheme", ["w4a16-g32-asym", "w4a16-g128", "w8a16", "nf4-b64", "w2a16-g16"])
def test_wgmma_may_scale_the_sums_of_groups(
    emulate: Emulate, monkeypatch: pytest.MonkeyPatch, scheme: str, tokens: int
) -> None:
    emulate(900, tokens == 8)
    dtype = HALF if "g32" in scheme else BFLOAT

    def tiles_of(form: layout.FastForm, tokens: int) -> tuple[wna16_wgmma.Tile, ...]:
        return (wna16_wgmma.tile_for(form, tokens, 2, scales_sums=True),)

    monkeypatch.setattr(wna16_wgmma, "tiles_of", tiles_of)
    monkeypatch.setattr(wna16_wgmma, "workers_of", lambda tile, *sizes: [(3, False)])
    check(wna16_wgmma._linear, scheme, (tokens, 264, 640), dtype)


@pytest.mark.parametrize("scheme", ["w3a16-g32-asym", "w4a16", "w8a16-g64", "nf4-b64"])
def test_layout_and_dequantize_are_their_twins(emulate: Emulate, scheme: str) -> None:
    emulate(900, True)
    rows, columns = 40, 320
    weight = weight_of(scheme, rows, columns, BFLOAT)
    form = layout.form_of(weight)
    scales, _, zeros = layout.normalized_scales(weight, form)
    bits = wna16_layout.NIBBLES if storage_of(weight.scheme) == "nibbles" else weight.scheme.weights.bits
    made = torch.empty(1, 3, 16, form.record_bytes, dtype=torch.uint8)
    pointers = (weight.codes.data_ptr(), scales.data_ptr(), 0 if zeros is None else zeros.data_ptr(), 0)
    sizes = (rows, columns, 0 if bits == wna16_layout.NIBBLES else weight.codes.shape[-1])
    kernel = wna16_layout.layout_kernel(form, bits, torch.device("cpu"))
    kernel.launch((2, 16, 1), (256, 1, 1), (*pointers, made.data_ptr(), *sizes))
    assert torch.equal(made, layout.records(weight))
    w = wna16_dequantize._dequantize(fast_of(weight), weight.shape, BFLOAT)
    rtol = 2**-7 if form.codes == "lut" else 0  # an absmax of 11 bits may move a rounding by one
    torch.testing.assert_close(w, weight.dequantize(BFLOAT), rtol=rtol, atol=0)


@pytest.mark.parametrize("has_bias", [True, False])
def test_the_product_may_go_by_parts_of_the_dequantized_weight(
    emulate: Emulate, monkeypatch: pytest.MonkeyPatch, has_bias: bool
) -> None:
    emulate(900, True)
    monkeypatch.setattr(wna16_dequantize, "_PART_BYTES", 2 * 300 * 320)
    weight, x = weight_of("w4a16-g64", 600, 320, BFLOAT), random(5, 320, dtype=BFLOAT, seed=1)
    bias = random(600, dtype=BFLOAT, seed=2) if has_bias else None
    y = wna16_dequantize._linear(x, fast_of(weight), weight.shape, bias)
    expected = torch.nn.functional.linear(x, weight.dequantize(BFLOAT), bias)
    torch.testing.assert_close(y, expected, rtol=2**-7, atol=1e-3)
