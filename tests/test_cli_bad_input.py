"""Input that cannot work: one sentence that names the culprit and says what to do, exit code 2, nothing written.

`refused` is the oracle: it fails on a traceback (an exception leaves the command), on more than one line after
"error: ", and on anything that was left in or beside the output folder.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from command import lowbit_command
from safetensors.torch import load_file, save_file
from saved import save_tiny, write_text

from lowbit.numerics.scheme import GRAMMAR

EMBEDDING = "model.embed_tokens.weight"


class Place(NamedTuple):
    """A folder with the texts and a tiny model, and the output that no test must find."""

    folder: Path
    model: Path
    out: Path


@pytest.fixture
def place(tmp_path: Path) -> Place:
    save_tiny("llama", tmp_path / "model")
    write_text(tmp_path / "calibration.txt", seed=0)
    write_text(tmp_path / "evaluation.txt", seed=1)
    return Place(tmp_path, tmp_path / "model", tmp_path / "out")


def arguments(place: Place, *options: object) -> list[object]:
    texts = ["--calibration", place.folder / "calibration.txt", "--samples", 4, "--seq-len", 32]
    texts += ["--eval-text", place.folder / "evaluation.txt", "--eval-windows", 2]
    return ["quantize", place.model, "-o", place.out, "--scheme", "w4a16-g16", *texts, *options]


def refused(place: Place, *command: object) -> str:
    """The message with which the command refuses."""
    before = sorted(place.folder.rglob("*"))
    ended = lowbit_command(*command)
    assert ended.code == 2, ended.err
    assert ended.message.startswith("error: ")
    assert ended.out == ""
    assert sorted(place.folder.rglob("*")) == before
    return ended.message.removeprefix("error: ")


def test_a_tokenizer_of_another_model_is_refused(place: Place) -> None:
    rewrite(place.model, lambda tensors: tensors.update({EMBEDDING: tensors[EMBEDDING][:40].clone()}))
    config = json.loads((place.model / "config.json").read_text())
    (place.model / "config.json").write_text(json.dumps(config | {"vocab_size": 40, "tie_word_embeddings": True}))
    rewrite(place.model, lambda tensors: tensors.pop("lm_head.weight", None))
    said = refused(place, *arguments(place))
    assert "and LlamaForCausalLM knows 40: tokenizer and model do not belong together" in said


def rewrite(model: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = model / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_missing_model(place: Place) -> None:
    missing = place.folder / "nowhere"
    assert refused(place, "quantize", missing, "-o", place.out) == f"there is no folder {missing}"


@pytest.mark.parametrize("verb", ["quantize", "compare", "evaluate", "inspect"])
def test_an_empty_folder(verb: str, place: Place) -> None:
    empty = place.folder / "empty"
    empty.mkdir()
    out = ["-o", place.out] if verb in ("quantize", "compare") else []
    message = refused(place, verb, empty, *out)
    assert message == f"{empty} has no config.json; give the folder of a Hugging Face model"


def test_a_folder_without_weights(place: Place) -> None:
    (place.model / "model.safetensors").rename(place.model / "pytorch_model.bin")
    message = refused(place, *arguments(place))
    assert message.startswith(f"{place.model} holds no *.safetensors files; pytorch_model.bin is a pickle")
    assert "convert it to safetensors" in message


def test_a_file_that_is_no_gguf(place: Place) -> None:
    file = place.folder / "model.gguf"
    file.write_bytes(b"<html>")
    assert "is not a GGUF file" in refused(place, "quantize", file, "-o", place.out)


def test_a_model_of_an_unknown_kind(place: Place) -> None:
    config = place.model / "config.json"
    config.write_text(config.read_text().replace('"llama"', '"lamma"'))
    assert "lamma" in refused(place, *arguments(place))


def test_a_model_without_a_tokenizer(place: Place) -> None:
    for file in place.model.glob("tokenizer*"):
        file.unlink()
    assert "has no tokenizer that can be loaded" in refused(place, *arguments(place))


@pytest.mark.parametrize("scheme", ["w4a16-g", "int4", "w9a16", "w4a16-g0", "w4a5", "nf4", "nf4-b48", "w4a16-static"])
def test_an_unknown_scheme_is_answered_with_the_grammar(scheme: str, place: Place) -> None:
    message = refused(place, *arguments(place, "--scheme", scheme))
    assert repr(scheme) in message
    assert GRAMMAR in message


def test_a_group_that_does_not_divide_names_the_layer_and_the_groups_that_do(place: Place) -> None:
    message = refused(place, *arguments(place, "--scheme", "w4a16-g64"))
    assert message.startswith(
        "group size 64 does not divide in_features 96 of model.layers.0.mlp.down_proj; use one of"
    )
    offered = message.partition("use one of ")[2].partition(", channel")[0].split(", ")
    assert offered == ["16", "32", "48", "96"]
    for group in offered:
        rule = ["--rule", f"*.down_proj=w4a16-g{group}"]
        ended = lowbit_command(
            *arguments(place, "--scheme", "w4a16-g64", "--method", "rtn", "--no-eval", "--overwrite", *rule)
        )  # fmt: skip
        assert ended.code == 0, ended.err


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_weight_that_is_not_finite_is_named(value: float, name: str, place: Place) -> None:
    rewrite(place.model, lambda tensors: tensors[name].view(-1)[3].fill_(value))
    message = refused(place, *arguments(place, "--method", "rtn"))
    assert message.startswith(f"{name} holds 1 values that are NaN or infinite")
    assert "get a clean copy" in message


@pytest.mark.parametrize("keep", [0, 4, 200, -1000], ids=["nothing", "length", "header", "data"])
def test_truncated_safetensors(keep: int, place: Place) -> None:
    path = place.model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    message = refused(place, *arguments(place))
    assert message.startswith(f"{path} is truncated or no safetensors file")
    assert "download it again" in message


def test_a_tensor_that_is_missing(place: Place) -> None:
    rewrite(place.model, lambda tensors: tensors.pop("model.layers.2.self_attn.v_proj.weight"))
    assert "model.layers.2.self_attn.v_proj.weight" in refused(place, *arguments(place))


def test_a_model_that_is_quantized_already(place: Place) -> None:
    done = place.folder / "done"
    fast = ["--method", "rtn", "--no-eval"]
    assert lowbit_command("quantize", place.model, "-o", done, "--scheme", "w8a16", *fast).code == 0
    message = refused(place, "quantize", done, "-o", place.out)
    assert message == f"{done} is quantized already (compressed-tensors); give the original 16-bit model"


def test_no_space_left_is_found_before_the_work(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(place.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr("lowbit.verbs.load_float", lambda *_: pytest.fail("the model was loaded"))
    message = refused(place, *arguments(place))
    assert message.startswith(f"no space left for {place.out}: it needs about ")
    assert message.endswith("and 1.00 kB are free; free some space or choose another disk")


@pytest.mark.parametrize("place_of_write", ["lowbit.io.checkpoint.shutil.copyfile", "lowbit.report.Report.save"])
def test_a_disk_that_fills_while_writing(place_of_write: str, place: Place) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    with patch(place_of_write, side_effect=full):
        message = refused(place, *arguments(place, "--method", "rtn", "--no-eval"))
    assert message == (
        f"no space left while writing {place.out}; nothing was kept there: free some space and run again"
    )


def test_a_full_disk_keeps_the_folder_that_was_to_be_overwritten(place: Place) -> None:
    fast = ["--method", "rtn", "--no-eval", "--overwrite"]
    assert lowbit_command(*arguments(place, *fast)).code == 0
    before = {path: path.read_bytes() for path in place.out.iterdir()}
    with patch("lowbit.io.checkpoint.shutil.copyfile", side_effect=OSError(errno.ENOSPC, "full")):
        refused(place, *arguments(place, *fast, "--scheme", "w8a16"))
    assert {path: path.read_bytes() for path in place.out.iterdir()} == before


@pytest.mark.parametrize("option", [["--rule", "*.w1=w8a16"], ["--ignore", "*.w1"]], ids=["rule", "ignore"])
def test_a_rule_that_matches_nothing_is_answered_with_names(option: list[str], place: Place) -> None:
    message = refused(place, *arguments(place, *option))
    assert message.startswith("'*.w1' matches no layer of this model")
    assert "*.down_proj" in message.partition("names end in ")[2]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--rule", "down_proj"], "the rule 'down_proj' is not GLOB=SCHEME, as in '*.down_proj=w8a16'"),
        (["--rule", "*.down_proj=int4"], "unknown scheme 'int4'"),
        (["--ignore", "*"], "nothing is left to quantize"),
        (["--method", "magic"], "unknown method 'magic'; choose one of rtn, "),
        (
            ["--scheme", "fp8", "--method", "gptq"],
            "gptq works on integer grids and on nvfp4 and mxfp4, and fp8 is none; use --method rtn",
        ),
        (["--observer", "magic"], "unknown observer 'magic'; choose one of "),
        (["--device", "cuda:99"], "there is no device 'cuda:99' here"),
        (["--device", "gpu"], "there is no device 'gpu' here"),
        (["--max-ppl-increase", "little"], "--max-ppl-increase 'little' is not a percentage such as 2%"),
        (["--no-eval", "--max-kld", "1"], "a limit on KL or perplexity needs an evaluation: leave out --no-eval"),
        (["--calibration", "nowhere.txt"], "there is no file nowhere.txt"),
        (["--calibration", "nowhere"], "there is no calibration text 'nowhere'; give a file ("),
        (["--eval-text", "nowhere.txt"], "there is no file nowhere.txt"),
        (["--samples", "0"], "0 samples of 32 tokens were asked for; both must be at least 1"),
        (["--eval-windows", "1000"], " were asked for; give a longer text, or ask for fewer or shorter samples"),
    ],
    ids=lambda value: value if isinstance(value, str) and not value.startswith("-") else "",
)
def test_an_option_that_cannot_work(options: list[str], expected: str, place: Place) -> None:
    assert expected in refused(place, *arguments(place, *options))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here, so asking for it is no mistake")
def test_cuda_where_there_is_none(place: Place) -> None:
    message = refused(place, *arguments(place, "--device", "cuda"))
    assert message.startswith("there is no device 'cuda' here (")
    assert message.endswith("; use cpu, cuda or auto")


def test_a_calibration_text_that_is_shorter_than_asked(place: Place) -> None:
    text = place.folder / "calibration.txt"
    message = refused(place, *arguments(place, "--samples", 500))
    assert message == (
        f"{text} holds 187 windows of 32 tokens, 500 were asked for; "
        "give a longer text, or ask for fewer or shorter samples"
    )


@pytest.mark.parametrize("disguise", ["itself", "another path", "a copy"])
def test_a_text_that_is_both_calibration_and_evaluation(disguise: str, place: Place) -> None:
    text = place.folder / "calibration.txt"
    other = {"itself": text, "another path": place.folder / "model" / ".." / "calibration.txt"}.get(disguise)
    if other is None:
        other = Path(shutil.copy(text, place.folder / "copy.txt"))
    everything = ["--samples", 180, "--eval-text", other]
    message = refused(place, *arguments(place, *everything))
    assert message.startswith(f"{other} can't be both calibration and evaluation text")


def test_an_existing_folder_is_not_overwritten_unasked(place: Place) -> None:
    place.out.mkdir()
    (place.out / "config.json").write_text("mine")
    message = refused(place, *arguments(place))
    assert message == f"{place.out} exists already; choose another folder, or replace it with --overwrite"
    assert (place.out / "config.json").read_text() == "mine"


def test_a_folder_of_something_else_is_not_overwritten_at_all(place: Place) -> None:
    place.out.mkdir()
    (place.out / "thesis.tex").write_text("mine")
    message = refused(place, *arguments(place, "--overwrite"))
    assert "does not look like a checkpoint" in message
    assert message.endswith("remove it yourself")


def test_the_model_itself_is_not_overwritten(place: Place) -> None:
    command = arguments(place, "--overwrite")
    command[3] = place.model
    assert refused(place, *command) == f"{place.model} is the model itself; write to another folder"


def test_an_output_below_a_file(place: Place) -> None:
    command = arguments(place)
    command[3] = place.folder / "calibration.txt" / "out"
    message = refused(place, *command)
    assert message == (
        f"{command[3]} can't be written, since {place.folder / 'calibration.txt'} is not a folder; "
        "choose another folder"
    )


@pytest.mark.parametrize("wanted", ["model", "calibration.txt/r"])
@pytest.mark.parametrize(
    ("verb", "option"),
    [("quantize", "--json"), ("quantize", "--report"), ("compare", "--json"), ("compare", "--report"),
     ("evaluate", "--json")],
)  # fmt: skip
def test_a_report_where_none_can_be_written_is_refused_before_the_work(
    verb: str, option: str, wanted: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowbit.verbs.open_source", lambda *_: pytest.fail("the work began"))
    out = [] if verb == "evaluate" else ["-o", place.out]
    message = refused(place, verb, place.model, *out, option, place.folder / wanted)
    assert message.startswith(f"{place.folder / wanted} can't be written, since ")
    assert message.endswith("; choose another file")


def test_a_read_only_place_is_refused_before_the_work(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    really = os.access  # the tests may run as root, whom nothing is read-only for
    monkeypatch.setattr(os, "access", lambda path, *rest: path != place.folder and really(path, *rest))
    message = refused(place, *arguments(place))
    assert message == f"{place.out} can't be written, since {place.folder} is read-only; choose another folder"


@pytest.mark.parametrize("name", ["owner/name", "name"])
def test_a_hub_id_without_a_network(name: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place.folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(place.folder))
    message = refused(place, "quantize", name, "-o", place.out)
    assert message.startswith(f"there is no folder {name}, and the hub could not be asked for it (")


@pytest.mark.parametrize(
    ("recipes", "expected"),
    [
        ("rtn:w8a8,rtn:w8a8", "give one or more different recipes, such as rtn:w8a8,gptq:w4a16-g64"),
        ("rtn:int4", f"unknown scheme 'int4'; a scheme is written {GRAMMAR}"),
        ("magic:w8a8", "unknown method 'magic'; choose one of "),
        ("rtn:w4a16-g16,rtn:w4a16-g64", "group size 64 does not divide in_features 96 of model.layers.0.mlp.down_proj"),
    ],
)
def test_recipes_that_cannot_be_compared(recipes: str, expected: str, place: Place) -> None:
    assert expected in refused(place, "compare", place.model, "-o", place.out, "--recipes", recipes)


def test_models_with_different_tokenizers_are_not_compared(place: Place) -> None:
    other = save_tiny("llama", place.folder / "other")
    tokenizer = other / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"e": ', '"swap": ', 1).replace('"a": ', '"e": ', 1))
    text = ["--text", place.folder / "evaluation.txt", "--windows", 2]
    message = refused(place, "evaluate", place.model, "--reference", other, *text)
    assert "have different tokenizers" in message


def test_a_task_that_lm_eval_does_not_know(place: Place) -> None:
    text = ["--text", place.folder / "evaluation.txt", "--windows", 2]
    message = refused(place, "evaluate", place.model, *text, "--tasks", "no_such_task_1")
    assert message.startswith("lm-eval knows no task no_such_task_1; ")


@pytest.mark.parametrize(
    ("factor", "expected"),
    [(1e38, "model.layers.1.mlp.down_proj: activations are not finite"),
     (1e30, "model.layers.1.mlp.down_proj: activations are too large")],
    ids=["overflow", "squares overflow"],
)  # fmt: skip
def test_activations_that_are_not_finite_name_the_layer(factor: float, expected: str, place: Place) -> None:
    rewrite(place.model, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].mul_(factor))
    if factor == 1e38:
        rewrite(place.model, lambda tensors: tensors["model.layers.1.mlp.gate_proj.weight"].mul_(1e4))
    assert f"the input of {expected}" in refused(place, *arguments(place, "--no-eval"))


def test_logits_that_are_not_finite_are_told(place: Place) -> None:
    rewrite(place.model, lambda tensors: tensors["lm_head.weight"].mul_(1e38))
    message = refused(place, *arguments(place, "--method", "rtn"))
    assert message.startswith("the logits of LlamaForCausalLM are NaN, infinite or much too large on the held-out text")
