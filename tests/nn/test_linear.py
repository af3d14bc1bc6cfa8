"""QuantLinear. Oracles: nn.Linear with the dequantized weight; PackedWeight's tensors for what state_dict holds."""

import copy
import io
import pickle

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn.functional import linear

from lowbit.nn.linear import QuantLinear
from lowbit.numerics.scheme import QuantScheme
from lowbit.tensors import PackedWeight

N, K = 24, 96
TEXTS = ["w4a16-g32", "w4a16-g32-asym", "w3a16-tensor", "w8a8", "w8a8-static-asym", "fp8", "nf4-b64", "nf4-b64-dq"]
each_scheme = pytest.mark.parametrize("text", TEXTS)
X = torch.randn(5, K, generator=torch.Generator().manual_seed(0))


def made(text: str, has_bias: bool = False, scale_dtype: torch.dtype = torch.float32) -> QuantLinear:
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(N, K, generator=generator)
    packed = PackedWeight.from_float(w, QuantScheme.parse(text), scale_dtype)
    bias = torch.randn(N, generator=generator) if has_bias else None
    if "static" not in text:
        return QuantLinear.from_packed(packed, bias)
    zero = torch.tensor([4], dtype=torch.int8) if text.endswith("asym") else None
    return QuantLinear.from_packed(packed, bias, torch.tensor([0.02]), zero)


def same_bytes(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(
        a[key].dtype == b[key].dtype
        and a[key].shape == b[key].shape
        and torch.equal(a[key].reshape(-1).view(torch.uint8), b[key].reshape(-1).view(torch.uint8))
        for key in a
    )


@pytest.mark.parametrize("text", ["w4a16-g32", "w4a16-g32-asym", "w3a16-tensor", "nf4-b64"])
@pytest.mark.parametrize("has_bias", [False, True], ids=["", "bias"])
def test_it_is_a_linear_layer_with_the_weight_that_the_codes_stand_for(text: str, has_bias: bool) -> None:
    layer = made(text, has_bias)
    assert isinstance(layer, nn.Linear)
    assert torch.equal(layer(X), linear(X, layer.packed.dequantize(), layer.bias))


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("w4a16-g32", ["weight_packed", "weight_scale", "weight_shape"]),
        ("w4a16-g32-asym", ["weight_packed", "weight_scale", "weight_shape", "weight_zero_point"]),
        ("w8a8", ["weight", "weight_scale"]),
        ("w8a8-static", ["input_scale", "weight", "weight_scale"]),
        ("w8a8-static-asym", ["input_scale", "input_zero_point", "weight", "weight_scale"]),
        ("fp8", ["weight", "weight_scale"]),
    ],
)
def test_state_dict_has_the_names_of_a_compressed_tensors_file(text: str, names: list[str]) -> None:
    assert sorted(made(text).state_dict()) == names
    assert sorted(made(text, has_bias=True).state_dict()) == sorted([*names, "bias"])


@each_scheme
def test_an_empty_layer_takes_the_state_of_another(text: str) -> None:
    layer = made(text, has_bias=True)
    empty = QuantLinear(K, N, QuantScheme.parse(text), bias=True)
    assert {name: (t.shape, t.dtype) for name, t in empty.state_dict().items()} == {
        name: (t.shape, t.dtype) for name, t in layer.state_dict().items()
    }
    empty.load_state_dict(load(save(layer.state_dict())))
    assert torch.equal(empty(X), layer(X))


def test_a_state_of_another_scheme_is_refused() -> None:
    with pytest.raises(RuntimeError, match="size mismatch for weight_scale"):
        made("w4a16-g32").load_state_dict(made("w4a16-g16").state_dict())


@each_scheme
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_another_dtype_never_changes_codes_scales_or_zero_points(text: str, dtype: torch.dtype) -> None:
    layer = made(text, has_bias=True)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items() if name != "bias"}
    for moved in (layer.to(dtype), layer.to("cpu", dtype), nn.Sequential(layer).to(dtype)[0]):
        after = dict(moved.state_dict())
        assert after.pop("bias").dtype == dtype
        assert same_bytes(after, before)
    assert layer(X.to(dtype)).dtype == dtype


