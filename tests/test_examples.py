"""The examples, on what is small: the demo on the first two blocks of its model, the model's permutation on a tiny one.

Oracle of the permutation: it keeps the function, so logits stay what they were up to the order of float sums.
"""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from architectures import tiny
from saved import cut_demo_model, save_tiny
from transformers import AutoModelForCausalLM, PreTrainedModel

import lowbit
from lowbit import Calibration, Evaluation, InputError, Report

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str) -> ModuleType:
    """The module of examples/NAME.py, which is no package."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.demo
def test_the_demo_shows_a_table_a_sample_and_a_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    demo, model = example("demo"), cut_demo_model(tmp_path / "model")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(demo, "Calibration", lambda **_: Calibration(samples=25, seq_len=64))
    monkeypatch.setattr(demo, "Evaluation", lambda **_: Evaluation(windows=2, seq_len=64, sample_tokens=4))
    demo.main(str(model), str(tmp_path / "out"))
    shown, page = capsys.readouterr().out, tmp_path / "out" / "report.html"
    assert {"rtn:w8a8", "rtn:w4a16-g64", "gptq:w4a16-g64"} <= set(demo.RECIPES)
    for text in ("original", "perplexity", "top-1", "seconds", *demo.RECIPES, lowbit.original.PROMPT, str(page)):
        assert text in " ".join(shown.split()), text
    listed = json.loads((tmp_path / "out" / "report.json").read_text())
    reports = {report.recipe: report for report in (Report.from_json(json.dumps(entry)) for entry in listed)}
    assert list(reports) == list(demo.RECIPES)
    kld = {name: report.fidelity.kld for name, report in reports.items() if report.fidelity}
    assert kld["rtn:w8a8"] < kld["gptq:w4a16-g64"] < kld["rtn:w4a16-g64"]
    assert "<svg" in page.read_text()


def test_the_demo_replaces_its_own_folder_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demo = example("demo")
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("mine")
    save_tiny("llama", tmp_path / "model")
    with pytest.raises(InputError, match="does not look like a checkpoint or a report"):
        demo.main(str(tmp_path / "model"), str(out))
    (out / "thesis.tex").rename(out / "report.json")
    monkeypatch.setattr(demo, "RECIPES", ("rtn:w8a16",))
    monkeypatch.setattr(demo, "Evaluation", lambda **_: Evaluation(windows=1, seq_len=64, sample_tokens=4))
    demo.main(str(tmp_path / "model"), str(out))
    assert "rtn" in (out / "report.json").read_text()


def tied() -> PreTrainedModel:
    """A tiny llama whose head is its embedding, as SmolLM2's is."""
    config = tiny("llama").config
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@torch.no_grad()
def test_the_permutation_keeps_the_function_and_moves_every_matrix() -> None:
    model, ids = tied(), torch.randint(3, 128, (2, 20), generator=torch.Generator().manual_seed(0))
    for parameter in model.parameters():  # norms of ones would hide a norm that is forgotten
        parameter.add_(0.1 * torch.rand(parameter.shape, generator=torch.Generator().manual_seed(1)))
    before, weights = model(ids).logits, {name: p.clone() for name, p in model.named_parameters()}
    example("demo_model").permute(model)
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-4)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, weights[name]), name
        assert torch.equal(parameter.flatten().sort()[0], weights[name].flatten().sort()[0]), name


@torch.no_grad()
def test_the_permutation_is_always_the_same() -> None:
    first, second = tied(), tied()
    for model in (first, second):
        example("demo_model").permute(model)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
