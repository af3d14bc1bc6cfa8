"""Recipes and how they are written. Oracle: the text itself, and the schemes' own parser."""

import pytest

from lowbit.errors import InputError, SchemeError
from lowbit.model.recipe import METHODS, Recipe, default_method
from lowbit.model.select import Rule
from lowbit.numerics.scheme import QuantScheme

WRITTEN = ["rtn:w4a16-g64", "rtn-clip:w3a16-asym", "gptq:w4a16-g64-asym", "gptq:w8a8-static-asym", "rtn:nf4-b64-dq"]
WRITTEN += ["rtn:fp8", "rtn:w8a16-tensor", "qronos:w3a16-g64-asym", "gptaq:w4a16-g64"]


@pytest.mark.parametrize("text", WRITTEN)
def test_a_recipe_is_written_as_it_was_read(text: str) -> None:
    recipe = Recipe.parse(text)
    assert str(recipe) == text
    method, _, scheme = text.partition(":")
    assert recipe == Recipe(QuantScheme.parse(scheme), method)


@pytest.mark.parametrize(("text", "written"), [("w4a16-g64", "gptq:w4a16-g64"), ("w8a8", "gptq:w8a8")])
def test_integers_alone_mean_gptq(text: str, written: str) -> None:
    assert str(Recipe.parse(text)) == written


@pytest.mark.parametrize("text", ["nf4-b64", "fp4-b32-dq", "fp8"])
def test_formats_that_gptq_does_not_know_mean_rtn(text: str) -> None:
    assert str(Recipe.parse(text)) == f"rtn:{text}"
    assert default_method(QuantScheme.parse(text)) == "rtn"


def test_nothing_said_means_four_bits_by_gptq() -> None:
    assert str(Recipe()) == "gptq:w4a16-g64"


@pytest.mark.parametrize("text", ["awq2:w4a16-g64", ":w4a16-g64", "GPTQ:w8a8"])
def test_an_unknown_method_is_refused_with_the_known_ones(text: str) -> None:
    with pytest.raises(InputError, match=f"choose one of {', '.join(METHODS)}"):
        Recipe.parse(text)


@pytest.mark.parametrize("text", ["rtn:w9a16", "rtn:", "", "gptq:int4", "rtn:w4a16-g64:x"])
def test_an_unknown_scheme_is_refused_with_the_grammar(text: str) -> None:
    with pytest.raises(SchemeError, match=r"a scheme is written w<bits>a16"):
        Recipe.parse(text)


def test_an_unknown_observer_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"unknown observer 'max'; choose one of .*mse"):
        Recipe(observer="max")


@pytest.mark.parametrize("text", ["gptq:fp8", "gptq:nf4-b64", "rtn-clip:fp4-b64"])
def test_what_a_method_cannot_do_is_refused(text: str) -> None:
    with pytest.raises(
        SchemeError, match=r"works on integer grids and on nvfp4 and mxfp4, and .* is none; use --method rtn"
    ):
        Recipe.parse(text)


def test_rules_are_held_to_the_same() -> None:
    with pytest.raises(SchemeError, match="gptq works on integer grids and on nvfp4 and mxfp4, and fp8 is none"):
        Recipe(rules=(Rule.parse("*.down_proj=fp8"),))
    Recipe(rules=(Rule("*.down_proj", None),))


@pytest.mark.parametrize(("scheme", "rule"), [("nf4-b64", "*.up_proj=w8a16"), ("w8a16", "*.up_proj=nf4-b64")])
def test_codebooks_stand_beside_no_other_scheme(scheme: str, rule: str) -> None:
    with pytest.raises(SchemeError, match="can't stand beside other schemes"):
        Recipe(QuantScheme.parse(scheme), "rtn", (Rule.parse(rule),))


def test_two_codebooks_can_not_stand_in_one_file_either() -> None:
    """bitsandbytes' config names one type for the whole model."""
    with pytest.raises(SchemeError, match="can't stand beside other schemes"):
        Recipe(QuantScheme.parse("nf4-b64"), "rtn", (Rule.parse("*.up_proj=fp4-b64"),))
