"""Reports against themselves: JSON must give back an equal object, and anything else must be refused in a sentence."""

import json
from dataclasses import replace

import pytest
from sample_reports import recipes, report

from lowbit.errors import InputError
from lowbit.report import Gate, Report


@pytest.mark.parametrize("made", [report(), *recipes()], ids=lambda made: made.recipe)
def test_a_report_is_equal_after_a_trip_through_json(made: Report) -> None:
    assert Report.from_json(made.to_json()) == made


def test_a_report_without_the_optional_parts_is_equal_after_a_trip_through_json() -> None:
    bare = report(calibration=None, fidelity=None, gates=(), warnings=(), histograms=(), sample=None)
    assert Report.from_json(bare.to_json()) == bare


def test_none_and_numbers_keep_their_kinds_in_layers() -> None:
    layers = (replace(report().layers[0], output_error=None), report().layers[1])
    back = Report.from_json(report(layers=layers).to_json())
    assert back.layers[0].output_error is None
    assert isinstance(back.layers, tuple)
    assert isinstance(back.layers[1].output_error, float)


def test_save_writes_what_from_json_reads(tmp_path) -> None:
    report().save(tmp_path / "report.json")
    assert Report.from_json((tmp_path / "report.json").read_text()) == report()


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '"report"', "{}", '{"model": "m"}'])
def test_text_that_is_no_report_is_refused_with_what_to_do(text: str) -> None:
    with pytest.raises(InputError, match=r"not a lowbit report .*lowbit quantize --json"):
        Report.from_json(text)


@pytest.mark.parametrize("field", ["coverage", "layers", "fidelity", "gates"])
def test_a_part_of_the_wrong_kind_is_refused(field: str) -> None:
    wrong = json.loads(report().to_json()) | {field: 7}
    with pytest.raises(InputError, match="not a lowbit report"):
        Report.from_json(json.dumps(wrong))


def test_a_number_that_json_cannot_write_is_not_written() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        report(seconds=float("nan")).to_json()


def test_recipe_and_passed_are_read_from_the_fields() -> None:
    assert report().recipe == "gptq:w4a16-g64"
    assert report().passed
    assert report(gates=()).passed
    assert not report(gates=(*report().gates, Gate("max-kld", 0.1, 0.2, False))).passed
