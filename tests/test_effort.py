"""Rungs of --effort. Oracle: the rungs run and judged one by one."""

import copy
import dataclasses

import pytest
import torch
from architectures import tiny
from checkpoints import selection_of
from transformers import PreTrainedModel

from lowbit import effort, judge
from lowbit.algorithms.correction import Correction
from lowbit.errors import InputError
from lowbit.model.learn import Learning
from lowbit.model.quantize import Job
from lowbit.model.recipe import EFFORTS, Recipe
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
        model, recipe = copy.deepcopy(original), Recipe.at_effort(SCHEME, one)
        effort.run(model, _job(model, dataclasses.replace(recipe, effort=None)), IDS[:-2])
        found[one] = judge.fidelity(model, reference).kld
    model = copy.deepcopy(original)
    outcome = effort.run(model, _job(model, Recipe.at_effort(SCHEME, level)), IDS)
    best = min(found, key=lambda one: (found[one], -one))
    assert outcome.recipe.method == EFFORTS[best]
    assert judge.fidelity(model, reference).kld == pytest.approx(found[best])
    said = outcome.log.notes if best == level else outcome.log.warnings
    assert any(f"effort {level} ({EFFORTS[level]}) reached KL {found[level]:.4f}" in line for line in said)


def test_a_rung_that_harms_gives_way_to_one_below_and_says_so() -> None:
    original = _original()
    model = copy.deepcopy(original)
    harmful = dataclasses.replace(Recipe.at_effort(SCHEME, 2), correction=Correction(strength=40.0))
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
    recipe = Recipe.at_effort(SCHEME, level)
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
        outcome = effort.run(model, _job(model, Recipe.at_effort(SCHEME, level)), IDS)
        found.append((outcome.log.records, outcome.log.notes, model.state_dict()))
    assert found[0][:2] == found[1][:2]
    assert all(torch.equal(value, found[1][2][name]) for name, value in found[0][2].items())


def test_rungs_without_data_or_with_few_windows_run_alone() -> None:
    model = _original()
    assert effort.run(model, _job(model, Recipe.at_effort(SCHEME, 0)), None).recipe.method == "rtn"
    model = _original()
    outcome = effort.run(model, _job(model, Recipe.at_effort(SCHEME, 2)), IDS[:7])
    assert (outcome.recipe.method, outcome.log.notes, outcome.log.warnings) == ("aligned", [], [])


def test_efforts_that_do_not_exist_are_refused_and_other_formats_have_one_rung() -> None:
    with pytest.raises(InputError, match="there is no effort 5; choose one of 0 to 4: rtn, rtn-weighted"):
        Recipe.at_effort(SCHEME, 5)
    assert Recipe.at_effort(QuantScheme.parse("nf4-b64"), 4).method == "rtn"
