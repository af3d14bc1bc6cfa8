"""Methods that do not apply to a model or a text: exit code 2, nothing written, a sentence that names what does."""

from pathlib import Path

import pytest
from command import lowbit_command
from saved import save_tiny, write_text


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny models by their type, calibration.txt and evaluation.txt."""
    folder = tmp_path_factory.mktemp("methods")
    for model_type in ("llama", "olmo2", "gpt_neox", "gemma2"):
        save_tiny(model_type, folder / model_type)
    write_text(folder / "calibration.txt", seed=0)
    write_text(folder / "evaluation.txt", seed=1)
    return folder


def _message(place: Path, out: Path, model: str, *options: object, samples: int = 4) -> str:
    text = ["--calibration", place / "calibration.txt", "--samples", samples, "--seq-len", 32]
    text += ["--eval-text", place / "evaluation.txt", "--eval-windows", 2, "--scheme", "w4a16-g16"]
    ended = lowbit_command("quantize", place / model, "-o", out, *text, *options)
    assert ended.code == 2, ended.err
    assert not out.exists()
    return " ".join(ended.message.split())


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        ("olmo2", ["--method", "awq"], "awq found no norm in Olmo2ForCausalLM whose only readers are matrices that can "
                                       "be scaled with it; use --method aligned"),
        ("gpt_neox", ["--method", "rotate"], "subtracts the mean of the residual stream, which therefore can't be "
                                             "rotated; use"),
        ("gemma2", ["--method", "rotate"], "the residual stream of model.layers.0 can't be rotated: a norm there has a "
                                           "gain between a linear and the stream"),
        ("llama", ["--bits", "1.5"], "1.5 bits a weight can't be reached: the least is"),
        ("llama", ["--method", "gptq", "--seq-len", "16"], "64 calibration tokens are too few for gptq: "
         "model.layers.0.mlp.down_proj reads 96 channels, whose second moment is singular with fewer tokens; give a "
         "longer text or more and longer samples, or use --method rtn-weighted"),
        ("llama", ["--seq-len", "16"], "too few for aligned"),
    ],
    ids=["awq without norms", "norms that subtract the mean", "norms behind projections", "too few bits",
         "few tokens for a Hessian", "few tokens for effort 2"],
)  # fmt: skip
def test_what_does_not_apply_is_refused_with_what_does(
    model: str, options: list[object], words: str, place: Path, tmp_path: Path
) -> None:
    message = _message(place, tmp_path / "out", model, *options)
    assert words in message
    if "--method" in options:
        assert "--method aligned" in message or "--method rtn-weighted" in message


def test_the_method_that_is_named_instead_of_gptq_works_with_so_few_tokens(place: Path, tmp_path: Path) -> None:
    text = ["--calibration", place / "calibration.txt", "--samples", 1, "--seq-len", 16, "--no-eval"]
    for number, other in enumerate((["--method", "rtn-weighted"], ["--effort", "1"])):
        out = tmp_path / str(number)
        ended = lowbit_command("quantize", place / "llama", "-o", out, "--scheme", "w4a16-g16", *other, *text)
        assert ended.code == 0, ended.err
        assert out.exists()
