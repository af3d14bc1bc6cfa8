"""The trade-off and the gains of the ladder on the page and in the terminal. Oracle: the sample reports' numbers."""

import io

import pytest
from rich.console import Console
from sample_reports import budget, layer_records, report, with_rungs

from lowbit import wording
from lowbit.budget_plot import budget_chart
from lowbit.plots import render_comparison, render_report
from lowbit.report import BudgetRecord
from lowbit.terminal import report_text


def test_the_curve_falls_from_left_to_right_within_its_box() -> None:
    chart = budget_chart(budget())
    assert chart is not None
    points = [tuple(map(float, pair.split(","))) for pair in chart.line.split()]
    assert points == sorted(points)
    assert [y for _, y in points] == sorted(y for _, y in points)  # SVG counts downwards
    assert points[0][0] == 0
    assert points[-1][0] == 100
    assert {(spot.name, spot.kind) for spot in chart.spots} == {
        ("w3a16-g64", "level"), ("w4a16-g64", "level"), ("run 1", "run"),
    }  # fmt: skip
    run = next(spot for spot in chart.spots if spot.kind == "run")
    assert (run.bits, run.kld) == (4.25, 0.1374)
    assert all(0 <= place <= 100 for place, _ in (*chart.x_ticks, *chart.y_ticks))


def test_a_budget_that_lost_nothing_has_no_chart() -> None:
    assert budget_chart(BudgetRecord("--bits 8", 8.0, 512, 1.0, (), (), (), ())) is None


def test_the_page_shows_curve_table_groups_and_what_would_hold() -> None:
    page = render_report(report(budget=budget()))
    for text in ("Where the bits went", "<polyline", "run 1, in full", "w4a16-g64 everywhere", "KL, alone in w3a16-g64",
                 "model.layers.1.mlp: gate_proj, up_proj", "--bits 4.25"):  # fmt: skip
        assert text in page
    assert "Where the bits went" not in render_report(report())
    assert page.count("<tr>") < render_comparison("two", [report(budget=budget()), report(method="rtn")]).count("<tr>")


def test_the_terminal_shows_the_trade_off() -> None:
    out = io.StringIO()
    Console(file=out, width=100).print(report_text(report(budget=budget())))
    assert "Trade-off for --bits 4.25" in out.getvalue()
    assert "0.137" in out.getvalue()


def test_gains_of_the_ladder_are_root_mean_squares_by_kind_and_stand_on_the_page() -> None:
    layers = with_rungs()
    gains = wording.rung_gains(layers)
    assert gains.methods == ("rtn", "aligned")
    down = dict(gains.kinds)["down_proj"]
    errors = [layer.output_error or 0 for layer in layers if layer.name.endswith("down_proj")]
    expected = (sum(error**2 for error in errors) / len(errors)) ** 0.5
    assert down == pytest.approx((2 * expected, expected))
    assert len(gains.layers) == len(layers)
    page = render_report(report(layers=layers))
    assert "What each level gained" in page
    assert "What each level gained" not in render_report(report(layers=layer_records()))
