"""Words against sentences written by hand: sizes, shares, changes and verdicts."""

from dataclasses import replace

import pytest
from sample_reports import recipes, report

from lowbit import wording
from lowbit.report import Gate


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.00 kB"), (999_499, "999 kB"), (999_500, "1.00 MB"),
     (10_000_000, "10.0 MB"), (113_246_208, "113 MB"), (2_690_000_000, "2.69 GB")],
)  # fmt: skip
def test_a_size_has_three_significant_digits(count: int, text: str) -> None:
    assert wording.size_text(count) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0"), (5e7, "50 MB"), (1e8, "100 MB"), (2.5e9, "2.5 GB"), (20, "20 bytes")]
)
def test_a_tick_has_no_trailing_zeros(count: float, text: str) -> None:
    assert wording.tick_text(count) == text


def test_a_ratio_says_smaller_or_larger() -> None:
    assert wording.ratio_text(263, 100) == "2.63 times smaller"
    assert wording.ratio_text(100, 150) == "1.5 times larger"
    assert wording.ratio_text(100, 0) == "size unknown"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (9.95, "10 s"), (99.4, "99 s"), (99.5, "1 min 40 s"), (7320, "2 h 2 min")],
)
def test_a_duration_grows_from_seconds_to_hours(seconds: float, text: str) -> None:
    assert wording.duration_text(seconds) == text


@pytest.mark.parametrize(
    ("fraction", "text"),
    [(0, "0%"), (1, "100%"), (0.99996, "over 99.9%"), (0.8412, "84.1%"), (0.0931, "9.31%"), (0.000012, "0.0012%"),
     (None, wording.DASH), (float("nan"), wording.DASH)],
)  # fmt: skip
def test_a_share_is_never_rounded_up_to_all(fraction: float | None, text: str) -> None:
    assert wording.percent_text(fraction) == text


@pytest.mark.parametrize(("value", "text"), [(16.48, "16.5"), (9.994, "9.99"), (9.995, "10.0"), (12345.6, "12,346")])
def test_a_perplexity_has_three_significant_digits_until_a_thousand(value: float, text: str) -> None:
    assert wording.perplexity_text(value) == text


def test_a_change_has_its_sign_and_a_true_minus() -> None:
    assert wording.change_text(21.4, 16.5) == "+29.7%"
    assert wording.change_text(16.0, 16.5) == f"{wording.MINUS}3.0%"
    assert wording.number_text(-0.04123) == f"{wording.MINUS}0.0412"


@pytest.mark.parametrize(
    ("value", "stderr", "text"),
    [
        (0.1374, 0.0021, "0.1374 ± 0.0021"),
        (0.5, 0.2, "0.50 ± 0.20"),
        (0.0031, 0.0, "0.0031 ± 0.0000"),
        (0.13741, None, "0.137"),
    ],
)
def test_a_divergence_has_as_many_decimals_as_its_error(value: float, stderr: float | None, text: str) -> None:
    assert wording.kld_text(value, stderr) == text


def test_a_limit_says_which_way_it_holds() -> None:
    assert wording.limit_text(Gate("max-kld", 0.2, 0.1374, True)) == "0.1374 found, at most 0.2 asked for"
    assert wording.limit_text(Gate("min-coverage", 0.9, 0.7, False)) == "0.7 found, at least 0.9 asked for"


def test_the_verdict_says_size_perplexity_and_agreement() -> None:
    assert wording.verdict(report()) == (
        "4-bit weights make SmolLM2-135M-Instruct 2.38 times smaller; on 65,408 held-out tokens its perplexity rises "
        "from 16.5 to 18.9 (+14.9%), and its top choice agrees with the original on 84.1% of tokens."
    )


def test_the_verdict_begins_with_the_limits_that_fail() -> None:
    failed = Gate("max-kld", 0.1, 0.1374, False)
    text = wording.verdict(report(gates=(failed, *report().gates)))
    assert text.startswith(
        "Not good enough: 1 of 3 limits failed (max-kld, 0.1374 found, at most 0.1 asked for). 4-bit"
    )


def test_the_verdict_says_when_nothing_was_measured() -> None:
    assert wording.verdict(report(fidelity=None)).endswith("how close it stays to the original was not measured.")


@pytest.mark.parametrize(
    ("scheme", "start"),
    [("w4a16-g64", "4-bit weights make"), ("w8a8", "8-bit weights and activations make"),
     ("nf4-b64", "NF4 weights make"), ("w4a8", "4-bit weights and 8-bit activations make"),
     ("mixed", "The scheme mixed makes")],
)  # fmt: skip
def test_the_subject_of_the_verdict_is_the_scheme_in_words(scheme: str, start: str) -> None:
    assert wording.verdict(report(scheme=scheme)).startswith(f"{start} SmolLM2-135M-Instruct")


@pytest.mark.parametrize(
    ("perplexity", "words"),
    [(16.48, "stays at 16.5 (+0.0%)"), (16.52, "stays at 16.5 (+0.2%)"), (18.128, "rises from 16.5 to 18.1 (+10.0%)"),
     (16.0, f"falls from 16.5 to 16.0 ({wording.MINUS}2.9%)")],
)  # fmt: skip
def test_perplexity_stays_rises_or_falls(perplexity: float, words: str) -> None:
    fidelity = report().fidelity
    assert fidelity is not None
    assert words in wording.verdict(report(fidelity=replace(fidelity, perplexity=perplexity)))


def test_the_comparison_names_the_closest_and_the_best_of_the_smallest() -> None:
    assert wording.comparison_verdict(recipes()) == (
        "Not good enough: 1 of 4 recipes failed a limit. SmolLM2-135M-Instruct, quantized with 4 recipes: "
        "rtn:w8a16 stays closest to the original (1.65 times smaller, KL 0.0031); "
        "gptq:w4a16-g64 is the best of the smallest (2.38 times smaller, KL 0.137)."
    )
    assert wording.comparison_verdict(recipes()[1:2]).endswith(
        "quantized with 1 recipe: gptq:w4a16-g64 is the smallest and stays closest to the original "
        "(2.38 times smaller, KL 0.137)."
    )
    unmeasured = [replace(made, fidelity=None, gates=()) for made in recipes()]
    assert wording.comparison_verdict(unmeasured).endswith(
        "113 MB to 164 MB; no distance to the original was measured."
    )


def test_best_for_size_leaves_out_what_another_recipe_beats() -> None:
    best = [made.recipe for made in wording.best_for_size(recipes())]
    assert best == ["gptq:w4a16-g64", "rtn:w8a16"]  # w8a8 is 0.06% smaller than w8a16, which counts as equal
