"""--bits and --max-kld on tiny models. Oracles: the files on disk, schemes in the report, KL measured one by one."""

import copy
import json
from pathlib import Path

import pytest
import torch
from architectures import TINY, tiny
from checkpoints import quantize_in_memory, selection_of
from command import lowbit_command
from saved import save_tiny, write_text

import lowbit
from lowbit import Calibration, Conditions, Evaluation, Gates, Recipe, Report, Rule
from lowbit.costs import Probe, costs, fused_groups, weight_errors
from lowbit.io.tensorfile import TensorFile
from lowbit.model.allocation import Group, Option
from lowbit.model.efforts import recipe_at
from lowbit.numerics.metrics import kl_divergence
from lowbit.numerics.scheme import QuantScheme
from lowbit.observe.capture import find_blocks
from lowbit.tradeoff import Table

FUSED = [{"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}]
LEVEL = QuantScheme.parse("w3a16-g16")
IDS = torch.randint(3, 128, (8, 64), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny llama in model/, calibration.txt and evaluation.txt."""
    folder = tmp_path_factory.mktemp("place")
    save_tiny("llama", folder / "model", torch.bfloat16)
    write_text(folder / "calibration.txt", seed=0)
    write_text(folder / "evaluation.txt", seed=1)
    return folder


def _conditions(place: Path, **others: object) -> Conditions:
    calibration = Calibration(place / "calibration.txt", samples=6, seq_len=32)
    evaluation = Evaluation(place / "evaluation.txt", windows=3, seq_len=64, sample_tokens=0)
    return Conditions(calibration, evaluation, **others)  # type: ignore[arg-type]


def _settings(place: Path) -> list[object]:
    """Options that make a run short."""
    calibration = ["--calibration", place / "calibration.txt", "--samples", 4, "--seq-len", 32]
    return [*calibration, "--eval-text", place / "evaluation.txt", "--eval-windows", 2]


@pytest.fixture(scope="module")
def mixed(place: Path) -> Report:
    recipe = Recipe.parse("rtn:w4a16-g16")
    return lowbit.quantize(place / "model", place / "mixed", recipe, _conditions(place), bits=5.25)


def _schemes(report: Report) -> dict[str, str]:
    return {layer.name: layer.scheme for layer in report.layers}


def test_a_budget_mixes_schemes_and_keeps_fused_layers_together(mixed: Report) -> None:
    schemes = _schemes(mixed)
    assert len(set(schemes.values())) > 1
    for names in FUSED:
        for block in range(3):
            mine = {schemes[name] for name in schemes if f".{block}." in name and name.rpartition(".")[2] in names}
            assert len(mine) == 1
    assert mixed.scheme.startswith("w4a16-g16 at 5.")


def test_the_files_take_the_bits_that_the_report_says(mixed: Report, place: Path) -> None:
    assert mixed.budget is not None
    assert 5.0 < mixed.budget.bits <= 5.25
    size = 0
    for path in (place / "mixed").glob("*.safetensors"):
        for name, entry in TensorFile.open(path).entries.items():
            if name.endswith(("weight_packed", "weight_scale")):
                size += 8 * entry.bytes
    weights = sum(group.weights for group in mixed.budget.groups)
    assert size / weights == pytest.approx(mixed.budget.bits)


def test_the_report_holds_the_curve_and_every_group_and_survives_json(mixed: Report, place: Path) -> None:
    record = mixed.budget
    assert record is not None
    assert Report.from_json((place / "mixed" / "report.json").read_text()) == mixed
    assert record.asked == "--bits 5.25"
    assert len(record.groups) == 3 * 4
    assert record.probes == ("w3a16-g16", "w4a16-g16")
    between = [point for point in record.curve if not point.name]
    assert [point.bits for point in between] == sorted(point.bits for point in between)
    assert [point.expected for point in between] == sorted((point.expected for point in between), reverse=True)
    assert {point.name for point in record.curve if point.name} == {f"w{bits}a16-g16" for bits in (3, 4, 5, 6, 8)}
    assert mixed.fidelity is not None
    assert record.runs[0].measured == mixed.fidelity.kld
    page = (place / "mixed" / "report.html").read_text()
    assert "Where the bits went" in page
    assert "<polyline" in page
    assert "run 1, in full" in page


def test_the_mix_is_closer_than_what_fits_everywhere(mixed: Report, place: Path) -> None:
    recipe = Recipe.parse("rtn:w4a16-g16")
    uniform = lowbit.quantize(place / "model", place / "uniform", recipe, _conditions(place))
    assert mixed.fidelity is not None
    assert uniform.fidelity is not None
    assert mixed.fidelity.kld < uniform.fidelity.kld


def test_two_runs_are_equal_to_the_last_bit(mixed: Report, place: Path) -> None:
    recipe = Recipe.parse("rtn:w4a16-g16")
    again = lowbit.quantize(place / "model", place / "again", recipe, _conditions(place), bits=5.25)
    assert again.budget is not None
    assert mixed.budget is not None
    assert (again.budget.groups, again.budget.curve) == (mixed.budget.groups, mixed.budget.curve)
    for path in (place / "mixed").glob("*.safetensors"):
        assert path.read_bytes() == (place / "again" / path.name).read_bytes()


def test_rules_of_the_user_stay_and_are_counted(place: Path) -> None:
    rules = (Rule("*.0.mlp.down_proj", QuantScheme.parse("w8a16")), Rule("*.1.*", None))
    recipe = Recipe(QuantScheme.parse("w4a16-g16"), "rtn", rules)
    conditions = _conditions(place, gates=Gates(None))
    report = lowbit.quantize(place / "model", place / "ruled", recipe, conditions, bits=5.25)
    schemes = _schemes(report)
    assert schemes["model.layers.0.mlp.down_proj"] == "w8a16"
    assert not any(".1." in name for name in schemes)
    assert report.budget is not None
    assert [group.alone for group in report.budget.groups if "down_proj" in group.name and ".0." in group.name] == [()]


def test_a_gate_that_the_scheme_misses_raises_bits_until_it_holds(place: Path) -> None:
    recipe = Recipe.parse("rtn:w3a16-g16")
    plain = lowbit.quantize(place / "model", place / "plain", recipe, _conditions(place))
    assert plain.fidelity is not None
    limit = plain.fidelity.kld / 20
    report = lowbit.quantize(place / "model", place / "raised", recipe, _conditions(place, gates=Gates(0.9, limit)))
    assert report.passed
    assert report.budget is not None
    assert report.fidelity is not None
    assert report.fidelity.kld <= limit
    assert report.budget.runs[0].measured == plain.fidelity.kld
    assert report.budget.runs[0].bits < report.budget.bits < 9
    assert report.budget.nearest == ""
    assert lowbit.evaluate(place / "raised", place / "model", _conditions(place).evaluation).fidelity == report.fidelity


def test_a_gate_that_holds_at_once_starts_no_search(place: Path) -> None:
    report = lowbit.quantize(
        place / "model", place / "holds", Recipe.parse("rtn:w8a16-g16"), _conditions(place, gates=Gates(0.9, 5.0))
    )
    assert (report.passed, report.budget, report.scheme) == (True, None, "w8a16-g16")


def test_a_gate_beyond_reach_exits_3_and_names_the_nearest(place: Path, tmp_path: Path) -> None:
    ended = lowbit_command(
        "quantize", place / "model", "-o", tmp_path / "out", "--scheme", "w4a16-g16", "--method", "rtn",
        "--max-kld", "1e-9", *_settings(place),
    )  # fmt: skip
    assert ended.code == 3
    assert "and 1e-09 was asked for: the nearest is KL" in ended.message
    assert "or lower --min-coverage" in ended.message
    report = Report.from_json((tmp_path / "out" / "report.json").read_text())
    assert report.budget is not None
    assert report.coverage.fraction >= 0.9
    assert any(group.scheme == "w8a16-g16" for group in report.budget.groups)
    assert "Trade-off for --max-kld 1e-09" in ended.out


def test_skipping_layers_reaches_what_bits_alone_can_not(place: Path) -> None:
    recipe = Recipe.parse("rtn:w8a16-g16")
    plain = lowbit.quantize(place / "model", place / "eight", recipe, _conditions(place))
    assert plain.fidelity is not None
    gates = Gates(0.3, plain.fidelity.kld / 3)
    report = lowbit.quantize(place / "model", place / "skipped", recipe, _conditions(place, gates=gates))
    assert report.passed
    assert report.coverage.fraction >= 0.3
    assert any("is left as it is by the rule" in item.reason for item in report.coverage.skipped)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--bits", "2.5", "--scheme", "w4a16-g16"], "2.5 bits a weight can't be reached: the least is 3.000"),
        (["--bits", "4", "--scheme", "nf4-b64"], "a budget spreads the bits of integer weights, and nf4-b64 has none"),
        (
            ["--bits", "4", "--scheme", "w4a8-g16"],
            "w4a8-g16 stores each code in 8 bits whatever its width, so",
        ),
        (["--bits", "4", "--candidates", "1,4"], "a code can't have 1 bits; give candidates from 2 to 8"),
        (["--bits", "4", "--candidates", "w3"], "--candidates 'w3' is not a list of bits such as 3,4,6"),
    ],
)
def test_budgets_that_can_not_work_are_refused(options: list[str], words: str, place: Path, tmp_path: Path) -> None:
    method = ["--method", "rtn"]
    ended = lowbit_command("quantize", place / "model", "-o", tmp_path / "out", *method, *options, *_settings(place))
    assert ended.code == 2
    assert words in ended.message
    assert not (tmp_path / "out").exists()


def _linears(model: torch.nn.Module) -> list[str]:
    """The linears of the blocks."""
    blocks = find_blocks(model)[0]
    return [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n.startswith(f"{blocks}.")]


@pytest.mark.parametrize("name", TINY)
def test_groups_hold_every_layer_once_and_experts_of_a_block_together(name: str) -> None:
    model = tiny(name)
    names = [*_linears(model), *(n for n, p in model.named_parameters() if p.dim() == 3 and "expert" in n)]
    groups = fused_groups(model, names, IDS[:1]) if names else []
    assert sorted(n for group in groups for n in group) == sorted(names)
    for group in groups:
        if any("expert" in n and "shared" not in n for n in group):
            block = group[0].split("experts")[0]
            assert {n for n in names if n.startswith(f"{block}experts")} <= set(group)


def test_costs_are_those_of_one_group_rounded_and_the_model_is_left_alone() -> None:
    model = tiny("llama")
    before = copy.deepcopy(model.state_dict())
    groups = fused_groups(model, _linears(model), IDS[:1])
    probe = Probe.on(IDS, Recipe(LEVEL, "rtn"), torch.float32, lambda *_: None)
    (found,) = costs(model, groups, [LEVEL], probe)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    other = copy.deepcopy(model)
    job = Recipe(LEVEL, "rtn", tuple(Rule(n, None) for group in groups if group != groups[3] for n in group))
    from_pipeline = _rounded_by_pipeline(other, job)
    with torch.no_grad():
        wanted, got = (m(input_ids=probe.ids).logits[:, ::2].flatten(0, 1) for m in (model, from_pipeline))
    assert found[3] == pytest.approx(kl_divergence(wanted, got).mean().item(), rel=1e-3)
    low, high = weight_errors(model, groups, [LEVEL, QuantScheme.parse("w6a16-g16")], torch.float32)
    assert all(a > 20 * b for a, b in zip(low, high, strict=True))


@pytest.mark.parametrize(("name", "method"), [("llama", "gptq"), ("llama", "hqq"), ("llama", "aligned"),
                                              ("mixtral", "gptq"), ("mixtral", "rtn-weighted"),
                                              ("gemma3n_text", "gptq"), ("cohere2", "gptq")])  # fmt: skip
def test_costs_are_those_of_the_recipes_own_method(name: str, method: str) -> None:
    """Oracle: the pipeline with rules that leave everything but one group, calibrated on what the probe saw.

    One group alone reads what the original gives it, so that aligned has nothing to correct.
    """
    model, windows = tiny(name), torch.randint(3, 128, (20, 64), generator=torch.Generator().manual_seed(8))
    names = list(selection_of(model, Recipe(LEVEL, method)).schemes)
    groups = fused_groups(model, names, windows[:1])
    probe = Probe.on(windows, Recipe(LEVEL, method), torch.float32, lambda *_: None)
    assert len(probe.ids) + sum(map(len, probe.seen)) == 20 or method == "hqq"
    wanted = costs(model, groups, [LEVEL], probe)[0]
    for number in (0, len(groups) - 1):
        rules = tuple(Rule(n, None) for group in groups if group != groups[number] for n in group)
        other = copy.deepcopy(model)
        quantize_in_memory(other, Recipe(LEVEL, method, rules), batches=list(probe.seen))
        with torch.no_grad():
            kept, got = (m(input_ids=probe.ids).logits[:, ::2].flatten(0, 1) for m in (model, other))
        assert wanted[number] == pytest.approx(kl_divergence(kept, got).mean().item(), rel=2e-3)


def test_a_budget_of_an_effort_is_spread_by_the_rungs_own_method(place: Path) -> None:
    recipe = recipe_at(QuantScheme.parse("w4a16-g16"), 2)
    report = lowbit.quantize(place / "model", place / "effort", recipe, _conditions(place), bits=5.0)
    assert report.budget is not None
    assert report.budget.bits <= 5.0
    assert {layer.method for layer in report.layers} == {"aligned"}


def _rounded_by_pipeline(model: torch.nn.Module, recipe: Recipe) -> torch.nn.Module:
    quantize_in_memory(model, recipe)
    return model


def test_json_of_older_reports_has_no_budget(mixed: Report) -> None:
    fields = json.loads(mixed.to_json())
    del fields["budget"]
    assert Report.from_json(json.dumps(fields)).budget is None


def _table(costs_at_three: list[float], costs_at_four: list[float]) -> Table:
    """A table of equal groups with levels of 3 and 4 bits measured and 6 derived."""
    levels = [QuantScheme.parse(f"w{bits}a16-g16") for bits in (3, 4, 6)]
    groups = tuple(
        Group(
            (f"layer{number}",), 100, (Option(levels[0], 400, low), Option(levels[1], 500, high),
                                       Option(levels[2], 700, high / 16))
        )
        for number, (low, high) in enumerate(zip(costs_at_three, costs_at_four, strict=True))
    )  # fmt: skip
    measured = (("w3a16-g16", tuple(costs_at_three)), ("w4a16-g16", tuple(costs_at_four)))
    return Table(groups, measured, 0.0, tuple(levels), 512)


def test_groups_go_below_what_fits_everywhere_only_for_a_gain() -> None:
    even = _table([0.4] * 4, [0.1] * 4).within(5.0)
    assert (even.chosen, even.bits) == ((1, 1, 1, 1), 5.0)
    uneven = _table([0.01, 0.01, 0.4, 4.0], [0.0025, 0.0025, 0.1, 1.0]).within(5.0)
    assert uneven.chosen == (0, 0, 1, 2)
    assert uneven.bits <= 5.0
