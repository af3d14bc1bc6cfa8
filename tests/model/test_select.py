"""Which weights are quantized. Oracle: the architectures' known layers, listed here by hand."""

import pytest
import torch
from architectures import TINY, tiny
from checkpoints import selection_of
from torch import nn
from transformers import PreTrainedModel

from lowbit.errors import InputError, SchemeError
from lowbit.io.names import disk_layout
from lowbit.model.recipe import Recipe
from lowbit.model.select import MIN_FEATURES, Rule, Selection, coverage, select
from lowbit.numerics.scheme import QuantScheme
from lowbit.observe.capture import find_blocks

W4, W8 = QuantScheme.parse("w4a16-g16"), QuantScheme.parse("w8a16")
LLAMA = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
SPLIT_EXPERTS = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3"]
WHOLE_EXPERTS = ["granitemoe", "gpt_oss", "llama4_text"]


def selected(model_type: str, scheme: QuantScheme = W4, rules: tuple[Rule, ...] = ()) -> Selection:
    return selection_of(tiny(model_type), Recipe(scheme, "rtn", rules))


def experts_of(model: PreTrainedModel) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.dim() == 3]


def test_every_linear_of_the_blocks_and_nothing_else() -> None:
    found = selected("llama")
    assert list(found.schemes) == [f"model.layers.{index}.{name}" for index in range(3) for name in LLAMA]
    assert set(found.schemes.values()) == {W4}
    assert found.skipped["lm_head.weight"] == "stands outside the decoder blocks; name it in a rule to quantize it"
    assert found.skipped["model.embed_tokens.weight"] == "embedding"
    assert found.skipped["model.norm.weight"] == "norm or vector"


@pytest.mark.parametrize("model_type", [name for name in TINY if name != "gpt2"])
def test_every_parameter_is_quantized_or_has_a_reason(model_type: str) -> None:
    model = tiny(model_type)
    found = selection_of(model, Recipe(W8, "rtn"))
    quantized = {name if name in dict(model.named_parameters()) else f"{name}.weight" for name in found.schemes}
    left = set(found.skipped)
    assert not quantized & left
    assert quantized | left >= set(dict(model.named_parameters()))
    assert all(found.skipped.values())


def test_a_rule_changes_what_it_names_and_the_last_rule_wins() -> None:
    rules = (Rule("*.down_proj", W8), Rule("model.layers.1.*", None), Rule("model.layers.1.mlp.down_proj", W4))
    found = selected("llama", W4, rules)
    assert found.schemes["model.layers.0.mlp.down_proj"] == W8
    assert found.schemes["model.layers.0.mlp.up_proj"] == W4
    assert [name for name in found.schemes if ".1." in name] == ["model.layers.1.mlp.down_proj"]
    assert found.schemes["model.layers.1.mlp.down_proj"] == W4
    assert found.skipped["model.layers.1.mlp.up_proj.weight"] == "is left as it is by the rule 'model.layers.1.*'"


def test_the_head_is_quantized_when_a_rule_names_it() -> None:
    found = selected("llama", W4, (Rule("lm_head", W8),))
    assert found.schemes["lm_head"] == W8


def test_a_static_scheme_for_the_head_is_refused() -> None:
    with pytest.raises(SchemeError, match="lm_head stands outside the decoder blocks, where inputs are not observed"):
        selected("llama", W4, (Rule("lm_head", QuantScheme.parse("w8a8-static")),))


def test_a_tied_head_is_never_quantized() -> None:
    found = selected("gemma2", W4, (Rule("lm_head", W8),))
    assert "lm_head" not in found.schemes
    assert found.skipped["lm_head.weight"] == "shares its weight with the embedding"


@pytest.mark.parametrize("model_type", SPLIT_EXPERTS)
def test_experts_are_quantized(model_type: str) -> None:
    model = tiny(model_type)
    assert set(experts_of(model)) <= set(selection_of(model, Recipe(W8, "rtn")).schemes)
    assert experts_of(model)


