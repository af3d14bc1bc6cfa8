"""Rungs of --effort. Oracle: the rungs run and judged one by one."""

import copy
import dataclasses
import re

import pytest
import torch
from architectures import tiny
from checkpoints import selection_of
from transformers import PreTrainedModel

from lowbit import effort, judge
from lowbit.algorithms.correction import Correction
from lowbit.errors import InputError
from lowbit.model.efforts import EFFORTS, recipe_at
from lowbit.model.learn import Learning
from lowbit.model.quantize import Job
from lowbit.model.recipe import Recipe
from lowbit.numerics.scheme import QuantScheme
from lowbit.observe.tokens import Tokens

IDS = torch.randint(3, 128, (16, 24), generator=torch.Generator().manual_seed(3))
SCHEME = QuantScheme.parse("w3a16-g16-asym")


def _original() -> PreTrainedModel:
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # sharp enough for rounding to matter
    return model


def _job(model: PreTrainedModel, recipe: Recipe) -> Job:
    return Job(recipe, selection_of(model, recipe), [], torch.bfloat16)


@pytest.mark.parametrize("level", [1, 2, 3])
def test_the_rung_with_the_lowest_kl_on_windows_kept_apart_is_kept(level: int) -> None:
    original = _original()
    reference = judge.Reference.of(original, Tokens(IDS[-2:], "kept apart"))
    found = {}
    for one in range(level + 1):
        model, recipe = copy.deepcopy(original), recipe_at(SCHEME, one)
        effort.run(model, _job(model, dataclasses.replace(recipe, effort=None)), IDS[:-2])
        found[one] = judge.fidelity(model, reference).kld
    model = copy.deepcopy(original)
    outcome = effort.run(model, _job(model, recipe_at(SCHEME, level)), IDS)
    best = min(found, key=lambda one: (found[one], -one))
    assert outcome.recipe.method == EFFORTS[best]
    assert judge.fidelity(model, reference).kld == pytest.approx(found[best])
    said = outcome.log.notes if best == level else outcome.log.warnings
    assert all(
        any(f"effort {one} ({EFFORTS[one]}) reached KL {found[one]:.4f}" in line for line in said) for one in found
    )


def test_a_rung_that_harms_gives_way_to_one_below_and_says_so() -> None:
    original = _original()
    model = copy.deepcopy(original)
    harmful = dataclasses.replace(recipe_at(SCHEME, 2), correction=Correction(strength=40.0))
    outcome = effort.run(model, _job(model, harmful), IDS)
    assert outcome.recipe.method in ("rtn", "rtn-weighted")
    assert outcome.log.warnings[-1].endswith(f"effort {outcome.recipe.effort} was kept")
    with torch.no_grad():
        below = copy.deepcopy(original)
        effort.run(below, _job(below, Recipe(SCHEME, outcome.recipe.method)), IDS[:-2])
        assert torch.equal(model(input_ids=IDS).logits, below(input_ids=IDS).logits)


def test_learning_reports_what_it_gained_and_which_float_parameters_it_changed() -> None:
    model = _original()
    learning = Learning(steps=30, held_out=4, rate=0.02, gain_rate=0.01)
    harmful = Correction(strength=10.0)  # a bad start
    recipe = Recipe(SCHEME, "learned", correction=harmful, learning=learning)
    outcome = effort.run(model, _job(model, recipe), IDS)
    assert any("learning lowered KL" in note for note in outcome.log.notes)
    assert outcome.log.rewritten == {name for name, _ in model.named_parameters() if "norm" in name}


@pytest.mark.parametrize(("level", "methods"), [(1, ["rtn"]), (2, ["rtn", "rtn-weighted"]),
                                                (3, ["rtn", "rtn-weighted", "aligned"])])  # fmt: skip
