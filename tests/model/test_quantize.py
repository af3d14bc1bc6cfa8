"""The pipeline over tiny models of every architecture. Oracles: the float model, from whose logits those of the
quantized one must not be far; and the same work done by hand, layer by layer."""

import copy

import pytest
import torch
from architectures import TINY, tiny
from checkpoints import TOKENS, quantize_in_memory, selection_of
from torch import Tensor, nn

from lowbit.algorithms.gptq import solve_gptq
from lowbit.errors import InputError
from lowbit.model.efforts import recipe_at
from lowbit.model.quantize import Job, batched, check_tokens, needs_data, quantize_blocks
from lowbit.model.recipe import Recipe
from lowbit.model.select import Rule
from lowbit.nn.experts import QuantExperts
from lowbit.nn.linear import QuantLinear
from lowbit.numerics.scheme import QuantScheme
from lowbit.observe.capture import find_blocks
from lowbit.observe.moments import SecondMoment

ARCHITECTURES = [name for name in TINY if name != "gpt2"]  # its Conv1D has no form on disk
ROUTED = {"mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "gpt_oss", "deepseek_v3", "llama4_text"}
SPLIT_EXPERTS = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3"]


@torch.no_grad()
def distance(model: nn.Module, original: nn.Module) -> float:
    """|logits - original logits| / |original logits|."""
    wanted = original(TOKENS).logits
    return ((model(TOKENS).logits - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize(
    ("text", "bound", "routed_bound"),
    # about twice the largest distance found; a router that sends a token elsewhere moves its logits by far more
    [("rtn:w8a16", 0.05, 0.2), ("gptq:w4a16-g16", 0.4, 0.4), ("rtn:w8a8-static-asym", 0.1, 0.25)],
)
def test_logits_stay_near_those_of_the_original(model_type: str, text: str, bound: float, routed_bound: float) -> None:
    model, original, recipe = tiny(model_type), tiny(model_type), Recipe.parse(text)
    selection = selection_of(model, recipe)
    log = quantize_in_memory(model, recipe)
    assert 0 < distance(model, original) < (routed_bound if model_type in ROUTED else bound)
    assert all("experts saw fewer tokens than their" in warning for warning in log.warnings)
    done = {name for name, module in model.named_modules() if isinstance(module, QuantLinear | QuantExperts)}
    assert {name for name in done if not name.rpartition(".")[2].isdigit()} == set(selection.schemes)
    assert not any(type(module) is nn.Linear and name in selection.schemes for name, module in model.named_modules())


@pytest.mark.parametrize("model_type", SPLIT_EXPERTS)
def test_experts_are_quantized_one_by_one_on_the_tokens_they_were_given(model_type: str) -> None:
    model = tiny(model_type)
    names = [name for name, parameter in model.named_parameters() if parameter.dim() == 3]
    counts = {name: len(model.get_parameter(name)) for name in names}
    tokens = torch.randint(3, 128, (32, 24), generator=torch.Generator().manual_seed(1))
    log = quantize_in_memory(model, Recipe.parse("gptq:w4a16-g16"), batches=[tokens])
    assert log.warnings == []
    records = {record.name: record for record in log.records}
    for name in names:
        assert isinstance(model.get_submodule(name), QuantExperts)
        for expert in range(counts[name]):
            record = records[f"{name}.{expert}"]
            assert record.method == "gptq"
            assert record.output_error is not None
            assert 0 < record.output_error < 0.2


def test_gptq_beats_rounding_on_most_architectures() -> None:
    wins = 0
    for model_type in ("llama", "qwen3", "phi3", "gpt_neox", "stablelm"):
        errors = []
        for method in ("gptq", "rtn"):
            model = tiny(model_type)
            quantize_in_memory(model, Recipe.parse(f"{method}:w3a16-g32"))
            errors.append(distance(model, tiny(model_type)))
        wins += errors[0] < errors[1]
    assert wins >= 4


class TestStream:
    """A linear is observed with what the already quantized ones before it give, in its block and before it."""

    @pytest.mark.parametrize("block", [1, 2])
    def test_a_layer_is_calibrated_on_what_the_quantized_layers_before_it_give(self, block: int) -> None:
        model, recipe = tiny("llama"), Recipe.parse("gptq:w3a16-g32")
        quantize_in_memory(model, recipe)
        name = f"model.layers.{block}.self_attn.o_proj"
        twin = copy.deepcopy(model)  # quantized up to this layer's inputs, float from here on
        twin.model.layers[block].self_attn.o_proj = tiny("llama").model.layers[block].self_attn.o_proj
        for index in range(block + 1, 3):
            twin.model.layers[index] = tiny("llama").model.layers[index]
        hand = self._solved(twin, name, recipe)
        assert torch.equal(model.get_submodule(name).packed.q(), hand)
        assert not torch.equal(self._solved(tiny("llama"), name, recipe), hand)

    @staticmethod
    def _solved(model: nn.Module, name: str, recipe: Recipe) -> Tensor:
        """The codes of one linear, by the second moment of what it reads in a forward of `model`."""
        linear = model.get_submodule(name)
        moment = SecondMoment(linear.in_features)
        with torch.no_grad():
            handle = linear.register_forward_pre_hook(lambda _, args: moment.update(args[0]))
            model(TOKENS, use_cache=False)
            handle.remove()
            weights = recipe.scheme.weights
            return solve_gptq(linear.weight.float(), moment.value, weights, torch.float32, recipe.gptq).q

    def test_batches_of_any_size_give_the_same_codes(self) -> None:
        whole, split = tiny("llama"), tiny("llama")
        recipe = Recipe.parse("gptq:w4a16-g16")
        quantize_in_memory(whole, recipe, batches=[TOKENS])
        quantize_in_memory(split, recipe, batches=list(TOKENS.split(1)))
        pairs = [
            (module.packed.q(), split.get_submodule(name).packed.q())
            for name, module in whole.named_modules()
            if isinstance(module, QuantLinear)
        ]
        changed = sum((a != b).sum().item() for a, b in pairs) / sum(a.numel() for a, _ in pairs)
        assert changed < 0.05  # float32 sums in another order tip values on a boundary, and each stage adds to it

    def test_it_is_the_same_twice(self) -> None:
        states = []
        for _ in range(2):
            model = tiny("mixtral")
            quantize_in_memory(model, Recipe.parse("gptq:w4a16-g16"))
            states.append(model.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))


class TestLog:
    """What is written down."""

    def test_every_layer_has_a_record_with_its_errors(self) -> None:
        model = tiny("llama")
        original = tiny("llama")
        rules = (Rule.parse("*.down_proj=w8a16"), Rule.parse("lm_head=w8a16"))
        log = quantize_in_memory(model, Recipe(Recipe.parse("w4a16-g16").scheme, "rtn", rules))
        records = {record.name: record for record in log.records}
        linears = {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}
        assert records.keys() == linears.keys()
        assert len(records) == len(log.records) == 22
        for name, layer in linears.items():
            w = original.get_submodule(name).weight
            error = ((layer.packed.dequantize() - w).norm() / w.norm()).item()
            assert records[name].relative_error == pytest.approx(error, rel=1e-5)
            assert records[name].scheme == str(layer.scheme)
            assert records[name].method == "rtn"
            assert records[name].output_error is None
        assert records["lm_head"].scheme == "w8a16"

    def test_output_errors_are_those_of_the_calibration_tokens(self) -> None:
        model, original = tiny("llama"), tiny("llama")
        log = quantize_in_memory(model, Recipe.parse("gptq:w4a16-g16"))
        name, seen = "model.layers.0.self_attn.k_proj", []
        handle = original.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        with torch.no_grad():
            original(TOKENS)
        handle.remove()
        w, approximation = original.get_submodule(name).weight, model.get_submodule(name).packed.dequantize()
        error = ((seen[0] @ (approximation - w).T).norm() / (seen[0] @ w.T).norm()).item()
        assert next(r for r in log.records if r.name == name).output_error == pytest.approx(error, rel=1e-3)

    def test_progress_counts_the_blocks(self) -> None:
        for text in ("rtn:w8a16", "gptq:w8a16"):
            model, recipe, seen = tiny("llama"), Recipe.parse(text), []

            def watch(*step: object, seen: list = seen) -> None:
                seen.append(step)

            quantize_blocks(model, Job(recipe, selection_of(model, recipe), [TOKENS], torch.float32, progress=watch))
            assert seen == [("quantizing", done, 3) for done in (1, 2, 3)]

    def test_the_worst_layers_have_histograms(self) -> None:
        log = quantize_in_memory(tiny("llama"), Recipe.parse("gptq:w4a16-g16"))
        worst = sorted(log.records, key=lambda record: -(record.output_error or 0))[:6]
        found = log.histograms
        assert list(dict.fromkeys(item.layer for item in found)) == [record.name for record in worst]
        assert {item.of for item in found} == {"weight", "error", "activation"}
        weight = next(item for item in found if item.of == "weight")
        assert sum(weight.counts) == tiny("llama").get_submodule(weight.layer).weight.numel()


class TestOdds:
    """Layers that calibration reaches in part, and what can't be calibrated."""

    def test_an_expert_without_tokens_is_rounded_and_said_to_be(self) -> None:
        model = tiny("mixtral")
        with torch.no_grad():
            model.model.layers[0].mlp.gate.weight[3] = 0
            model.model.layers[0].mlp.gate.weight[:3] *= 100
        one_token = [torch.tensor([[5]])]
        log = quantize_in_memory(model, Recipe.parse("gptq:w4a16-g16"), batches=one_token)
        rounded = [record.name for record in log.records if record.method == "rtn"]
        assert len([name for name in rounded if name.startswith("model.layers.0.mlp.experts")]) == 4  # 2 of 4 experts
        unseen = [warning for warning in log.warnings if "no calibration token was seen there" in warning]
        assert {warning.partition(":")[0] for warning in unseen} == set(rounded)

    def test_experts_with_fewer_tokens_than_channels_are_rounded_under_weighted_scales(self) -> None:
        model, plain = tiny("mixtral"), tiny("mixtral")
        log = quantize_in_memory(model, Recipe.parse("gptq:w4a16-g16"))  # TOKENS are 96, two of four experts each
        few = [record for record in log.records if record.method == "rtn-weighted"]
        assert few
        assert all(".mlp.experts." in record.name for record in few)
        counts = {warning.partition(":")[0]: warning for warning in log.warnings}
        assert "of 4 experts saw fewer tokens than their 96 channels" in counts["model.layers.0.mlp.experts.down_proj"]
        only = Recipe(QuantScheme.parse("w4a16-g16"), "rtn-weighted", (Rule("*.self_attn.*", None),))
        weighted = {record.name: record for record in quantize_in_memory(plain, only).records}
        first = next(record for record in few if record.name.startswith("model.layers.0.mlp.experts.gate_up_proj"))
        assert first.relative_error == pytest.approx(weighted[first.name].relative_error, rel=0.05)

    def test_fewer_tokens_than_channels_are_refused_before_anything_is_done(self) -> None:
        model = tiny("llama")
        for method in ("gptq", "aligned", "qronos"):
            recipe = Recipe.parse(f"{method}:w4a16-g16")
            selection = selection_of(model, recipe)
            check_tokens(model, recipe, selection, 96)
            words = f"95 calibration tokens are too few for {method}: .*down_proj reads 96 channels"
            with pytest.raises(InputError, match=words + ".* or use --method rtn-weighted"):
                check_tokens(model, recipe, selection, 95)
        check_tokens(model, Recipe.parse("rtn-weighted:w4a16-g16"), selection, 5)
        with pytest.raises(InputError, match="or use --effort 1"):
            check_tokens(model, recipe_at(QuantScheme.parse("w4a16-g16"), 2), selection, 95)

    def test_a_recipe_that_needs_no_data_runs_no_forward(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, recipe = tiny("llama"), Recipe.parse("rtn:w8a8")
        selection = selection_of(model, recipe)
        assert not needs_data(recipe, selection)
        monkeypatch.setattr(type(model), "forward", lambda *_, **__: pytest.fail("ran the model"))
        quantize_blocks(model, Job(recipe, selection, [], torch.float32))

    @pytest.mark.parametrize("text", ["gptq:w8a16", "rtn:w8a8-static", "rtn:w4a8-static-asym"])
    def test_what_looks_at_activations_needs_data(self, text: str) -> None:
        recipe = Recipe.parse(text)
        assert needs_data(recipe, selection_of(tiny("llama"), recipe))

    def test_a_static_rule_needs_data_too(self) -> None:
        recipe = Recipe(Recipe.parse("w8a16").scheme, "rtn", (Rule.parse("*.down_proj=w8a8-static"),))
        model = tiny("llama")
        assert needs_data(recipe, selection_of(model, recipe))
        quantize_in_memory(model, recipe)
        assert "input_scale" in model.get_submodule("model.layers.0.mlp.down_proj").state_dict()
        assert "input_scale" not in model.get_submodule("model.layers.0.mlp.up_proj").state_dict()

    @pytest.mark.parametrize("text", ["rtn:w8a16", "gptq:w4a16-g16"])
    def test_weights_with_holes_are_refused_by_name(self, text: str) -> None:
        for model_type, name in (
            ("llama", "model.layers.1.mlp.up_proj.weight"),
            ("mixtral", "model.layers.1.mlp.experts.down_proj"),
        ):
            model = tiny(model_type)
            with torch.no_grad():
                model.get_parameter(name).view(-1)[7] = torch.inf
            message = "NaN or infin|not finite" if text.startswith("gptq") else rf"{name} holds 1 values"
            with pytest.raises(InputError, match=message):
                quantize_in_memory(model, Recipe.parse(text))

    def test_an_input_that_is_not_finite_is_refused_by_layer(self) -> None:
        model = tiny("llama")
        with torch.no_grad():
            model.model.layers[1].input_layernorm.weight[3] = torch.inf
        with pytest.raises(InputError, match=r"the input of model\.layers\.1\.self_attn\.q_proj: activations are not"):
            quantize_in_memory(model, Recipe.parse("gptq:w4a16-g16"))

    def test_a_static_scheme_on_a_layer_that_no_token_reached_is_refused(self) -> None:
        model = tiny("llama")
        model.model.layers[1].mlp.spare = nn.Linear(64, 64)
        with pytest.raises(InputError, match=r"no calibration token reached model\.layers\.1\.mlp\.spare"):
            quantize_in_memory(model, Recipe.parse("rtn:w8a8-static"))
        model = tiny("llama")
        model.model.layers[1].mlp.spare = nn.Linear(64, 64)
        log = quantize_in_memory(model, Recipe.parse("gptq:w8a8"))
        assert [warning.partition(":")[0] for warning in log.warnings] == ["model.layers.1.mlp.spare"]


def test_only_what_was_selected_changes() -> None:
    model, original = tiny("mixtral"), tiny("mixtral")
    quantize_in_memory(model, Recipe.parse("gptq:w4a16-g16"))
    before, after = original.state_dict(), model.state_dict()
    kept = [name for name in before if name in after]
    assert all(torch.equal(before[name], after[name]) for name in kept)
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.gate.weight"} <= set(kept)
    assert not model.training


def test_biases_are_kept() -> None:
    model, original = tiny("opt"), tiny("opt")
    quantize_in_memory(model, Recipe.parse("rtn:w8a16"))
    name = find_blocks(model)[0] + ".0.fc1"
    assert torch.equal(model.get_submodule(name).bias, original.get_submodule(name).bias)


def test_batches_hold_about_the_tokens_asked_for() -> None:
    ids = torch.arange(70).view(7, 10)
    assert [len(batch) for batch in batched(ids, tokens=25)] == [2, 2, 2, 1]
    assert [len(batch) for batch in batched(ids, tokens=5)] == [1] * 7
    assert torch.equal(torch.cat(list(batched(ids))), ids)