@pytest.mark.parametrize("model_type", WHOLE_EXPERTS)
def test_experts_that_have_no_form_on_disk_are_skipped_with_the_reason(model_type: str) -> None:
    model = tiny(model_type)
    found = selection_of(model, Recipe(W8, "rtn"))
    reasons = {found.skipped[name] for name in experts_of(model)}
    assert reasons == {"its experts are one 3-D tensor on disk, for which compressed-tensors has no form"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("nf4-b64", "bitsandbytes has no form for experts"),
        ("w4a16-g16-asym", "choose a symmetric scheme"),
        ("w8a8-static", "choose a dynamic scheme"),
    ],
)
def test_schemes_that_experts_cannot_have_are_skipped_with_the_reason(text: str, reason: str) -> None:
    model = tiny("mixtral")
    found = selection_of(model, Recipe(QuantScheme.parse(text), "rtn"))
    assert "model.layers.0.self_attn.q_proj" in found.schemes
    for name in experts_of(model):
        assert reason in found.skipped[name]


def test_a_rule_may_name_experts() -> None:
    found = selected("mixtral", W4, (Rule("*.gate_up_proj", W8), Rule("*.2.mlp.experts.*", None)))
    assert found.schemes["model.layers.0.mlp.experts.gate_up_proj"] == W8
    assert found.schemes["model.layers.0.mlp.experts.down_proj"] == W4
    assert "left as it is by the rule" in found.skipped["model.layers.2.mlp.experts.down_proj"]


def test_small_linears_are_left_alone() -> None:
    model = tiny("qwen2_moe")
    name = "model.layers.0.mlp.shared_expert_gate"
    assert model.get_submodule(name).out_features < MIN_FEATURES
    found = selection_of(model, Recipe(W8, "rtn", (Rule("*", W8),)))
    assert found.skipped[f"{name}.weight"] == "is only 1 x 64"


def test_a_group_that_does_not_divide_names_the_layer_and_the_groups_that_do() -> None:
    scheme = QuantScheme.parse("w4a16-g64")
    with pytest.raises(SchemeError) as caught:
        selected("llama", scheme)
    assert str(caught.value) == (
        "group size 64 does not divide in_features 96 of model.layers.0.mlp.down_proj; use one of 16, 32, 48, 96, "
        "channel (no -g), or leave the layer out with --ignore 'model.layers.0.mlp.down_proj'"
    )
    assert len(selected("llama", scheme, (Rule("*.down_proj", None),)).schemes) == 18
    assert selected("llama", scheme, (Rule("*.down_proj", W4),)).schemes["model.layers.2.mlp.down_proj"] == W4


def test_a_group_that_does_not_divide_an_expert_names_it() -> None:
    with pytest.raises(SchemeError, match=r"in_features 96 of model\.layers\.0\.mlp\.experts\.down_proj"):
        selected("mixtral", QuantScheme.parse("w4a16-g64"))


@pytest.mark.parametrize("glob", ["*.q_prj", "q_proj", "model.layers.3.*", "layers.0"])
def test_a_rule_that_matches_nothing_is_refused_with_names_that_would(glob: str) -> None:
    with pytest.raises(
        InputError, match=r"matches no layer of this model that can be quantized; names end in .*\*\.q_proj"
    ) as caught:
        selected("llama", W4, (Rule("*.down_proj", W8), Rule(glob, None)))
    assert repr(glob) in str(caught.value)


@pytest.mark.parametrize("glob", ["model.norm", "model.embed_tokens", "*.input_layernorm", "model.layers.0.self_attn"])
def test_a_rule_that_matches_no_weight_that_it_could_change_is_refused(glob: str) -> None:
    """It would be read as a wish that was fulfilled."""
    with pytest.raises(InputError, match="matches no layer of this model"):
        selected("llama", W4, (Rule(glob, W8),))


@pytest.mark.parametrize("glob", ["model.norm", "*.embed_tokens", "*norm"])
def test_a_rule_that_leaves_alone_what_is_left_alone_anyway_is_harmless(glob: str) -> None:
    assert len(selected("llama", W4, (Rule(glob, None),)).schemes) == 21


