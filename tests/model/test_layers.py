"""One layer's turn. Oracles: the solvers themselves, called on the same weight and moment; counts by hand."""

import pytest
import torch
from torch import Tensor, nn

from lowbit.algorithms.gptq import GptqOptions, solve_gptq
from lowbit.algorithms.rtn import solve_rtn
from lowbit.algorithms.scales import ScaleSearch
from lowbit.errors import InputError
from lowbit.model.layers import solve_experts, solve_linears
from lowbit.model.log import LayerLog
from lowbit.model.recipe import Recipe
from lowbit.model.statistics import BINS, histogram
from lowbit.nn.experts import QuantExperts
from lowbit.nn.linear import QuantLinear
from lowbit.numerics.affine import choose_scale
from lowbit.numerics.scheme import QuantScheme

K = 64
X = torch.randn(200, K, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 0, K)


def block() -> nn.Module:
    """Two linears that read one input, of different heights and sizes, the first with a bias."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        module = nn.ModuleDict({"q": nn.Linear(K, 24), "k": nn.Linear(K, 16, bias=False)})
        with torch.no_grad():
            module["k"].weight.mul_(5)
    return module


def log_of(text: str, scale_dtype: torch.dtype = torch.float32, **options: object) -> LayerLog:
    recipe = Recipe.parse(text)
    return LayerLog(Recipe(recipe.scheme, recipe.method, **options), scale_dtype)  # type: ignore[arg-type]


def solved(
    text: str, names: tuple[str, ...] = ("q", "k"), x: Tensor = X, **options: object
) -> tuple[nn.Module, LayerLog]:
    """(block with quantized layers, log) after calibration on x."""
    module, log = block(), log_of(text, **options)
    statistics = log.statistics(K, log.recipe.scheme, torch.device("cpu"))
    statistics.update(x)
    with torch.no_grad():
        solve_linears(module, "blocks.0", names, log.recipe.scheme, statistics, log)
    return module, log


@pytest.mark.parametrize("text", ["gptq:w4a16-g16", "gptq:w4a16-g16-asym", "gptq:w3a16", "gptq:w8a8"])
def test_layers_that_share_an_input_get_what_the_solver_gives_for_their_rows(text: str) -> None:
    module, log = solved(text)
    original, weights = block(), log.recipe.scheme.weights
    moment = X.T @ X / len(X)
    for name in ("q", "k"):
        expected = solve_gptq(original[name].weight.detach(), moment, weights, torch.float32, log.recipe.gptq)
        layer = module[name]
        assert isinstance(layer, QuantLinear)
        # sums of float32 in another order may tip a value that lies on a rounding boundary
        assert (layer.packed.q() != expected.q).float().mean() < 0.01
        if name == "q":
            lost = (original["q"].weight - layer.packed.dequantize()) @ X.mean(0)
            torch.testing.assert_close(layer.bias, original["q"].bias + lost)
    assert log.corrected == {"blocks.0.q.bias"}
    assert module["k"].bias is None
    assert [record.name for record in log.records] == ["blocks.0.q", "blocks.0.k"]


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("text", "search"), [("rtn:w4a16-g16-asym", None), ("rtn-clip:w4a16-g16", ScaleSearch(norm=2.4))]
)
def test_rounding_is_that_of_the_solver(text: str, search: object, scale_dtype: torch.dtype) -> None:
    module, log = block(), log_of(text, scale_dtype)
    with torch.no_grad():
        solve_linears(module, "", ["k"], log.recipe.scheme, None, log)
        expected = solve_rtn(block()["k"].weight, log.recipe.scheme.weights, scale_dtype, search)  # type: ignore[arg-type]
    assert torch.equal(module["k"].packed.q(), expected.q)
    assert torch.equal(module["k"].packed.scale, expected.scale)
    assert module["k"].packed.scale.dtype == scale_dtype
    assert [record.name for record in log.records] == ["k"]


def test_one_scale_per_tensor_is_one_for_each_layer_and_not_for_the_group() -> None:
    module, _ = solved("rtn:w8a16-tensor")
    scales = [module[name].packed.scale for name in ("q", "k")]
    assert scales[0].shape == (1,)
    assert 4 < scales[1].item() / scales[0].item() < 6


@pytest.mark.parametrize("text", ["rtn:w8a8-static", "gptq:w8a8-static-asym"])
def test_a_static_grid_covers_what_was_seen(text: str) -> None:
    module, log = solved(text, observer="minmax")
    activations = log.recipe.scheme.activations
    assert activations is not None
    scale, zero = choose_scale(X.min().reshape(1), X.max().reshape(1), activations, torch.float32)
    for name in ("q", "k"):
        buffers = dict(module[name].named_buffers())
        assert torch.equal(buffers["input_scale"], scale)
        assert ("input_zero_point" in buffers) == (zero is not None)
        if zero is not None:
            assert torch.equal(buffers["input_zero_point"], zero)


def test_a_codebook_takes_each_layer_by_itself() -> None:
    module, log = solved("rtn:nf4-b64")
    for name in ("q", "k"):
        w = block()[name].weight
        assert ((module[name].packed.dequantize() - w).norm() / w.norm()) < 0.12
    assert [record.method for record in log.records] == ["rtn", "rtn"]


def test_without_a_token_gptq_rounds_and_warns() -> None:
    module, log = block(), log_of("gptq:w4a16-g16")
    with torch.no_grad():
        solve_linears(module, "blocks.0", ["q"], log.recipe.scheme, None, log)
        expected = solve_rtn(block()["q"].weight, log.recipe.scheme.weights, torch.float32)
    assert torch.equal(module["q"].packed.q(), expected.q)
    assert log.warnings == ["blocks.0.q: no calibration token was seen there, so it was rounded to nearest"]
    assert log.records[0].method == "rtn"


def test_damping_that_had_to_grow_is_a_warning() -> None:
    _, log = solved("gptq:w4a16-g16", x=X[:3], gptq=GptqOptions(damping=0.0))
    assert len(log.warnings) == 1
    assert log.warnings[0].startswith("blocks.0.q, blocks.0.k: its second moment needed damping 0.")
    _, log = solved("gptq:w4a16-g16")
    assert log.warnings == []


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_with_holes_are_refused_before_anything_is_replaced(value: float) -> None:
    module, log = block(), log_of("rtn:w8a16")
    with torch.no_grad():
        module["k"].weight[0, 0] = value
        with pytest.raises(InputError, match=r"blocks\.0\.k\.weight holds 1 values that are NaN or infinite"):
            solve_linears(module, "blocks.0", ["q", "k"], log.recipe.scheme, None, log)
    assert type(module["q"]) is nn.Linear


class _Mixture(nn.Module):
    """A module with a 3-D parameter [3, 24, 64]."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Module()
        self.experts.up = nn.Parameter(torch.randn(3, 24, K, generator=torch.Generator().manual_seed(2)))


