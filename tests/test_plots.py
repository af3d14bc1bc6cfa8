"""The layout against places worked out by hand, and the page against the texts that must stand in it, escaped."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from sample_reports import layer_records, recipes, report

from lowbit import plots
from lowbit.errors import InputError
from lowbit.report import Histogram, LayerRecord, TextSample


def layer(name: str, error: float, output: float | None = None) -> LayerRecord:
    return LayerRecord(name, "w4a16-g64", "rtn", error, -20 * math.log10(error), output)


def test_a_shade_is_linear_over_a_narrow_range_and_logarithmic_over_a_wide_one() -> None:
    assert plots.Scale(0.1, 0.3).shade(0.2) == pytest.approx(0.5)
    assert plots.Scale(0.01, 1.0).shade(0.1) == pytest.approx(0.5)
    assert plots.Scale(0.01, 1.0).middle == pytest.approx(0.1)
    assert plots.Scale(0.0, 4.0).shade(1.0) == 0.25
    assert plots.Scale(0.2, 0.2).shade(0.2) == 0.5


def test_the_heat_map_has_a_cell_per_block_and_kind() -> None:
    heat = plots.heat_map(layer_records(blocks=30))
    assert heat.blocks == tuple(map(str, range(30)))
    assert heat.kinds == ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert len(heat.cells) == 210
    for kind, cells in heat.rows():
        assert [cell.layers[0].name.split(".")[2] for cell in cells if cell] == list(heat.blocks)
        assert all(cell and cell.layers[0].name.endswith(kind) for cell in cells)


def test_experts_of_a_block_share_a_cell_that_shows_the_worst() -> None:
    heat = plots.heat_map([layer(f"model.layers.0.mlp.experts.{e}.up_proj", 0.1 + 0.01 * e) for e in range(4)])
    (cell,) = heat.cells
    assert len(cell.layers) == 4
    assert cell.worst("relative_error") == cell.layers[3]
    assert cell.worst("output_error") is None
    assert set(heat.scales) == {"relative_error"}


def test_a_layer_outside_the_blocks_stands_in_the_last_column() -> None:
    heat = plots.heat_map([layer("lm_head", 0.2), layer("model.layers.5.mlp.up_proj", 0.1)])
    assert heat.blocks == ("5", "other")
    assert heat.rows()[0] == ("lm_head", [None, heat.cells[0]])


def test_kinds_of_the_same_last_part_are_told_apart() -> None:
    names = ("encoder.0.attn.proj", "encoder.0.mlp.proj", "decoder.0.attn.proj", "decoder.0.up")
    assert plots.heat_map([layer(name, 0.1) for name in names]).kinds == (
        "encoder: attn.proj", "mlp.proj", "decoder: attn.proj", "up",
    )  # fmt: skip


def test_bars_are_as_high_as_the_logarithm_of_their_counts() -> None:
    assert plots.bar_path([0, 9, 99]) == "M1 100v-50.0h1v50.0zM2 100v-100.0h1v100.0z"
    assert plots.bar_path([0, 0]) == ""
    assert plots.bar_path([]) == ""


def test_histograms_are_grouped_by_layer_in_their_first_order() -> None:
    made = [Histogram(name, of, 0.0, 1.0, (1,)) for name, of in (("b", "weight"), ("a", "weight"), ("b", "error"))]
    groups = plots.histogram_groups(made)
    assert [(name, [h.of for h in group]) for name, group in groups] == [("b", ["weight", "error"]), ("a", ["weight"])]


@pytest.mark.parametrize(
    ("before", "after", "shared"),
    [("the red car", "the red cat", 8), ("same", "same", 4), ("one", "two", 0), ("", "", 0)],
)
def test_texts_part_at_a_whole_word(before: str, after: str, shared: int) -> None:
    assert plots.divergence(TextSample("", before, after)) == shared


def test_the_scatter_chart_places_size_across_and_divergence_up() -> None:
    chart = plots.scatter(recipes())
    assert chart is not None
    assert chart.logarithmic
    assert [point.report.recipe for point in chart.points] == [
        "rtn:w4a16-g64",
        "gptq:w4a16-g64",
        "rtn:w8a8",
        "rtn:w8a16",
    ]
    assert [point.best for point in chart.points] == [False, True, False, True]
    for point in chart.points:
        assert point.x == pytest.approx(100 * point.report.bytes_after / (1.05 * 269060552))
        assert 0 <= point.error[0] <= point.y <= point.error[1] <= 100
    labels = [point.label_y for point in chart.points]
    assert all(high - low >= 6.5 for high, low in pairwise(labels))
    assert [value for _, value in chart.x_ticks] == [0, 1e8, 2e8]


def test_labels_of_points_that_nearly_meet_stay_a_line_apart() -> None:
    fidelity = report().fidelity
    assert fidelity is not None
    close = [report(fidelity=replace(fidelity, kld=kld)) for kld in (0.1370, 0.1372, 0.1374)]
    chart = plots.scatter(close)
    assert chart is not None
    labels = [point.label_y for point in chart.points]
    assert labels == [pytest.approx(labels[0] - 6.5 * place) for place in range(3)]


def test_the_scatter_chart_is_linear_over_a_narrow_range_and_absent_without_measurements() -> None:
    chart = plots.scatter(recipes()[:2])
    assert chart is not None
    assert not chart.logarithmic
    assert chart.y_ticks[0] == (0, 0)
    assert plots.scatter([report(fidelity=None)]) is None


def test_the_page_escapes_every_text_of_a_report() -> None:
    bad = "<img src=x onerror=alert(1)>\"'&"
    first = replace(report().layers[0], name=f"model.layers.0.{bad}", scheme=bad, method=bad)
    skipped = replace(report().coverage.skipped[0], name=bad, reason=bad)
    made = report(
        model=bad, scheme=bad, method=bad, warnings=(bad,), versions={bad: bad}, layers=(first,),
        coverage=replace(report().coverage, skipped=(skipped,)), sample=TextSample(bad, bad, bad + bad),
        histograms=(Histogram(bad, bad, 0.0, 1.0, (1, 2)),),
    )  # fmt: skip
    for page in (plots.render_report(made), plots.render_comparison(bad, [made, made])):
        assert "<img" not in page
        assert "&lt;img src=x onerror=alert(1)&gt;" in page


def test_the_page_says_the_verdict_before_anything_else() -> None:
    page = plots.render_report(report())
    order = ["4-bit weights make", "> 113 MB<", "0.1374 ± 0.0021", ">84.1%<", "2 min 28 s", "812 MB", ">max-kld<",
             "<h3>Error per layer", "<h3>Distributions", "<h3>Size", "<h3>The same prompt", "<h3>Coverage",
             "<h3>To do it again", "<h3>Warnings"]  # fmt: skip
    body = page[page.index("<main>") :]
    places = [body.index(text) for text in order]
    assert places == sorted(places)


def test_a_report_with_little_in_it_makes_a_page() -> None:
    bare = report(calibration=None, fidelity=None, gates=(), warnings=(), histograms=(), sample=None, layers=(),
                  bytes_before=0, bytes_after=0)  # fmt: skip
    assert "not measured" in plots.render_report(bare)
    assert "not measured" in plots.render_comparison("bare", [bare])


def test_a_comparison_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="--recipes"):
        plots.render_comparison("none", [])
