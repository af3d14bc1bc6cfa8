"""quantize, compare, evaluate and load as functions, on tiny models with a tokenizer of characters.

Oracles: the model that transformers loads from the same folder, plain full-logits arithmetic, and the issue's list of
fields for report.json.
"""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from saved import DEMO_MODEL, character_tokenizer, save_tiny, write_text
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowbit
from lowbit import Calibration, Conditions, Evaluation, Gates, InputError, QuantLinear, Recipe, Report, Rule, Scores
from lowbit.observe.tokens import load_tokens, overlap, packaged_text, text_windows

FIELDS = {
    "": {"model", "scheme", "method", "seed", "versions", "calibration", "coverage", "bytes_before", "bytes_after",
         "seconds", "peak_memory_bytes", "layers", "fidelity"},
    "calibration": {"source", "hash", "samples", "seq_len"},
    "coverage": {"parameters", "quantized", "fraction", "skipped"},
    "coverage.skipped.0": {"name", "parameters", "bytes", "reason"},
    "layers.0": {"name", "scheme", "relative_error", "sqnr_db", "output_error"},
    "fidelity": {"perplexity_reference", "perplexity", "kld", "kld_stderr", "top1_agreement", "tokens"},
    "versions": {"lowbit", "torch", "transformers", "python"},
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny llama in model/, calibration.txt and evaluation.txt."""
    folder = tmp_path_factory.mktemp("place")
    save_tiny("llama", folder / "model", torch.bfloat16)
    (folder / "model" / "chat_template.jinja").write_bytes(b"{{ messages }}\r\n")
    write_text(folder / "calibration.txt", seed=0)
    write_text(folder / "evaluation.txt", seed=1)
    return folder


def conditions(place: Path, seed: int = 0, **others: object) -> Conditions:
    """Short calibration and evaluation on the two texts."""
    calibration = Calibration(place / "calibration.txt", samples=6, seq_len=32, seed=seed)
    evaluation = Evaluation(place / "evaluation.txt", windows=3, seq_len=64, sample_tokens=5)
    return Conditions(calibration, evaluation, **others)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def gptq(place: Path) -> Report:
    """The report of a run into place/gptq."""
    return lowbit.quantize(place / "model", place / "gptq", Recipe.parse("gptq:w4a16-g16"), conditions(place))


def at(value: object, path: str) -> object:
    for key in filter(None, path.split(".")):
        value = value[int(key)] if key.isdigit() else value[key]  # type: ignore[index]
    return value


@pytest.mark.parametrize("path", FIELDS, ids=lambda path: path or "report")
def test_report_json_has_every_field_of_the_issue(path: str, place: Path, gptq: Report) -> None:
    written = json.loads((place / "gptq" / "report.json").read_text())
    assert FIELDS[path] <= set(at(written, path))  # type: ignore[call-overload]


def test_report_json_is_the_report_that_is_returned(place: Path, gptq: Report) -> None:
    assert Report.from_json((place / "gptq" / "report.json").read_text()) == gptq


def test_report_says_what_was_done(place: Path, gptq: Report) -> None:
    assert (gptq.model, gptq.recipe, gptq.seed) == (str(place / "model"), "gptq:w4a16-g16", 0)
    kinds = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
             "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
    names = [f"model.layers.{block}.{kind}" for block in range(3) for kind in kinds]
    assert sorted(layer.name for layer in gptq.layers) == sorted(names)
    for layer in gptq.layers:
        assert 0.01 < layer.relative_error < 0.3
        assert layer.output_error is not None
        assert 0 < layer.output_error < layer.relative_error
    before, after = (place / name / "model.safetensors" for name in ("model", "gptq"))
    assert (gptq.bytes_before, gptq.bytes_after) == (before.stat().st_size, after.stat().st_size)
    assert gptq.bytes_after < gptq.bytes_before / 2
    assert gptq.coverage.parameters == gptq.coverage.quantized + sum(item.parameters for item in gptq.coverage.skipped)
    assert gptq.coverage.fraction == 1
    assert 0 < gptq.seconds < 60
    assert 1e8 < gptq.peak_memory_bytes < 1e10
    assert gptq.sample is not None
    assert gptq.sample.before
    assert gptq.warnings == ()


def test_calibration_is_recorded_with_the_hash_of_its_tokens(place: Path, gptq: Report) -> None:
    text, tokenizer = (place / "calibration.txt").read_text(), character_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    windows = torch.tensor(ids[: len(ids) // 32 * 32]).view(-1, 32)
    chosen = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))[:6]]
    record = gptq.calibration
    assert record is not None
    assert (record.source, record.samples, record.seq_len) == (str(place / "calibration.txt"), 6, 32)
    assert record.hash == hashlib.sha256(chosen.numpy().tobytes()).hexdigest()


@torch.no_grad()
def test_fidelity_is_the_distance_between_the_two_folders(place: Path, gptq: Report) -> None:
    original = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    quantized = lowbit.load(place / "gptq", dtype=torch.float32)
    ids = load_tokens(place / "evaluation.txt", character_tokenizer(), 3, 64, 0).ids
    p, q = (torch.log_softmax(model(ids).logits[:, :-1].double(), -1) for model in (original, quantized))
    kld = (p.exp() * (p - q)).sum(-1).mean(-1)  # [windows]
    surprise = -q.gather(-1, ids[:, 1:, None]).mean()
    assert gptq.fidelity is not None
    assert gptq.fidelity.kld == pytest.approx(kld.mean().item(), rel=1e-3)  # float32 logits against float64
    assert gptq.fidelity.kld_stderr == pytest.approx(kld.std().item() / 3**0.5, rel=1e-2)
    assert gptq.fidelity.perplexity == pytest.approx(surprise.exp().item(), rel=1e-5)
    assert gptq.fidelity.top1_agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert gptq.fidelity.tokens == 3 * 63


@pytest.mark.parametrize("recipe", ["gptq:w4a16-g16-asym", "rtn-clip:w3a16", "rtn:w8a8-static", "rtn:nf4-b64-dq"])
def test_the_same_seed_gives_the_same_bytes(recipe: str, place: Path, tmp_path: Path) -> None:
    reports = [
        lowbit.quantize(place / "model", tmp_path / name, Recipe.parse(recipe), conditions(place)) for name in "ab"
    ]
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert (reports[0].layers, reports[0].fidelity) == (reports[1].layers, reports[1].fidelity)


def test_another_seed_calibrates_on_other_tokens(place: Path, gptq: Report, tmp_path: Path) -> None:
    other = lowbit.quantize(
        place / "model", tmp_path / "out", Recipe.parse("gptq:w4a16-g16"), conditions(place, seed=1)
    )  # fmt: skip
    assert other.calibration is not None
    assert gptq.calibration is not None
    assert other.calibration.hash != gptq.calibration.hash
    assert other.seed == 1
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != (place / "gptq" / "model.safetensors").read_bytes()


def test_three_bits_are_said_to_be_one_seed_of_three(place: Path, gptq: Report, tmp_path: Path) -> None:
    recipe, without = Recipe.parse("rtn-weighted:w3a16-g16"), Recipe.parse("rtn:w3a16-g16")
    report = lowbit.quantize(place / "model", tmp_path / "three", recipe, conditions(place, seed=4))
    words = "this is seed 4 alone: at 3 bits and below, compare methods over three seeds (--seed 5 and --seed 6 too)"
    assert report.notes == (words,)
    assert lowbit.quantize(place / "model", tmp_path / "rtn", without, conditions(place)).notes == ()
    assert gptq.notes == ()


def test_what_is_not_quantized_is_copied_byte_for_byte(place: Path, gptq: Report) -> None:
    before, after = load_file(place / "model" / "model.safetensors"), load_file(place / "gptq" / "model.safetensors")
    left = [item.name for item in gptq.coverage.skipped]
    assert len(left) == 9
    for name in left:
        assert before[name].dtype == after[name].dtype == torch.bfloat16
        assert torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (place / "model" / name).read_bytes() == (place / "gptq" / name).read_bytes()
    config = json.loads((place / "gptq" / "config.json").read_text())
    assert config.pop("quantization_config")["quant_method"] == "compressed-tensors"
    assert config == json.loads((place / "model" / "config.json").read_text())
    assert (place / "gptq" / "model.safetensors").stat().st_mode == (
        place / "model" / "model.safetensors"
    ).stat().st_mode


def test_load_keeps_weights_packed(place: Path, gptq: Report) -> None:
    model = lowbit.load(place / "gptq")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    assert sorted(layers) == sorted(layer.name for layer in gptq.layers)
    assert all(layer.weight_packed.dtype == torch.int32 for layer in layers.values())
    assert model.dtype == torch.bfloat16
    assert not model.training


def test_rules_choose_schemes_by_name(place: Path, tmp_path: Path) -> None:
    rules = (Rule.parse("*.down_proj=w8a16"), Rule("*.1.*", None), Rule.parse("lm_head=w8a16"))
    recipe = Recipe(Recipe.parse("w4a16-g16").scheme, "rtn", rules)
    report = lowbit.quantize(place / "model", tmp_path / "out", recipe, conditions(place, gates=Gates(None)))
    schemes = {layer.name: layer.scheme for layer in report.layers}
    assert schemes["model.layers.0.mlp.down_proj"] == schemes["lm_head"] == "w8a16"
    assert schemes["model.layers.2.mlp.up_proj"] == "w4a16-g16"
    assert not any(".1." in name for name in schemes)
    skipped = {item.name: item.reason for item in report.coverage.skipped}
    assert "left as it is by the rule '*.1.*'" in skipped["model.layers.1.mlp.up_proj.weight"]
    loaded = {n: str(m.scheme) for n, m in lowbit.load(tmp_path / "out").named_modules() if isinstance(m, QuantLinear)}
    assert loaded == schemes


def test_progress_counts_blocks_and_windows(place: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    watched = conditions(place, progress=lambda *step: seen.append(step))
    lowbit.quantize(place / "model", tmp_path / "out", Recipe.parse("rtn:w8a16"), watched)
    assert [step for step in seen if step[0] == "quantizing"] == [("quantizing", done, 3) for done in (1, 2, 3)]
    assert [step for step in seen if step[0] == "measuring"] == [("measuring", done, 3) for done in (1, 2, 3)]
    assert seen[0] == ("measuring the original", 0, 1)


def test_a_recipe_without_data_reads_no_calibration_text(place: Path, tmp_path: Path) -> None:
    nowhere = Conditions(Calibration("nowhere.txt"), None)
    report = lowbit.quantize(place / "model", tmp_path / "out", Recipe.parse("rtn:w4a16-g16"), nowhere)
    assert (report.calibration, report.fidelity, report.sample) == (None, None, None)
    with pytest.raises(InputError, match=r"there is no file nowhere\.txt"):
        lowbit.quantize(place / "model", tmp_path / "other", Recipe.parse("gptq:w4a16-g16"), nowhere)
    assert not (tmp_path / "other").exists()


def test_calibration_tokens_may_be_a_tensor(place: Path, tmp_path: Path) -> None:
    ids = torch.randint(4, 100, (5, 24), generator=torch.Generator().manual_seed(0))
    report = lowbit.quantize(
        place / "model", tmp_path / "out", Recipe.parse("gptq:w4a16-g16"), Conditions(Calibration(ids), None)
    )  # fmt: skip
    assert report.calibration is not None
    assert (report.calibration.source, report.calibration.samples, report.calibration.seq_len) == ("a tensor", 5, 24)


def test_calibration_and_evaluation_never_share_a_text(place: Path, tmp_path: Path) -> None:
    held_out = load_tokens(place / "evaluation.txt", character_tokenizer(), 3, 64, 0)
    copy = shutil.copy(place / "evaluation.txt", tmp_path / "copy.txt")
    evaluation = Evaluation(place / "evaluation.txt", windows=3, seq_len=64)
    for source in (place / "evaluation.txt", copy, held_out.ids.clone(), held_out.ids[:2, :60].clone()):
        seen = Conditions(Calibration(source, samples=180, seq_len=32), evaluation)
        with pytest.raises(InputError, match="can't be both calibration and evaluation text"):
            lowbit.quantize(place / "model", tmp_path / "out", Recipe.parse("gptq:w4a16-g16"), seen)
    assert not (tmp_path / "out").exists()


@pytest.mark.demo
def test_the_packaged_texts_share_nothing() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    seen = text_windows(packaged_text("calibration"), tokenizer, 250, 512, 0, "calibration")
    held_out = text_windows(packaged_text("evaluation"), tokenizer, 110, 512, 0, "evaluation")
    assert overlap(seen, held_out) == 0
    assert overlap(held_out, held_out) == 1


def test_compare_writes_every_recipe_one_page_and_a_list(place: Path, tmp_path: Path) -> None:
    recipes = [Recipe.parse(text) for text in ("rtn:w8a8", "rtn:w4a16-g16", "gptq:w4a16-g16")]
    reports = lowbit.compare(place / "model", recipes, tmp_path / "all", conditions(place))
    listed = json.loads((tmp_path / "all" / "report.json").read_text())
    assert [Report.from_json(json.dumps(entry)) for entry in listed] == reports
    assert [report.recipe for report in reports] == [str(recipe) for recipe in recipes]
    page = (tmp_path / "all" / "report.html").read_text()
    for recipe in recipes:
        assert str(recipe) in page
        folder = tmp_path / "all" / str(recipe).replace(":", "-")
        assert Report.from_json((folder / "report.json").read_text()) in reports
        assert any(isinstance(module, QuantLinear) for module in lowbit.load(folder).modules())
    assert len({report.fidelity.perplexity_reference for report in reports if report.fidelity}) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["all"]


def test_compare_gives_what_quantize_gives(place: Path, gptq: Report, tmp_path: Path) -> None:
    recipes = [Recipe.parse("rtn:w2a16-g16"), Recipe.parse("gptq:w4a16-g16")]
    reports = lowbit.compare(place / "model", recipes, tmp_path / "all", conditions(place))
    assert (reports[1].layers, reports[1].fidelity, reports[1].calibration) == (
        gptq.layers,
        gptq.fidelity,
        gptq.calibration,
    )
    for name in ("model.safetensors", "config.json"):
        folder = tmp_path / "all" / "gptq-w4a16-g16"
        assert (folder / name).read_bytes() == (place / "gptq" / name).read_bytes()


def test_a_comparison_that_fails_leaves_nothing(place: Path, tmp_path: Path) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if stage.startswith("gptq"):
            raise KeyboardInterrupt

    recipes = [Recipe.parse("rtn:w8a16"), Recipe.parse("gptq:w4a16-g16")]
    with pytest.raises(KeyboardInterrupt):
        lowbit.compare(place / "model", recipes, tmp_path / "all", conditions(place, progress=stop))
    assert list(tmp_path.iterdir()) == []


def test_a_failed_run_keeps_the_folder_that_it_was_to_replace(place: Path, gptq: Report, tmp_path: Path) -> None:
    out = Path(shutil.copytree(place / "gptq", tmp_path / "out"))
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "writing":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lowbit.quantize(
            place / "model", out, Recipe.parse("rtn:w8a16"), conditions(place, overwrite=True, progress=stop)
        )  # fmt: skip
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_evaluate_repeats_what_quantize_measured(place: Path, gptq: Report) -> None:
    evaluation = conditions(place).evaluation
    assert evaluation is not None
    scores = lowbit.evaluate(place / "gptq", place / "model", evaluation)
    assert isinstance(scores, Scores)
    assert scores.fidelity == gptq.fidelity
    assert gptq.fidelity is not None
    assert scores.perplexity == gptq.fidelity.perplexity
    alone = lowbit.evaluate(place / "model", evaluation=evaluation)
    assert (alone.fidelity, alone.tasks) == (None, {})
    assert alone.perplexity == pytest.approx(gptq.fidelity.perplexity_reference, rel=1e-6)
    itself = lowbit.evaluate(place / "model", place / "model", evaluation).fidelity
    assert itself is not None
    assert (itself.kld, itself.top1_agreement) == (0, 1)


@pytest.mark.parametrize("model_type", ["mixtral", "gemma2", "gpt_oss"])
def test_other_architectures_go_through_the_same_verbs(model_type: str, tmp_path: Path) -> None:
    save_tiny(model_type, tmp_path / "model", torch.bfloat16)
    write_text(tmp_path / "calibration.txt", seed=0)
    write_text(tmp_path / "evaluation.txt", seed=1)
    short = conditions(tmp_path, gates=Gates(None, max_kld=0.1))
    report = lowbit.quantize(tmp_path / "model", tmp_path / "out", Recipe.parse("gptq:w4a16-g16"), short)
    assert report.passed
    assert report.fidelity is not None
    assert report.fidelity.kld > 1e-5
    evaluation = short.evaluation
    assert evaluation is not None
    assert lowbit.evaluate(tmp_path / "out", tmp_path / "model", evaluation).fidelity == report.fidelity