def test_an_expert_without_tokens_is_rounded_beside_others_that_are_solved() -> None:
    module, log = _Mixture(), log_of("gptq:w4a16-g16")
    w = module.experts.up.detach().clone()
    statistics = {index: log.statistics(K, log.recipe.scheme, torch.device("cpu")) for index in (0, 2)}
    for index, observed in statistics.items():
        observed.update(X[index * 50 : 100 + index * 50])
    with torch.no_grad():
        solve_experts(module, "blocks.0", "experts.up", log.recipe.scheme, statistics, log)
    experts, weights = module.experts.up, log.recipe.scheme.weights
    assert isinstance(experts, QuantExperts)
    assert "up" not in dict(module.experts.named_parameters(recurse=False))
    assert [record.method for record in log.records] == ["gptq", "rtn", "gptq"]
    assert log.warnings == ["blocks.0.experts.up.1: no calibration token was seen there, so it was rounded to nearest"]
    assert torch.equal(experts[1].layer.packed.q(), solve_rtn(w[1], weights, torch.float32).q)
    moment = statistics[2].moment
    assert moment is not None
    assert torch.equal(
        experts[2].layer.packed.q(), solve_gptq(w[2], moment.value, weights, torch.float32, GptqOptions()).q
    )


def test_a_histogram_counts_every_value_between_its_ends() -> None:
    x = torch.cat([torch.linspace(-1, 3, 1000), torch.tensor([-1.0, 3.0])]).view(2, 501)
    found = histogram(x, "a.b", "weight")
    assert (found.layer, found.of, found.low, found.high) == ("a.b", "weight", -1.0, 3.0)
    assert len(found.counts) == BINS
    assert sum(found.counts) == 1002
    assert max(found.counts) - min(found.counts) <= 3


def test_a_histogram_of_one_value_is_one_bin() -> None:
    assert histogram(torch.full((3, 4), 2.5), "", "error").counts == (12,)


def test_statistics_are_those_that_the_recipe_needs() -> None:
    device = torch.device("cpu")
    for text, moment, observer in (
        ("gptq:w4a16-g16", True, False),
        ("rtn:w8a8-static", False, True),
        ("gptq:w8a8-static", True, True),
        ("rtn:w8a8", False, False),
    ):
        log = log_of(text)
        assert not log.observed
        found = log.statistics(K, log.recipe.scheme, device)
        assert (found.moment is not None, found.observer is not None) == (moment, observer)
        assert log.observed


def test_a_rule_with_a_static_scheme_is_observed_by_its_own_range() -> None:
    log = log_of("rtn:w8a16")
    assert log.statistics(K, QuantScheme.parse("w8a8-static"), torch.device("cpu")).observer is not None
