"""int8 products and quantization on a CUDA device. Oracles: float64 products of integers, exact below 2^53, and
numerics/affine.py on the CPU.
"""

import pytest
import torch
from torch import Tensor

from lowbit.kernels.cuda import int8_decode, int8_ladder, int8_prefill
from lowbit.kernels.int8 import Scaling, pad_columns
from lowbit.kernels.registry import explain, use
from lowbit.nn.linear import QuantLinear
from lowbit.numerics.affine import choose_scale, encode, value_range
from lowbit.numerics.scheme import QuantScheme
from lowbit.tensors import PackedWeight

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from lowbit.kernels.triton import fp8_quantize, int8_linear, int8_quantize  # noqa: E402

SHAPES = [(1, 17, 17), (17, 1, 576), (1, 4095, 576), (3, 64, 1), (16, 200, 4095), (65, 576, 1000), (130, 4095, 576),
          (300, 520, 4095)]  # fmt: skip
PRODUCTS = {
    **{rung.name: (lambda q, w, s, r=rung: int8_ladder.product(r, q, w, s)) for rung in int8_ladder.RUNGS},
    "decode": int8_decode.decode,
    "prefill": int8_prefill.prefill,
    "triton": int8_linear.product,
}
HOPPER = torch.cuda.get_device_capability() == (9, 0)


def _operands(M: int, N: int, K: int) -> tuple[Tensor, Tensor, Tensor]:  # noqa: N803
    """(q, codes, their exact product), rows padded."""
    generator = torch.Generator("cuda").manual_seed(M * 7 + N * 3 + K)
    q = torch.randint(-128, 128, (M, K), generator=generator, device="cuda", dtype=torch.int8)
    w = torch.randint(-128, 128, (N, K), generator=generator, device="cuda", dtype=torch.int8)
    return pad_columns(q), pad_columns(w), (q.double() @ w.double().T).to(torch.int32)


def _skip_unless_it_runs(name: str) -> None:
    if name in ("decode", "prefill") and not HOPPER:
        pytest.skip("wgmma exists on compute capability 9.0 alone")
    if name in int8_ladder.BY_NAME and (reason := int8_ladder.refusal(int8_ladder.BY_NAME[name], torch.device("cuda"))):
        pytest.skip(reason)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", PRODUCTS)