def test_a_rule_that_names_a_part_of_the_model_without_its_layers_is_refused() -> None:
    """ "model.layers.0" has no weight of its own: "model.layers.0.*" is meant."""
    with pytest.raises(InputError, match="matches no layer of this model"):
        selected("llama", W4, (Rule("model.layers.0", None),))


def test_rules_that_leave_nothing_are_refused() -> None:
    with pytest.raises(
        InputError, match=r"nothing is left to quantize: model.*q_proj\.weight is left as it is by the rule '\*'"
    ):
        selected("llama", W4, (Rule("*", None),))


def test_a_model_without_linear_layers_is_refused_with_the_reason() -> None:
    with pytest.raises(InputError, match=r"nothing is left to quantize: .*Conv1D keeps its weight transposed"):
        selected("gpt2")


@pytest.mark.parametrize("text", ["*.down_proj=w8a16", "a=b=w4a16-g64"])
def test_a_rule_is_read_from_its_last_equals_sign(text: str) -> None:
    glob, _, scheme = text.rpartition("=")
    assert Rule.parse(text) == Rule(glob, QuantScheme.parse(scheme))


@pytest.mark.parametrize("text", ["*.down_proj", "=w8a16", ""])
def test_a_rule_without_glob_or_scheme_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"is not GLOB=SCHEME, as in"):
        Rule.parse(text)


def test_a_rule_with_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(SchemeError, match="unknown scheme 'int4'"):
        Rule.parse("*.down_proj=int4")


class TestCoverage:
    """Oracle: parameters counted by hand."""

    def test_everything_in_the_blocks_is_all_of_it(self) -> None:
        model = tiny("llama")
        found = coverage(model, selection_of(model, Recipe(W4, "rtn")))
        quantized = 3 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96)
        assert found.quantized == quantized
        assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
        assert found.fraction == 1.0
        assert {item.name: item.parameters for item in found.skipped}["lm_head.weight"] == 128 * 64
        assert sum(item.parameters for item in found.skipped) + quantized == found.parameters
        assert all(item.bytes == 4 * item.parameters for item in found.skipped)

    def test_what_a_rule_leaves_out_is_missing(self) -> None:
        model = tiny("llama")
        found = coverage(model, selection_of(model, Recipe(W4, "rtn", (Rule("*.mlp.*", None),))))
        assert found.fraction == pytest.approx(12288 / (12288 + 3 * 64 * 96))

    @pytest.mark.parametrize("model_type", WHOLE_EXPERTS)
    def test_experts_that_are_skipped_are_missing(self, model_type: str) -> None:
        model = tiny(model_type)
        found = coverage(model, selection_of(model, Recipe(W4, "rtn")))
        assert found.fraction < 0.6
        assert {item.name for item in found.skipped} >= set(experts_of(model))

    def test_a_tied_head_is_counted_once(self) -> None:
        model = tiny("gemma2")
        found = coverage(model, selection_of(model, Recipe(W4, "rtn")))
        assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
        assert found.quantized + sum(item.parameters for item in found.skipped) == found.parameters
        assert "lm_head.weight" not in {item.name for item in found.skipped}


def test_without_a_checkpoint_every_expert_may_be_quantized() -> None:
    model = tiny("granitemoe")
    found = select(model, find_blocks(model)[0], W4)
    assert set(experts_of(model)) <= set(found.schemes)
    assert not {piece.expert for piece in disk_layout(model).values()} - {None}


def test_a_linear_that_is_used_twice_is_named_once() -> None:
    model = tiny("llama")
    shared = model.get_submodule("model.layers.0.self_attn.q_proj")
    model.get_submodule("model.layers.1.self_attn").q_proj = shared
    found = select(model, find_blocks(model)[0], W4)
    assert [name for name in found.schemes if name.endswith("q_proj")] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.2.self_attn.q_proj",
    ]
    assert isinstance(shared, nn.Linear)
    assert shared.weight.dtype == torch.float32
