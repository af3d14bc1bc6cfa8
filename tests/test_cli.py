"""The command from end to end on a tiny model: exit codes, files, tables. Oracle: the same verbs as functions."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from command import lowbit_command
from saved import save_tiny, write_text

import lowbit
from lowbit import Calibration, Conditions, Evaluation, Recipe, Report, Rule
from lowbit.cli.app import STDERR
from lowbit.terminal import Bar

SOURCE = Path(__file__).parents[1] / "src"
SYNOPSIS = ("--scheme", "--method", "--calibration", "--samples", "--seq-len", "--seed", "--device", "--ignore",
            "--rule", "--min-coverage", "--max-kld", "--max-ppl-increase", "--no-eval", "--json", "--report",
            "--overwrite")  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny llama in model/, calibration.txt and evaluation.txt."""
    folder = tmp_path_factory.mktemp("place")
    save_tiny("llama", folder / "model")
    write_text(folder / "calibration.txt", seed=0)
    write_text(folder / "evaluation.txt", seed=1)
    return folder


def settings(place: Path) -> list[object]:
    """Options that make a run short."""
    calibration = ["--calibration", place / "calibration.txt", "--samples", 4, "--seq-len", 32]
    return [*calibration, "--eval-text", place / "evaluation.txt", "--eval-windows", 2]


def test_quantize_does_what_the_function_does(place: Path, tmp_path: Path) -> None:
    rules = ["--rule", "*.down_proj=w8a16", "--ignore", "*.0.self_attn.o_proj", "--seed", 3, "--method", "rtn-clip"]
    ended = lowbit_command(
        "quantize", place / "model", "-o", tmp_path / "out", "--scheme", "w3a16-g16", *rules, *settings(place)
    )  # fmt: skip
    assert ended.code == 0, ended.err
    parsed = (Rule.parse("*.down_proj=w8a16"), Rule("*.0.self_attn.o_proj", None))
    recipe = Recipe(Recipe.parse("w3a16-g16").scheme, "rtn-clip", parsed)
    conditions = Conditions(
        Calibration(place / "calibration.txt", 4, 32, seed=3), Evaluation(place / "evaluation.txt", 2)
    )
    expected = lowbit.quantize(place / "model", tmp_path / "function", recipe, conditions)
    report = Report.from_json((tmp_path / "out" / "report.json").read_text())
    assert (report.layers, report.fidelity, report.coverage) == (
        expected.layers,
        expected.fidelity,
        expected.coverage,
    )
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "function" / name).read_bytes()
    assert "3-bit weights make model" in ended.out
    assert f"{report.fidelity.kld:.4f}" in ended.out
    assert "left as it is by the rule" in ended.out


def test_quantize_shows_progress_with_time_left_and_memory(place: Path, tmp_path: Path) -> None:
    ended = lowbit_command(
        "quantize", place / "model", "-o", tmp_path / "out", "--scheme", "w4a16-g16", *settings(place)
    )
    line = next(line for line in ended.err.splitlines() if line.startswith("quantizing"))
    assert re.search(r"3/3 \d:\d\d:\d\d eta \d:\d\d:\d\d peak \d+(\.\d)? MB", line), line


def test_the_bar_shows_memory_after_each_block() -> None:
    with Bar(STDERR) as bar:
        for block in range(3):
            bar.show("quantizing", block + 1, 5)
            (task,) = bar._progress.tasks
            assert (task.completed, task.total) == (block + 1, 5)
            assert re.fullmatch(r"peak [\d.]+ [MG]B", task.fields["memory"])