def test_int32_products_are_exact(name: str, shape: tuple[int, int, int]) -> None:
    _skip_unless_it_runs(name)
    q, w, exact = _operands(*shape)
    assert torch.equal(PRODUCTS[name](q, w, None), exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", [name for name in PRODUCTS if name not in ("naive", "dp4a", "wmma")])
def test_scales_zeros_and_bias_are_applied_on_the_way_out(name: str, dtype: torch.dtype) -> None:
    for shape in [(5, 17, 100), (128, 576, 576), (300, 520, 4095)]:
        _skip_unless_it_runs(name)
        q, w, exact = _operands(*shape)
        M, N = exact.shape  # noqa: N806
        x_zero = torch.randint(-128, 128, (M,), device="cuda", dtype=torch.int32)
        w_scale, bias = (torch.rand(N, device="cuda") * 0.01).to(dtype), torch.randn(N, device="cuda").to(dtype)
        per_token = Scaling(
            dtype, torch.rand(M, device="cuda") * 0.01, w_scale, x_zero, w.sum(1, dtype=torch.int32), bias
        )
        per_tensor = Scaling(dtype, torch.full((1,), 0.02, device="cuda"), torch.full((1,), 0.01, device="cuda"))
        for scaling in (per_token, per_tensor):
            got, wanted = PRODUCTS[name](q, w, scaling), scaling.apply(exact)
            assert got.dtype == dtype
            error = (got.double() - wanted.double()).norm() / wanted.double().norm()
            assert error < {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-6}[dtype]  # half a last bit


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-dynamic-asym"])
def test_codes_of_tokens_are_those_of_the_reference(scheme: str, dtype: torch.dtype) -> None:
    activations = QuantScheme.parse(scheme).activations
    assert activations is not None
    for rows, columns in [(1, 17), (7, 576), (3, 4095), (2, 28672)]:
        x = (torch.randn(rows, columns) * 3 + 1).to(dtype)
        made = int8_quantize.quantize_rows(x.cuda(), activations.symmetric)
        scale, zero = choose_scale(*value_range(x, activations), activations, dtype)
        assert torch.equal(made.q[:, :columns].cpu(), encode(x, scale, zero, activations))
        assert torch.equal(made.scale.cpu(), scale.float().flatten())
        assert zero is None or torch.equal(made.zero.cpu(), zero.to(torch.int32).flatten())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("scheme", ["fp8", "fp8-static", "fp8-tile128"])
def test_fp8_codes_are_those_of_the_reference(scheme: str, dtype: torch.dtype) -> None:
    activations = QuantScheme.parse(scheme).activations
    assert activations is not None
    x = (torch.randn(7, 1024) * 3).to(dtype)
    x[1], x[2], static = 0, x[2] * 1e-4, torch.tensor([0.017]).to(dtype)
    chosen = choose_scale(*value_range(x, activations), activations, dtype)[0] if activations.dynamic else static
    if scheme == "fp8-static":
        q, scale = fp8_quantize.quantize_static(x.cuda(), static.cuda()), static.cuda().float()
    elif scheme == "fp8":
        q, scale = fp8_quantize.quantize_rows(x.cuda())
    else:
        q, scale = (made[:7] for made in fp8_quantize.quantize_groups(x.cuda(), 128, 4))
    assert torch.equal(scale.cpu().flatten(), chosen.float().flatten())
    assert torch.equal(q.cpu().view(torch.uint8), encode(x, chosen, None, activations).view(torch.uint8))


def test_outlier_columns_wait_for_no_device() -> None:
    """A call that synchronized could not be captured in a graph."""
    x, w = torch.randn(40, 576, device="cuda").bfloat16(), torch.randn(320, 576, device="cuda").bfloat16()
    layer = QuantLinear.from_packed(PackedWeight.from_float(w, QuantScheme.parse("int8-t6"), torch.bfloat16))
    x[:, 5] = 60
    with torch.no_grad(), use("int8_outlier"):
        wanted = layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            made = layer(x)
        graph.replay()
    assert torch.equal(made, wanted)


@pytest.mark.parametrize("tile_n", [192, 256])
@pytest.mark.parametrize("shape", [(300, 520, 4095), (2048, 5120, 512), (65, 4095, 576)], ids=str)
def test_tiles_of_both_widths_are_exact(shape: tuple[int, int, int], tile_n: int) -> None:
    _skip_unless_it_runs("prefill")
    q, w, exact = _operands(*shape)
    assert torch.equal(int8_prefill.prefill(q, w, None, tile_n), exact)
    plain = Scaling(torch.bfloat16, torch.rand(len(q), device="cuda"), torch.rand(len(w), device="cuda"))
    got, wanted = int8_prefill.prefill(q, w, plain, tile_n).double(), plain.apply(exact).double()
    assert (got - wanted).norm() / wanted.norm() < 4e-3


@pytest.mark.parametrize("rows_first", [1, 8])
@pytest.mark.parametrize("shape", [(300, 520, 4096), (2100, 4096, 1024), (700, 1000, 8192), (513, 264, 14336),
                                   (257, 100, 28672)], ids=str)  # fmt: skip
def test_a_prefill_kernel_that_quantizes_gives_the_bits_of_two(shape: tuple[int, int, int], rows_first: int) -> None:
    _skip_unless_it_runs("prefill")
    M, N, K = shape  # noqa: N806
    x, (_, w, _) = torch.randn(M, K, device="cuda").bfloat16(), _operands(1, N, K)
    made = int8_quantize.quantize_rows(x)
    for bias in (None, torch.randn(N, device="cuda").bfloat16()):
        scaling = Scaling(torch.bfloat16, made.scale, torch.rand(N, device="cuda"), bias=bias)
        wanted = int8_prefill.prefill(made.q, w, scaling)
        for _ in range(3):
            assert torch.equal(int8_prefill.prefill_quantizing(x, w, scaling.w_scale, bias, rows_first), wanted)


@pytest.mark.parametrize("split", [1, 2, 8])
@pytest.mark.parametrize(("tokens", "rows"), [(8, 64), (64, 64), (64, 128), (128, 128)])
def test_parts_of_k_add_up_exactly(tokens: int, rows: int, split: int) -> None:
    _skip_unless_it_runs("decode")
    q, w, exact = _operands(tokens + 1, 200, 2064)
    stages = 3 if tokens == 128 else 4
    config = int8_decode.Decode(tokens, rows, stages, split)
    assert torch.equal(int8_decode.decode(q, w, None, config), exact)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("shape", [(700, 4096), (300, 14336), (150, 28672)], ids=str)
def test_codes_of_many_long_rows_and_of_tiny_and_huge_values(shape: tuple[int, int], symmetric: bool) -> None:
    activations = QuantScheme.parse("w8a8" if symmetric else "w8a8-dynamic-asym").activations
    assert activations is not None
    x = (torch.randn(shape) * 3 + 1).bfloat16()
    x[0], x[1], x[2] = x[0] * 1e-30, 0, x[2] * 1e30
    made = int8_quantize.quantize_rows(x.cuda(), symmetric)
    scale, zero = choose_scale(*value_range(x, activations), activations, x.dtype)
    assert torch.equal(made.q.cpu(), encode(x, scale, zero, activations))
    assert torch.equal(made.scale.cpu(), scale.float().flatten())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_fused_quantization_is_the_chain_but_for_ties(dtype: torch.dtype) -> None:
    """A last bit of exp or rsqrt may differ from torch's, and moves a code by one where it decides a rounding."""
    x, residual = (torch.randn(33, 4096, device="cuda").to(dtype) for _ in range(2))
    weight, smooth = torch.randn(4096, device="cuda").to(dtype), torch.rand(4096, device="cuda").to(dtype) + 0.5
    made, h = int8_quantize.rms_norm_quantize(x, weight, 1e-5, residual, smooth)
    assert torch.equal(h, x + residual)
    normed = (h.float() * torch.rsqrt(h.float().square().mean(-1, keepdim=True) + 1e-5)).to(dtype) * weight * smooth
    gated = torch.nn.functional.silu(x) * residual * smooth
    for got, y in [(made, normed), (int8_quantize.silu_product_quantize(x, residual, smooth), gated)]:
        wanted = int8_quantize.quantize_rows(y)
        difference = (got.q.int() - wanted.q.int()).abs()
        assert difference.max() <= 1
        assert (difference > 0).float().mean() < 0.01


FP8 = ["fp8", "fp8-tensor", "fp8-static", "fp8-tensor-static", "fp8-tile128"]
INT8 = ["w8a8", "w8a8-dynamic-asym", "w8a8-static", "w8a8-static-asym", "int8-t6"]


@pytest.mark.parametrize("scheme", [*INT8, *FP8])
@pytest.mark.parametrize("tokens", [1, 40, 700])
def test_a_layer_is_its_reference_by_every_kernel_that_runs_here(tokens: int, scheme: str) -> None:
    columns = 1024 if scheme == "fp8-tile128" else 576
    x, w = torch.randn(tokens, columns, device="cuda").bfloat16(), torch.randn(320, columns, device="cuda").bfloat16()
    x[:, 5] *= 20 if scheme == "int8-t6" else 1
    packed = PackedWeight.from_float(w, QuantScheme.parse(scheme), torch.bfloat16)
    grid = torch.tensor([0.03], device="cuda").bfloat16() if "static" in scheme else None
    zero = torch.tensor([-5], device="cuda", dtype=torch.int8) if scheme == "w8a8-static-asym" else None
    layer = QuantLinear.from_packed(packed, torch.randn(320, device="cuda").bfloat16(), grid, zero)
    with use("reference"):
        wanted = layer(x).double()
    ready = [name for name, reason in explain("wa8_linear", x, packed).items() if reason == "ready"]
    for kernel in ready:
        with use(kernel):
            got = layer(x).double()
        assert (got - wanted).norm() / wanted.norm() < 1e-2, kernel  # the reference rounds W and x to bfloat16 first