def test_the_report_tells_per_layer_what_the_rungs_below_leave(
    level: int, methods: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    klds = iter([0.2] * level + [0.1])
    monkeypatch.setattr(effort, "_distance", lambda *_: next(klds))  # so that the rung is kept
    model = _original()
    recipe = recipe_at(SCHEME, level)
    outcome = effort.run(model, _job(model, recipe), IDS)
    for record in outcome.log.records:
        assert [rung.method for rung in record.below] == methods
        assert all(rung.output_error is not None and rung.output_error > 0 for rung in record.below)
    plain = _original()
    rtn = effort.run(plain, _job(plain, Recipe(SCHEME, "rtn")), None)
    rounded = {record.name: record.relative_error for record in rtn.log.records}
    for record in outcome.log.records:
        assert record.below[0].relative_error == pytest.approx(rounded[record.name], rel=1e-4)


@pytest.mark.parametrize("level", [2, 3])
def test_a_rung_gives_the_same_bits_twice(level: int) -> None:
    found = []
    for _ in range(2):
        model = _original()
        outcome = effort.run(model, _job(model, recipe_at(SCHEME, level)), IDS)
        found.append((outcome.log.records, outcome.log.notes, model.state_dict()))
    assert found[0][:2] == found[1][:2]
    assert all(torch.equal(value, found[1][2][name]) for name, value in found[0][2].items())


def test_rungs_without_data_or_with_few_windows_run_alone() -> None:
    model = _original()
    assert effort.run(model, _job(model, recipe_at(SCHEME, 0)), None).recipe.method == "rtn"
    model = _original()
    outcome = effort.run(model, _job(model, recipe_at(SCHEME, 2)), IDS[:7])
    assert (outcome.recipe.method, outcome.log.notes, outcome.log.warnings) == ("aligned", [], [])


def test_efforts_that_do_not_exist_are_refused_and_other_formats_have_one_rung() -> None:
    with pytest.raises(InputError, match="there is no effort 5; choose one of 0 to 4"):
        recipe_at(SCHEME, 5)
    recipe = recipe_at(QuantScheme.parse("nf4-b64"), 4)
    assert (recipe.method, recipe.effort) == ("rtn", 0)


@pytest.mark.parametrize(
    ("scheme", "methods"),
    [
        ("w4a8-g16", ["rtn", "rtn-weighted", "aligned", "chosen", "learning"]),
        ("w8a8", ["rtn", "rtn-weighted", "smooth", "rotate", "learning"]),
        ("w8a8-static", ["rtn", "rtn-weighted", "smooth", "rotate", "learning"]),
        ("int8-t6", ["rtn", "rtn-weighted", "gptq", "learning"]),
        ("w4a4-g16", ["rtn", "rtn-weighted", "rotate", "learning"]),
        ("nvfp4", ["rtn", "aligned", "chosen"]),
    ],
)
def test_every_kind_of_scheme_climbs_its_own_ladder_on_a_real_run(scheme: str, methods: list[str]) -> None:
    recipe = recipe_at(QuantScheme.parse(scheme), 4)
    if recipe.learning is not None:
        recipe = dataclasses.replace(recipe, learning=Learning(steps=4, windows=2, checks=2))
    model, reference = _original(), judge.Reference.of(_original(), Tokens(IDS[-2:], "kept apart"))
    outcome = effort.run(model, _job(model, recipe), IDS)
    said = [line for line in outcome.log.notes + outcome.log.warnings if "kept apart" in line and "reached" in line]
    found = re.findall(r"effort \d \((\S+?)(?:, from effort \d)?\) reached KL (\d+\.\d+)", said[0])
    assert [name for name, _ in reversed(found)] == methods
    assert judge.fidelity(model, reference).kld == pytest.approx(min(float(kld) for _, kld in found), abs=6e-5)


def test_learning_in_16_bits_moves_norms_and_leaves_16_bits() -> None:
    """bfloat16 has steps of 1/256 near 1, far longer than those of a norm's gain."""
    original = _original().bfloat16()
    model = copy.deepcopy(original)
    learning = Learning(steps=30, held_out=4, rate=0.02, gain_rate=0.01, norm_rate=1e-3)
    recipe = Recipe(SCHEME, "learned", correction=Correction(strength=10.0), learning=learning)  # a bad start
    outcome = effort.run(model, _job(model, recipe), IDS)
    norms = {name for name, _ in model.named_parameters() if "norm" in name}
    assert outcome.log.rewritten == norms
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    before = dict(original.named_parameters())
    assert any(
        not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters() if name in norms
    )


def test_learning_begins_from_the_closest_rung_below() -> None:
    recipe = dataclasses.replace(recipe_at(SCHEME, 4), learning=Learning(steps=30, windows=2, checks=6, rate=0.02))
    model = _original()
    outcome = effort.run(model, _job(model, recipe), IDS)
    said = [*outcome.log.notes, *outcome.log.warnings]
    rungs = re.findall(r"effort (\d) \(\w[\w-]*\) reached KL (\d\.\d+)", " ".join(said))
    klds = {level: float(kld) for level, kld in rungs}
    start = min(klds, key=lambda level: (klds[level], -int(level)))
    assert any(f"effort 4 (learning, from effort {start}) reached KL" in line for line in said)
    before = next(float(found[1]) for line in said if (found := re.search(r"apart from (\d\.\d+) to", line)))
    assert before == pytest.approx(klds[start], rel=0.1)  # it counts the last token too


def test_a_rung_that_does_not_apply_to_the_model_is_passed_over_and_named() -> None:
    model = tiny("olmo2")  # its norms stand after the sums: nothing to smooth, nothing to rotate
    outcome = effort.run(model, _job(model, recipe_at(QuantScheme.parse("w8a8"), 3)), IDS)
    said = [*outcome.log.notes, *outcome.log.warnings][-1]
    assert "effort 2 (smooth) does not apply (smooth found no norm in Olmo2ForCausalLM" in said
    assert outcome.recipe.method in ("rtn", "rtn-weighted")
    assert model(input_ids=IDS).logits.isfinite().all()
