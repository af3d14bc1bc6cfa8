"""`lowbit.quantize` with rotations on a tiny llama whose head shares the embedding. Oracles: transformers' own reader,
and the fidelity that the report measured on the model in memory."""

import json
from pathlib import Path

import pytest
import torch
from architectures import tiny
from checkpoints import TOKENS, stored_tensors
from saved import character_tokenizer, write_text
from transformers import AutoModelForCausalLM

import lowbit
from lowbit import Calibration, Conditions, Evaluation, Recipe, Report
from lowbit.model.rotation import Rotation
from lowbit.numerics.scheme import QuantScheme

RECIPES = {
    "offline": Recipe(QuantScheme.parse("w8a8"), "rotate", rotation=Rotation(online="none")),
    "at run time": Recipe.parse("rotate:w8a8"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tied")
    model = tiny("llama")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(folder / "model")
    character_tokenizer().save_pretrained(folder / "model")
    for seed, name in enumerate(("calibration.txt", "evaluation.txt")):
        write_text(folder / name, seed=seed)
    return folder


def _quantized(place: Path, kind: str) -> Report:
    calibration = Calibration(place / "calibration.txt", samples=6, seq_len=32)
    evaluation = Evaluation(place / "evaluation.txt", windows=3, seq_len=64, sample_tokens=5)
    return lowbit.quantize(place / "model", place / kind, RECIPES[kind], Conditions(calibration, evaluation))


@pytest.mark.parametrize(("kind", "method"), [("offline", "compressed-tensors"), ("at run time", "lowbit")])
def test_a_rotated_checkpoint_has_a_head_of_its_own_and_computes_as_measured(
    kind: str, method: str, place: Path
) -> None:
    report = _quantized(place, kind)
    assert any(note.startswith("rotated the residual stream") for note in report.notes)
    config = json.loads((place / kind / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert config["quantization_config"]["quant_method"] == method
    assert "lm_head.weight" in stored_tensors(place / kind)
    assert report.fidelity is not None
    evaluation = Evaluation(place / "evaluation.txt", windows=3, seq_len=64)
    found = lowbit.evaluate(place / kind, place / "model", evaluation).fidelity
    assert found is not None
    assert found.kld == pytest.approx(report.fidelity.kld, rel=0.2, abs=1e-3)  # the embedding went to bfloat16
    assert found.kld < 0.05


@torch.no_grad()
def test_transformers_reads_what_was_rotated_offline(place: Path) -> None:
    if not (place / "offline").exists():
        _quantized(place, "offline")
    theirs = AutoModelForCausalLM.from_pretrained(place / "offline", dtype=torch.float32)
    ours = lowbit.load(place / "offline", torch.float32)
    wanted, found = theirs(TOKENS).logits, ours(TOKENS).logits
    assert (found - wanted).norm() < 1e-2 * wanted.norm()  # int8 sums here, products of rounded floats there
