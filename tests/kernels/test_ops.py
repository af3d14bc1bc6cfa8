"""The op as torch sees it. Oracles: torch.library.opcheck for schema, shapes and dispatch; autograd through the
dequantized weight in float for gradients."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from lowbit.kernels import reference
from lowbit.kernels.ops import quantized_linear
from lowbit.nn.linear import QuantLinear
from lowbit.numerics.scheme import QuantScheme
from lowbit.tensors import PackedWeight

TEXTS = ["w4a16-g32", "w4a16-g32-asym", "w8a16", "w8a8", "w8a8-dynamic-asym", "w8a8-static-asym", "fp8", "nf4-b64-dq"]
each_scheme = pytest.mark.parametrize("text", TEXTS)
N, K = 17, 96


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(text: str) -> PackedWeight:
    return PackedWeight.from_float(random(N, K, seed=1), QuantScheme.parse(text), torch.float32)


def static_grid(text: str) -> tuple[Tensor | None, Tensor | None]:
    """(scale, zero) [1] that an observer would have found, where the scheme wants one."""
    if "static" not in text:
        return None, None
    return torch.tensor([0.02]), torch.tensor([4], dtype=torch.int8)


def arguments(text: str, x: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
    """What the op itself is called with."""
    weight = made(text)
    named = weight.tensors()
    return x, list(named.values()), list(named), bias, *static_grid(text), text, N, K


@each_scheme
@pytest.mark.parametrize("has_bias", [False, True], ids=["", "bias"])
def test_torch_finds_nothing_wrong_with_the_op(text: str, has_bias: bool) -> None:
    bias = random(N, seed=2) if has_bias else None
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    checks = checks[1:] if text == "fp8" else checks  # test_schema multiplies fp8 numbers, which torch can't
    for x in (random(5, K), random(2, 3, K).bfloat16(), random(2, 3, K).transpose(0, 1)):
        like_x = None if bias is None else bias.to(x.dtype)
        torch.library.opcheck(torch.ops.lowbit.quantized_linear.default, arguments(text, x, like_x), test_utils=checks)


def test_the_schema_writes_to_nothing_and_returns_nothing_it_was_given() -> None:
    schema = torch.ops.lowbit.quantized_linear.default._schema
    assert not schema.is_mutable
    assert not any(argument.alias_info for argument in [*schema.arguments, *schema.returns])
    assert re.fullmatch(r"lowbit::quantized_linear\(.*\) -> Tensor", str(schema))


@each_scheme
@pytest.mark.parametrize("shape", [(K,), (1, K), (5, K), (2, 3, K), (0, K), (2, 0, K)], ids=str)
def test_any_leading_shape_gives_the_same_rows(text: str, shape: tuple[int, ...]) -> None:
    x, weight, static = random(*shape), made(text), static_grid(text)
    y = quantized_linear(x, weight, None, *static)
    assert y.shape == (*shape[:-1], N)
    assert torch.equal(y, quantized_linear(x.reshape(-1, K), weight, None, *static).view(y.shape))
    with torch.device("meta"):
        named = {name: torch.empty_like(tensor) for name, tensor in weight.tensors().items()}
        empty = PackedWeight.from_tensors(named, weight.scheme, weight.shape)
        assert quantized_linear(torch.empty(shape), empty, None, *static).shape == y.shape


@each_scheme
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_output_has_the_dtype_of_the_input(text: str, dtype: torch.dtype) -> None:
    x = random(5, K).to(dtype)
    y = quantized_linear(x, made(text), random(N, seed=2).to(dtype), *static_grid(text))
    assert y.dtype == dtype
    assert y.is_contiguous()


def test_which_op_runs_is_what_the_scheme_says() -> None:
    x = random(5, K)
    assert torch.equal(quantized_linear(x, made("w4a16-g32")), reference.wna16_linear(x, made("w4a16-g32"), None))
    assert torch.equal(quantized_linear(x, made("fp8")), reference.wa8_linear(x, made("fp8"), None))


@each_scheme
def test_the_gradient_of_x_is_that_of_the_float_layer_and_passes_through_rounding(text: str) -> None:
    weight, dy = made(text), random(2, 5, N, seed=3)
    x, twin = (random(2, 5, K).requires_grad_() for _ in range(2))
    quantized_linear(x, weight, None, *static_grid(text)).backward(dy)
    linear(twin, weight.dequantize()).backward(dy)
    torch.testing.assert_close(x.grad, twin.grad, rtol=0, atol=1e-5)  # other shapes of the same float32 product


@pytest.mark.parametrize("shape", [(K,), (5, K), (2, 3, K)], ids=str)
def test_the_gradient_of_a_bias_is_that_of_the_float_layer(shape: tuple[int, ...]) -> None:
    weight, dy, x = made("w4a16-g32"), random(*shape[:-1], N, seed=3), random(*shape)
    bias, twin = (random(N, seed=2).requires_grad_() for _ in range(2))
    quantized_linear(x, weight, bias).backward(dy)
    linear(x, weight.dequantize(), twin).backward(dy)
    torch.testing.assert_close(bias.grad, twin.grad)


def test_gradients_have_the_dtype_of_what_they_belong_to() -> None:
    x = random(5, K).bfloat16().requires_grad_()
    bias = random(N).bfloat16().requires_grad_()
    quantized_linear(x, made("w4a16-g32"), bias).sum().backward()
    assert x.grad is not None
    assert bias.grad is not None
    assert x.grad.dtype == bias.grad.dtype == torch.bfloat16


def test_nothing_is_kept_for_a_gradient_that_nobody_wants() -> None:
    weight, x = made("w8a8"), random(5, K)
    assert quantized_linear(x, weight).grad_fn is None
    x.requires_grad_()
    assert quantized_linear(x, weight).grad_fn is not None
    with torch.no_grad():
        assert quantized_linear(x, weight).grad_fn is None


def test_an_output_may_be_added_to_in_place() -> None:
    """As residual streams are; an output that was a view made inside a custom function would refuse."""
    x = random(2, 5, K).requires_grad_()
    y = quantized_linear(x, made("w4a16-g32"))
    y += 1
    y.sum().backward()
    assert x.grad is not None


@each_scheme
def test_a_layer_compiles_whole(text: str) -> None:
    torch._dynamo.reset()
    layer = QuantLinear.from_packed(made(text), random(N, seed=2), *static_grid(text))
    x = random(5, K)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))


@pytest.mark.parametrize("text", ["w4a16-g32", "w8a8", "nf4-b64"])
def test_a_layer_compiles_whole_with_its_gradient(text: str) -> None:
    torch._dynamo.reset()
    layer = QuantLinear.from_packed(made(text), random(N, seed=2))
    x, twin = (random(5, K).requires_grad_() for _ in range(2))
    torch.compile(layer, fullgraph=True, backend="aot_eager")(x).sum().backward()
    layer(twin).sum().backward()
    assert torch.equal(x.grad, twin.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["w4a16-g32-order", "w4a16-g32-asym", "nvfp4a16", "mxfp4a16", "fp8a16", "nf4-b64-dq"])
def test_every_tensor_of_a_weight_reaches_the_op_and_its_gradient(text: str) -> None:
    weight = made(text.removesuffix("-order"))
    if text.endswith("-order"):
        order = torch.randperm(K, generator=torch.Generator().manual_seed(2)).to(torch.int32)
        weight = replace(weight, scheme=QuantScheme.parse(text), order=order)
    x = random(3, K).requires_grad_()
    y = quantized_linear(x, weight)
    torch.testing.assert_close(y, linear(x, weight.dequantize()))
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, weight.dequantize().sum(0).expand(3, K))