def test_the_defaults_are_those_of_the_issue(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without options: gptq:w4a16-g64, 128 x 512 tokens of seed 0, coverage at least 0.9."""
    seen = {}

    def fake(
        model: str, out: Path, recipe: Recipe, conditions: Conditions, bits: float | None, candidates: tuple[int, ...]
    ) -> Report:
        seen.update(model=model, out=out, recipe=recipe, conditions=conditions)
        assert (bits, candidates) == (None, (2, 3, 4, 5, 6, 8))
        raise lowbit.InputError("far enough")

    monkeypatch.setattr("lowbit.cli.quantize.quantize", fake)
    assert lowbit_command("quantize", "owner/name", "-o", tmp_path / "out").code == 2
    conditions = seen["conditions"]
    assert (seen["model"], seen["out"], str(seen["recipe"])) == ("owner/name", tmp_path / "out", "gptq:w4a16-g64")
    assert conditions.calibration == Calibration(None, 128, 512, 0)
    assert conditions.evaluation == Evaluation()
    assert (conditions.gates.min_coverage, conditions.gates.max_kld, conditions.gates.max_ppl_increase) == (
        0.9, None, None,
    )  # fmt: skip
    assert (conditions.device, conditions.overwrite) == ("auto", False)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--calibration", "mine.txt"], ("aligned", 2)),
        (["--calibration", "mine.txt", "--method", "gptq"], ("gptq", None)),
        (["--calibration", "mine.txt", "--effort", "1"], ("rtn-weighted", 1)),
        (["--calibration", "mine.txt", "--scheme", "nf4-b64"], ("rtn", 0)),
    ],
)
def test_text_of_ones_own_means_effort_2_where_no_method_is_named(
    options: list[str], expected: tuple[str, int | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Recipe] = []

    def fake(model: str, out: Path, recipe: Recipe, *_: object) -> Report:
        seen.append(recipe)
        raise lowbit.InputError("far enough")

    monkeypatch.setattr("lowbit.cli.quantize.quantize", fake)
    assert lowbit_command("quantize", "owner/name", "-o", tmp_path / "out", *options).code == 2
    assert [(recipe.method, recipe.effort) for recipe in seen] == [expected]


def test_an_effort_shows_what_each_level_gained_by_kind_of_layer(place: Path, tmp_path: Path) -> None:
    options = ["--scheme", "w3a16-g16", "--effort", "1", "--calibration", place / "calibration.txt", "--samples", 8]
    out = lowbit_command(
        "quantize", place / "model", "-o", tmp_path / "out", *options, "--seq-len", 32, "--no-eval"
    ).out
    assert "What each level gained" in out
    table = out[out.index("What each level gained") :]
    row = next(line for line in table.splitlines() if "down_proj" in line)
    rtn, weighted = (float(cell) for cell in re.findall(r"([\d.]+)%", row))
    assert 0 < weighted < rtn


def test_formats_that_gptq_does_not_know_are_rounded_by_default(place: Path, tmp_path: Path) -> None:
    ended = lowbit_command(
        "quantize", place / "model", "-o", tmp_path / "out", "--scheme", "nf4-b64-dq", "--no-eval"
    )  # fmt: skip
    assert ended.code == 0, ended.err
    report = Report.from_json((tmp_path / "out" / "report.json").read_text())
    assert (report.recipe, report.fidelity, report.calibration) == ("rtn:nf4-b64-dq", None, None)


def test_help_shows_every_option_of_the_synopsis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERMINAL_WIDTH", "160")
    ended = lowbit_command("quantize", "--help")
    assert ended.code == 0
    for option in SYNOPSIS:
        assert option in ended.out, option
    assert {"evaluate", "inspect", "compare", "quantize"} <= set(lowbit_command("--help").out.split())


def test_json_and_report_are_written_where_they_are_asked_for(place: Path, tmp_path: Path) -> None:
    wanted = ["--json", tmp_path / "new" / "r.json", "--report", tmp_path / "other" / "r.html"]
    ended = lowbit_command(
        "quantize", place / "model", "-o", tmp_path / "out", "--scheme", "w8a8", "--method", "rtn", *wanted,
        *settings(place),
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert (tmp_path / "new" / "r.json").read_bytes() == (tmp_path / "out" / "report.json").read_bytes()
    assert (tmp_path / "other" / "r.html").read_bytes() == (tmp_path / "out" / "report.html").read_bytes()


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [("--max-kld", "1e-9", "max-kld"), ("--max-ppl-increase", "-90%", "max-ppl-increase"),
     ("--min-coverage", "0.99", "min-coverage")],
)  # fmt: skip
def test_a_gate_that_fails_exits_3_and_the_checkpoint_is_kept_and_marked(
    option: str, value: str, named: str, place: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ignored = ["--ignore", "*.1.mlp.*"] if named == "min-coverage" else []
    ended = lowbit_command(
        "quantize", place / "model", "-o", out, "--scheme", "w4a16-g16", "--method", "rtn", option, value, *ignored,
        *settings(place),
    )  # fmt: skip
    assert ended.code == 3
    limit = f"{float(value.removesuffix('%')):.4g}"
    mixed, nearest = (r" at \S+ bits", r": the nearest is KL .*") if named == "max-kld" else ("", "")
    words = rf"limit not held: rtn:w4a16-g16{mixed} has {named} (\S+), and {limit} was asked for{nearest}"
    found = re.fullmatch(words, ended.message)
    assert found, ended.message
    report = Report.from_json((out / "report.json").read_text())
    assert [gate.name for gate in report.gates if not gate.passed] == [named]
    assert f"{report.gates[-1].value if named != 'min-coverage' else report.gates[0].value:.4g}" == found[1]
    assert not report.passed
    assert "Not good enough" in (out / "report.html").read_text()
    assert "Not good enough" in ended.out
    lowbit.load(out)


def test_gates_that_hold_exit_0(place: Path, tmp_path: Path) -> None:
    gates = ["--max-kld", 10, "--max-ppl-increase", "1000", "--min-coverage", 1]
    ended = lowbit_command(
        "quantize", place / "model", "-o", tmp_path / "out", "--scheme", "w8a16", "--method", "rtn", *gates,
        *settings(place),
    )  # fmt: skip
    assert ended.code == 0, ended.err
    report = Report.from_json((tmp_path / "out" / "report.json").read_text())
    assert [(gate.name, gate.passed) for gate in report.gates] == [
        ("min-coverage", True), ("max-kld", True), ("max-ppl-increase", True),
    ]  # fmt: skip


def test_overwrite_replaces_the_folder(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for scheme in ("w8a16", "w4a16-g16"):
        ended = lowbit_command(
            "quantize", place / "model", "-o", out, "--scheme", scheme, "--method", "rtn", "--no-eval", "--overwrite"
        )  # fmt: skip
        assert ended.code == 0, ended.err
        assert json.loads((out / "report.json").read_text())["scheme"] == scheme
        (out / "stale.txt").write_text("of the folder before")
    ended = lowbit_command(
        "quantize", place / "model", "-o", out, "--scheme", "w8a16", "--method", "rtn", "--no-eval", "--overwrite"
    )  # fmt: skip
    assert not (out / "stale.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_compare_shows_one_table_and_writes_one_page(place: Path, tmp_path: Path) -> None:
    wanted = ["--json", tmp_path / "all.json", "--report", tmp_path / "all.html"]
    recipes = ["rtn:w8a8", "rtn:w4a16-g16", "gptq:w4a16-g16"]
    ended = lowbit_command(
        "compare", place / "model", "--recipes", ",".join(recipes), "-o", tmp_path / "out", *wanted, *settings(place)
    )  # fmt: skip
    assert ended.code == 0, ended.err
    reports = json.loads((tmp_path / "all.json").read_text())
    assert [f"{report['method']}:{report['scheme']}" for report in reports] == recipes
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        [*(recipe.replace(":", "-") for recipe in recipes), "report.html", "report.json"]
    )
    assert (tmp_path / "all.html").read_text().count("rtn:w4a16-g16") >= 1
    for shown in ("original", "gptq:w", "Text before and after"):
        assert shown in ended.out


def test_compare_exits_3_and_names_the_recipes_that_miss_a_gate(place: Path, tmp_path: Path) -> None:
    ended = lowbit_command(
        "compare", place / "model", "--recipes", "rtn:w8a16,rtn:w2a16-g16", "-o", tmp_path / "out", "--max-kld", "1e-4",
        *settings(place),
    )  # fmt: skip
    assert ended.code == 3
    assert "rtn:w2a16-g16 has max-kld" in ended.message
    assert "rtn:w8a16" not in ended.message
    assert (tmp_path / "out" / "rtn-w2a16-g16" / "model.safetensors").is_file()


def test_evaluate_measures_the_distance_to_the_original(place: Path, tmp_path: Path) -> None:
    lowbit_command(
        "quantize", place / "model", "-o", tmp_path / "out", "--scheme", "w4a16-g16", "--method", "rtn", "--no-eval"
    )  # fmt: skip
    held_out = ["--text", place / "evaluation.txt", "--windows", 2]
    wanted = tmp_path / "new" / "scores.json"
    ended = lowbit_command(
        "evaluate", tmp_path / "out", "--reference", place / "model", *held_out, "--json", wanted
    )  # fmt: skip
    assert ended.code == 0, ended.err
    scores = json.loads(wanted.read_text())
    assert scores["fidelity"]["tokens"] == 2 * 1023
    assert 0 < scores["fidelity"]["kld"] < 0.1
    assert f"{scores['perplexity']:.4f}" in ended.out
    assert f"{scores['fidelity']['kld']:.5f}" in ended.out


def test_inspect_lists_tensors_and_their_schemes(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lowbit_command(
        "quantize", place / "model", "-o", tmp_path / "out", "--scheme", "w4a16-g16", "--method", "rtn", "--no-eval"
    )  # fmt: skip
    monkeypatch.setattr("lowbit.cli.app.STDOUT._width", 160)
    ended = lowbit_command("inspect", tmp_path / "out")
    assert ended.code == 0, ended.err
    row = next(line for line in ended.out.splitlines() if "model.layers.0.mlp.up_proj.weight_packed" in line)
    assert [cell.strip() for cell in row.split("│")][2:6] == ["96 x 8", "I32", "3,072", "w4a16-g16"]
    assert "compressed-tensors" in ended.out


def command_line(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "lowbit", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore Ctrl-C
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_leaves_nothing_behind_and_has_its_code(
    place: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """A real process, stopped while it quantizes: --samples makes that last for minutes."""
    write_text(tmp_path / "long.txt", seed=2, characters=300_000)
    before = sorted(path.name for path in tmp_path.iterdir())
    long = ["--calibration", tmp_path / "long.txt", "--samples", 2200, "--seq-len", 128, "--no-eval"]
    with command_line("quantize", place / "model", "-o", tmp_path / "out", "--scheme", "w4a16-g16", *long) as process:
        while not any(path.name.startswith(".out.partial") for path in tmp_path.iterdir()):
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert err.strip().splitlines()[-1] == "stopped: nothing was written, and what was there before is as it was"
    assert "Traceback" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_the_module_runs_as_the_command(tmp_path: Path) -> None:
    with command_line("quantize", tmp_path / "nowhere", "-o", tmp_path / "out") as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert (out, err.strip()) == ("", f"error: there is no folder {tmp_path / 'nowhere'}")