@each_scheme
def test_half_and_float_do_not_either(text: str) -> None:
    layer = made(text, scale_dtype=torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    assert same_bytes(layer.half().float().double().bfloat16().state_dict(), before)


@each_scheme
def test_it_moves_to_another_device_whole(text: str) -> None:
    before = made(text, has_bias=True)
    moved = made(text, has_bias=True).to("meta")
    assert {tensor.device.type for tensor in [*moved.parameters(), *moved.buffers()]} == {"meta"}
    assert {name: (t.shape, t.dtype) for name, t in moved.state_dict().items()} == {
        name: (t.shape, t.dtype) for name, t in before.state_dict().items()
    }


@each_scheme
def test_the_weight_has_the_shape_but_no_number_that_can_be_used(text: str) -> None:
    weight = made(text).weight
    assert weight.shape == (N, K)
    if weight.is_floating_point() and text != "fp8":
        assert weight.isnan().all()
        assert weight.untyped_storage().nbytes() == 4  # one NaN, seen everywhere
        with pytest.raises(RuntimeError):
            weight += 1  # a merge can't silently do nothing
    else:
        assert text in ("w8a8", "w8a8-static-asym", "fp8")  # codes, under the name that the file has
    assert "weight" not in dict(made(text).named_parameters())


@each_scheme
def test_copies_and_pickles_compute_the_same_and_share_nothing(text: str) -> None:
    layer = made(text, has_bias=True)
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    copies = [copy.deepcopy(layer), torch.load(stream, weights_only=False)]
    if text != "fp8":  # torch 2.13 can't unpickle a plain tensor of fp8 either
        copies.append(pickle.loads(pickle.dumps(layer)))
    for twin in copies:
        assert isinstance(twin, QuantLinear)
        assert twin.scheme == layer.scheme
        assert same_bytes(twin.state_dict(), layer.state_dict())
        assert torch.equal(twin(X), layer(X))
        pointers = {tensor.data_ptr() for tensor in layer.state_dict().values()}
        assert not pointers & {tensor.data_ptr() for tensor in twin.state_dict().values()}


def test_from_packed_copies_nothing() -> None:
    packed = PackedWeight.from_float(torch.randn(N, K), QuantScheme.parse("w4a16-g32"), torch.float32)
    layer = QuantLinear.from_packed(packed)
    assert layer.weight_packed.data_ptr() == packed.codes.data_ptr()
    assert layer.packed.shape == (N, K)


def test_a_bias_is_a_frozen_parameter() -> None:
    layer = made("w4a16-g32", has_bias=True)
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert not layer.bias.requires_grad
    assert made("w4a16-g32").bias is None
    assert torch.equal(layer(X), made("w4a16-g32")(X) + layer.bias)


def test_a_static_grid_rounds_inputs_and_a_dynamic_one_follows_them() -> None:
    static, dynamic = made("w8a8-static"), made("w8a8")
    assert torch.equal(static(1e9 * X), static(torch.where(X > 0, 1e6, -1e6)))  # all saturate
    assert not torch.equal(dynamic(1e9 * X), dynamic(torch.where(X > 0, 1e6, -1e6)))
    assert torch.equal(static(X * 1e-3), torch.zeros(5, N))  # all below half a step


def test_repr_says_what_it_is() -> None:
    assert repr(made("w4a16-g32")) == "QuantLinear(in_features=96, out_features=24, scheme=w4a16-g32)"


@pytest.mark.parametrize("name", ["weight_pack", "no_such_thing"])
def test_an_attribute_that_is_not_there_is_an_attribute_error(name: str) -> None:
    with pytest.raises(AttributeError, match=name):
        getattr(made("w4a16-g32"), name)
    assert not hasattr(QuantLinear.__new__(QuantLinear), "weight")  # before __init__, as pickle meets it
