"""The weight-only kernels on a GPU; the oracle is the product with the dequantized weight in float64."""

import gc
import os

import pytest
import torch
from torch import Tensor

from lowbit.kernels import layout, registry
from lowbit.kernels.cuda import wna16_dequantize, wna16_layout, wna16_wgmma
from lowbit.kernels.ops import quantized_linear
from lowbit.nn.linear import QuantLinear
from lowbit.numerics.scheme import QuantScheme
from lowbit.tensors import PackedWeight

pytestmark = pytest.mark.gpu
KERNELS = ("cuda_mma", "cuda_wgmma", "cuda_dequantize")
SCHEMES = (
    *("w2a16-g64", "w3a16-g32-asym", "w4a16-g128", "w4a16-g128-asym", "w4a16-g16", "w4a16", "w6a16-g32"),
    *("w8a16", "w8a16-g64-asym", "nf4-b64", "nf4-b64-dq", "fp4-b256"),
)
# M, N, K: one tile; the demo model's; ragged rows; fewer records than warps; split over K; several token tiles
SHAPES = ((1, 512, 1024), (5, 576, 1536), (8, 200, 640), (16, 192, 768), (12, 4096, 14336), (70, 328, 2048))


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").to(dtype)


def weight_of(scheme: str, rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> PackedWeight:
    return PackedWeight.from_float(random(rows, columns, dtype=dtype) * 0.02, QuantScheme.parse(scheme), dtype)


def exact(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    y = x.double() @ weight.dequantize().double().T
    return y if bias is None else y + bias.double()


def relative_error(y: Tensor, expected: Tensor) -> float:
    return float((y.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_product_is_right_on_every_shape_and_the_same_bits_twice(
    kernel: str, scheme: str, dtype: torch.dtype
) -> None:
    for tokens, rows, columns in SHAPES:
        weight, x = weight_of(scheme, rows, columns, dtype), random(tokens, columns, dtype=dtype, seed=1)
        bias = random(rows, dtype=dtype, seed=2)
        with registry.use(kernel):
            if reason := dict(registry.explain("wna16_linear", x, weight))[kernel].replace("ready", ""):
                pytest.skip(reason)
            poison = torch.full((tokens, rows), torch.nan, dtype=dtype, device="cuda")
            del poison
            y = quantized_linear(x, weight, bias)
            # bf16 rounds y, and for nf4 the levels: 2^-9 / sqrt(3) = 1.1e-3 each, added in squares
            limit = 3e-3 if dtype == torch.bfloat16 else 1e-3
            assert relative_error(y, exact(x, weight, bias)) < limit, (tokens, rows, columns)
            assert torch.equal(y, quantized_linear(x, weight, bias)), (tokens, rows, columns)


@pytest.mark.parametrize("tokens", [9, 32, 64, 130])
@pytest.mark.parametrize("scheme", ["w4a16-g128", "w8a16", "nf4-b64"])
def test_wgmma_is_right_with_every_tile_and_number_of_workers(
    monkeypatch: pytest.MonkeyPatch, scheme: str, tokens: int
) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("wgmma exists on compute capability 9.0 alone")
    weight, x = weight_of(scheme, 1352, 1920), random(tokens, 1920, seed=1)
    form, expected = layout.form_of(weight), exact(x, weight)
    for tile in wna16_wgmma.tiles_of(form, tokens):
        tiles = wna16_wgmma.tiles_in(tile, weight.shape, tokens)
        for workers, spread in ((1, False), (3, False), (8, False), (29, False), (66, False), (3 * tiles, True)):
            plan = wna16_wgmma.plan_for(tile, form, weight.shape, tokens, x.dtype, x.device, workers, spread)
            monkeypatch.setattr(wna16_wgmma, "plan_of", lambda *arguments, plan=plan: plan)
            y = wna16_wgmma.linear(x, weight, None)
            assert relative_error(y, expected) < 3e-3, (tile, workers, spread)
            assert torch.equal(y, wna16_wgmma.linear(x, weight, None)), (tile, workers, spread)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_layout_made_on_the_gpu_is_that_of_its_readable_twin(scheme: str) -> None:
    weight = weight_of(scheme, 200, 640 if "128" not in scheme else 768)
    assert torch.equal(wna16_layout.derive(weight).records, layout.records(weight))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_dequantize_gives_the_weight(scheme: str) -> None:
    weight, like = weight_of(scheme, 200, 768), random(1, 768)
    w, expected = wna16_dequantize.dequantize(like, weight), weight.dequantize(torch.bfloat16)
    if layout.form_of(weight).codes == "lut":
        torch.testing.assert_close(w, expected, rtol=2**-7, atol=0)  # an absmax of 11 bits may move a rounding by one
    else:
        assert torch.equal(w, expected)


def test_odd_sizes_work_where_the_scheme_allows_them() -> None:
    weight, x = weight_of("w4a16-asym", 33, 1001), random(3, 1001)
    for kernel in ("cuda_mma", "cuda_dequantize"):
        with registry.use(kernel):
            assert relative_error(quantized_linear(x, weight), exact(x, weight)) < 3e-3
    assert "16 bytes" in registry.explain("wna16_linear", x, weight)["cuda_wgmma"]


def test_a_gradient_flows_to_x() -> None:
    weight, x = weight_of("nf4-b64", 256, 512), random(7, 512).requires_grad_()
    dy = random(7, 256, seed=3)
    quantized_linear(x, weight).backward(dy)
    assert x.grad is not None
    assert relative_error(x.grad, dy.double() @ weight.dequantize().double()) < 4e-3


@pytest.mark.parametrize("tokens", [1, 16, 64, 300])
def test_a_graph_replays_with_new_contents_and_compile_sees_one_op(tokens: int) -> None:
    layer = QuantLinear.from_packed(weight_of("w4a16-g128", 512, 1024), random(512))
    x = random(tokens, 1024)
    expected = layer(x)
    compiled = torch.compile(layer, fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, rtol=0, atol=0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(layer(x)[:, :512].repeat(1, 2))
    x.copy_(random(tokens, 1024, seed=5))
    graph.replay()
    assert torch.equal(y, layer(layer(x)[:, :512].repeat(1, 2)))


def test_capturing_a_layer_that_never_ran_says_to_run_it_once() -> None:
    layer = QuantLinear.from_packed(weight_of("w4a16-g128", 256, 256))
    x = random(1, 256)
    with pytest.raises(RuntimeError, match="run a quantized layer once"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        layer(x)


def test_streams_may_share_a_weight() -> None:
    weight = weight_of("w4a16-g128", 4096, 14336)
    xs = [random(12, 14336, seed=seed) for seed in range(8)]
    expected = [quantized_linear(x, weight) for x in xs]
    streams = [torch.cuda.Stream() for _ in xs]
    torch.cuda.synchronize()
    found = []
    for x, stream in zip(xs, streams, strict=True):
        with torch.cuda.stream(stream):
            found.append(quantized_linear(x, weight))
    torch.cuda.synchronize()
    assert all(torch.equal(y, like) for y, like in zip(found, expected, strict=True))


def test_the_fast_layout_is_made_once_and_gone_when_the_layer_moves() -> None:
    gc.collect()
    before = len(layout._fast)
    layer = QuantLinear.from_packed(weight_of("w4a16-g128", 256, 256))
    x = random(1, 256)
    layer(x)
    layer(x)
    assert len(layout._fast) == before + 1
    assert all("fast" not in name for name in layer.state_dict())
    layer.to("cpu")
    gc.collect()
    assert len(layout._fast) == before


def test_a_second_gpu_works_beside_the_first() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU here")
    weight = weight_of("w4a16-g128", 256, 256)
    there = PackedWeight(weight.scheme, weight.shape, weight.codes.to("cuda:1"), weight.scale.to("cuda:1"))
    x = random(2, 256)
    assert torch.equal(quantized_linear(x, weight).cpu(), quantized_linear(x.to("cuda:1"), there).cpu())


def test_a_forked_child_gets_an_error_in_words() -> None:
    weight, x = weight_of("w4a16-g128", 256, 256), random(1, 256)
    quantized_linear(x, weight)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            quantized_linear(x, weight)
            os.write(write, b"no error")
        except RuntimeError as error:
            os.write(write, str(error).encode()[:500])
        os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    assert b"fork" in os.read(read, 500)
