"""The oracle is the grammar itself: every text that it can write, spelled out here a second time."""

from itertools import product

import pytest

from lowbit.errors import SchemeError
from lowbit.numerics.formats import int_format
from lowbit.numerics.scheme import GRAMMAR, QuantScheme, TensorScheme, check_fits

_WEIGHTS = [f"{granularity}{asym}" for granularity in ("", "-tensor", "-g32", "-g64") for asym in ("", "-asym")]
_ACTIVATIONS = ["", "-dynamic-asym", "-static", "-static-asym"]
TEXTS = [
    *(f"w{bits}a16{weights}" for bits, weights in product(range(2, 9), _WEIGHTS)),
    *(f"w{bits}a8{weights}{mode}" for bits, weights, mode in product(range(2, 9), _WEIGHTS, _ACTIVATIONS)),
    *(f"{name}-b{2**power}{nested}" for name, power, nested in product(("nf4", "fp4"), range(5, 13), ("", "-dq"))),
    "fp8",
]


def test_every_text_of_the_grammar_is_printed_as_it_was_written() -> None:
    assert [str(QuantScheme.parse(text)) for text in TEXTS] == TEXTS


def test_every_scheme_parses_back_from_its_text() -> None:
    schemes = [QuantScheme.parse(text) for text in TEXTS]
    assert [QuantScheme.parse(str(scheme)) for scheme in schemes] == schemes
    assert len(set(schemes)) == len(TEXTS)


def test_dynamic_is_the_default_of_eight_bit_activations() -> None:
    assert QuantScheme.parse("w8a8-dynamic") == QuantScheme.parse("w8a8")


@pytest.mark.parametrize(
    ("text", "weights", "activations"),
    [
        ("w4a16-g64-asym", TensorScheme(int_format(4), "group", False, 64), None),
        ("w8a8", TensorScheme(int_format(8), "channel"), TensorScheme(int_format(8), "token", dynamic=True)),
        ("w8a8-static-asym", TensorScheme(int_format(8), "channel"), TensorScheme(int_format(8), "tensor", False)),
        ("w3a8-asym-static", TensorScheme(int_format(3), "channel", False), TensorScheme(int_format(8), "tensor")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_text_means_these_tensor_schemes(text: str, weights: TensorScheme, activations: TensorScheme | None) -> None:
    assert QuantScheme.parse(text) == QuantScheme(weights, activations)


@pytest.mark.parametrize(
    "text",
    [
        *("", "int4", "w4", "w4a5", "w1a16", "w9a16", "w4a16-g0", "w4a16-g00", "w4a16-g-1", "w4a16-64", "W4A16"),
        *("w4a16-static", "w4a16-dynamic-asym", "w4a16-asym-asym", "w4a16-tensor-g64", "w8a8-asym-g64", "w4a16 "),
        *("nf4", "nf4-b48", "nf4-b16", "nf4-b8192", "nf4-b64-asym", "fp4-b0", "fp8-g64", "fp8-dq"),
        *("w4a16-search", "nvfp4a16-search", "w4a4-static-search"),
    ],
)
def test_a_text_outside_the_grammar_is_answered_with_the_grammar(text: str) -> None:
    with pytest.raises(SchemeError) as caught:
        QuantScheme.parse(text)
    assert GRAMMAR in str(caught.value)
    assert repr(text) in str(caught.value)


def test_a_group_that_does_not_divide_names_the_layer_and_the_groups_that_do() -> None:
    with pytest.raises(SchemeError) as caught:
        check_fits(QuantScheme.parse("w4a16-g128").weights, 576, "model.layers.0.self_attn.q_proj")
    message = str(caught.value)
    assert "group size 128 does not divide in_features 576 of model.layers.0.self_attn.q_proj" in message
    assert "use one of 16, 32, 48, 64, 96, 192, channel" in message


def test_an_odd_width_still_has_a_way_out() -> None:
    with pytest.raises(SchemeError, match="use one of channel"):
        check_fits(QuantScheme.parse("w4a16-g64").weights, 577, "odd")


@pytest.mark.parametrize("text", ["w4a16-g64", "w8a16", "w8a8", "w4a16-tensor", "nf4-b64", "fp8"])
def test_a_width_that_every_scheme_divides_is_accepted(text: str) -> None:
    check_fits(QuantScheme.parse(text).weights, 576, "layer")


@pytest.mark.parametrize(
    "text",
    [
        *("fp8", "fp8a16", "fp8-tensor", "fp8-tensor-static", "fp8-static", "fp8-tile128", "fp8a16-tile64"),
        *("nvfp4", "nvfp4a16", "mxfp4", "mxfp4a16", "int8-t6", "int8-t0", "int8-t2.5"),
        *("w4a16-g128-order", "w3a16-g32-asym-order"),
    ],
)
def test_schemes_of_foreign_checkpoints_are_text_and_back(text: str) -> None:
    assert str(QuantScheme.parse(text)) == text


@pytest.mark.parametrize("text", ["w4a16-order", "w8a8-g32-order", "fp8a16-static", "nvfp4-g16", "int8-t-1"])
def test_schemes_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(SchemeError):
        QuantScheme.parse(text)
