"""The quantization_config of compressed-tensors. Oracles: its own pydantic model, which refuses unknown keys in
schemes; and the parse, which must invert what is written."""

import pytest
from compressed_tensors.quantization import QuantizationConfig

from lowbit.errors import CheckpointError
from lowbit.io.compressed_tensors import parse_config, quantization_config
from lowbit.numerics.scheme import QuantScheme

TEXTS = ["w4a16-g64", "w4a16-g32-asym", "w3a16-tensor", "w8a16", "w8a8", "w8a8-dynamic-asym", "w8a8-static"]
TEXTS += ["w8a8-static-asym", "w8a8-asym-static", "w4a8-g128", "fp8"]
FORMATS = {"w8a16": "pack-quantized", "w4a8-g128": "int-quantized", "fp8": "float-quantized"}


@pytest.mark.parametrize("text", TEXTS)
def test_a_config_reads_back_as_the_scheme_it_was_made_of(text: str) -> None:
    scheme = QuantScheme.parse(text)
    config = quantization_config({"a.q": scheme, "a.k": scheme}, ["lm_head"])
    assert parse_config(config, ["a.k", "a.q"]) == {"a.k": scheme, "a.q": scheme}


@pytest.mark.parametrize("text", TEXTS)
def test_their_reader_takes_a_config_and_understands_the_same(text: str) -> None:
    scheme = QuantScheme.parse(text)
    theirs = QuantizationConfig.model_validate(quantization_config({"a.q": scheme}, ["lm_head"]))
    group = theirs.config_groups["group_0"]
    for ours, read in ((scheme.weights, group.weights), (scheme.activations, group.input_activations)):
        assert (ours is None) == (read is None)
        if ours is not None and read is not None:
            assert (read.num_bits, read.symmetric, read.dynamic) == (ours.bits, ours.symmetric, ours.dynamic)
            assert (read.strategy, read.group_size) == (ours.granularity, ours.group_size)
    assert theirs.format == FORMATS.get(text, theirs.format)
    assert theirs.ignore == ["lm_head"]


def test_several_schemes_name_their_modules() -> None:
    schemes = {"a.q": QuantScheme.parse("w4a16-g64"), "a.k": QuantScheme.parse("w8a8"), "b.q": QuantScheme.parse("fp8")}
    config = quantization_config(schemes, [])
    assert parse_config(config, schemes) == schemes
    assert config["format"] == "mixed-precision"
    formats = {group["targets"][0]: group["format"] for group in config["config_groups"].values()}
    assert formats == {"a.q": "pack-quantized", "a.k": "int-quantized", "b.q": "float-quantized"}
    QuantizationConfig.model_validate(config)


def config_of(targets: list[str], **weights: object) -> dict[str, object]:
    return {"config_groups": {"group_0": {"targets": targets, "weights": {"num_bits": 4, **weights}}}}


@pytest.mark.parametrize(
    ("target", "module", "matches"),
    [
        ("Linear", "a.b.q_proj", True),
        ("a.b.q_proj", "a.b.q_proj", True),
        ("a.b.q_proj", "a.b.q_proj2", False),
        ("re:.*q_proj$", "a.b.q_proj", True),
        ("re:.*q_proj$", "a.b.k_proj", False),
        ("re:q_proj", "a.b.q_proj", False),  # a match begins at the start of the name, as theirs does
    ],
)
def test_targets_are_types_names_and_patterns(target: str, module: str, matches: bool) -> None:
    config = config_of([target], strategy="channel")
    if matches:
        assert str(parse_config(config, [module])[module]) == "w4a16"
    else:
        with pytest.raises(CheckpointError, match=f"{module} is quantized, but no group"):
            parse_config(config, [module])


@pytest.mark.parametrize(
    ("weights", "text"),
    [({}, "w4a16-tensor"), ({"group_size": 128}, "w4a16-g128"), ({"group_size": 32, "strategy": "group"}, "w4a16-g32")],
)
def test_what_a_config_leaves_out_is_what_they_leave_out(weights: dict[str, object], text: str) -> None:
    assert str(parse_config(config_of(["Linear"], **weights), ["a"])["a"]) == text


@pytest.mark.parametrize(
    "weights",
    [{"type": "float"}, {"num_bits": 16}, {"strategy": "block"}, {"strategy": "group", "actorder": "group"}],
)
def test_what_lowbit_cannot_read_is_refused(weights: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match="does not read compressed-tensors weights of"):
        parse_config(config_of(["Linear"], **weights), ["a"])
