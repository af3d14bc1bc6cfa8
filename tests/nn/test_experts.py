"""QuantExperts. Oracle: a mixture of transformers whose 3-D parameters hold the dequantized weights."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from architectures import tiny
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from lowbit.nn.experts import ExpertWeight, QuantExperts, run_experts_plainly
from lowbit.nn.linear import QuantLinear
from lowbit.numerics.scheme import QuantScheme
from lowbit.tensors import PackedWeight

E, N, K = 3, 24, 64
TOKENS = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))


def packed_experts(weights: Tensor, text: str = "w4a16-g16") -> QuantExperts:
    scheme = QuantScheme.parse(text)
    return QuantExperts(QuantLinear.from_packed(PackedWeight.from_float(w, scheme, torch.float32)) for w in weights)


def made(text: str = "w4a16-g16") -> QuantExperts:
    return packed_experts(torch.randn(E, N, K, generator=torch.Generator().manual_seed(0)), text)


def dequantized(experts: QuantExperts, index: int) -> Tensor:
    return experts[index].layer.packed.dequantize()


def test_it_has_the_shape_and_length_of_the_parameter() -> None:
    experts = made()
    assert experts.shape == (E, N, K)
    assert len(experts) == E
    assert experts[1].shape == (N, K)


@pytest.mark.parametrize("index", [0, 2, -1, torch.tensor(1)], ids=str)
def test_an_index_gives_a_weight_that_linear_takes(index: int | Tensor) -> None:
    experts, x, bias = made(), torch.randn(5, K), torch.randn(N)
    weight = experts[index]
    expected = dequantized(experts, int(index))
    assert torch.equal(linear(x, weight), linear(x, expected))
    assert torch.equal(linear(x, weight, bias), linear(x, expected) + bias)
    assert torch.equal(linear(x, weight, bias=bias), linear(x, expected) + bias)


def test_an_index_beyond_the_experts_is_an_error() -> None:
    for index in (E, -E - 1):
        with pytest.raises(IndexError):
            made()[index]


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda weight, x: torch.mm(x, weight), "mm"),
        (lambda weight, x: torch.add(x, weight), "add"),
        (lambda weight, x: linear(weight, x), "linear"),
        (lambda weight, x: torch.stack([weight, weight]), "stack"),
        (lambda weight, x: nn.functional.relu(weight), "relu"),
    ],
    ids=["mm", "add", "as an input", "stack", "relu"],
)
def test_every_other_operation_is_refused(call: object, name: str) -> None:
    with pytest.raises(TypeError, match=f"can only be the weight of linear, not an argument of {name}"):
        call(made()[0], torch.randn(5, K))  # type: ignore[operator]


def test_state_dict_holds_the_tensors_of_every_expert() -> None:
    names = [f"{expert}.{key}" for expert in range(E) for key in ("weight_packed", "weight_scale", "weight_shape")]
    assert list(made().state_dict()) == names


def test_copies_and_pickles_compute_the_same() -> None:
    experts, x = made(), torch.randn(5, K)
    for twin in (copy.deepcopy(experts), pickle.loads(pickle.dumps(experts))):
        assert [type(layer) for layer in twin.children()] == [QuantLinear] * E
        assert torch.equal(linear(x, twin[1]), linear(x, experts[1]))


def test_the_gradient_of_an_input_passes_through_an_expert() -> None:
    experts, x = made(), torch.randn(5, K, requires_grad=True)
    linear(x, experts[0]).sum().backward()
    torch.testing.assert_close(x.grad, dequantized(experts, 0).sum(0).expand(5, K))


def replaced(model: PreTrainedModel) -> tuple[PreTrainedModel, PreTrainedModel]:
    """(model with packed experts, its twin with their dequantized weights in the 3-D parameters)."""
    twin = copy.deepcopy(model)
    for name, parameter in list(model.named_parameters()):
        if parameter.dim() == 3:
            owner, _, attribute = name.rpartition(".")
            experts = packed_experts(parameter.detach())
            with torch.no_grad():
                twin.get_parameter(name).copy_(torch.stack([dequantized(experts, e) for e in range(len(experts))]))
            delattr(model.get_submodule(owner), attribute)
            setattr(model.get_submodule(owner), attribute, experts)
    return model, twin


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3"])
@torch.no_grad()
def test_a_mixture_runs_on_packed_experts_as_on_their_dequantized_weights(model_type: str) -> None:
    model, twin = replaced(tiny(model_type))
    assert any(isinstance(module, QuantExperts) for module in model.modules())
    for either in (model, twin):
        run_experts_plainly(either)
    assert torch.equal(model(TOKENS).logits, twin(TOKENS).logits)


def test_running_plainly_is_set_wherever_a_config_knows_of_it() -> None:
    model = tiny("mixtral")
    model.config._experts_implementation = "grouped_mm"
    run_experts_plainly(model)
    assert model.config._experts_implementation == "eager"
    other = nn.Linear(2, 2)
    other.config = SimpleNamespace(hidden_size=2)  # type: ignore[assignment]
    run_experts_plainly(other)
    assert vars(other.config) == {"hidden_size": 2}


def test_a_stand_in_is_no_tensor_and_no_module() -> None:
    weight = made()[0]
    assert isinstance(weight, ExpertWeight)
    assert not isinstance(weight, Tensor | nn.Module)
