"""The page as a person sees it, measured in headless Chromium (browser.py): boxes, colours, fonts and the console."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import browser
import pytest
from sample_reports import recipes, report

from lowbit.plots import render_comparison, render_report

if not browser.SUPPORTED:
    pytest.skip("the pinned headless Chromium is built for Linux on x86-64", allow_module_level=True)

WIDTHS = (1280, 400)
TEXTS = """
(() => {
  const walker = document.createTreeWalker(document.querySelector("main"), NodeFilter.SHOW_TEXT), sizes = [];
  while (walker.nextNode()) {
    const node = walker.currentNode, parent = node.parentElement;
    if (node.data.trim() && parent.checkVisibility()) sizes.push(parseFloat(getComputedStyle(parent).fontSize));
  }
  return sizes;
})()
"""
OVERLAPS = """
[...document.querySelectorAll(".tiles, .bars, .scatter")].filter(box => box.checkVisibility()).flatMap(box => {
  const walker = document.createTreeWalker(box, NodeFilter.SHOW_TEXT), found = [];
  while (walker.nextNode()) {
    const range = document.createRange();
    range.selectNodeContents(walker.currentNode);
    const text = walker.currentNode.data.trim();
    if (text) found.push(...[...range.getClientRects()].map(r => [r, text]));
  }
  return found.flatMap(([a, one], i) => found.slice(i + 1).filter(([b]) =>
    Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
    && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 7  // line boxes touch; letters don't
  ).map(([, two]) => `${one} | ${two}`));
})
"""
CUT = """
[...document.querySelectorAll(".tiles *, .scatter text, .facts *, .bars *")].filter(box => {
  const r = box.getBoundingClientRect();
  return box.checkVisibility() && (r.left < 0 || r.right > innerWidth);
}).map(box => box.textContent)
"""


class Pages(NamedTuple):
    one: Path
    several: Path


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Pages:
    folder = tmp_path_factory.mktemp("pages")
    made = Pages(folder / "report.html", folder / "compare.html")
    made.one.write_text(render_report(report()), encoding="utf-8")
    made.several.write_text(render_comparison("SmolLM2-135M-Instruct", recipes()), encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def chromium() -> Iterator[browser.Browser]:
    with browser.Browser(browser.fetch()) as started:
        yield started


def boxes(chromium: browser.Browser, selector: str) -> int:
    """How many elements that `selector` names have a box that isn't empty."""
    sized = "box => { const r = box.getBoundingClientRect(); return r.width > 0 && r.height > 0; }"
    return chromium.run(f"[...document.querySelectorAll('{selector}')].filter({sized}).length")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", Pages._fields)
def test_the_page_reads_well(chromium: browser.Browser, pages: Pages, kind: str, width: int, dark: bool) -> None:
    page = getattr(pages, kind)
    chromium.open(page, width, dark)
    assert chromium.run("document.scrollingElement.scrollWidth") <= width
    assert min(chromium.run(TEXTS)) >= 12
    assert chromium.run(OVERLAPS) == []
    assert chromium.run(CUT) == []
    assert chromium.problems == []
    assert chromium.requests() == [page.as_uri()]


@pytest.mark.parametrize("width", WIDTHS)
def test_the_charts_of_a_report_are_drawn(chromium: browser.Browser, pages: Pages, width: int) -> None:
    chromium.open(pages.one, width)
    assert boxes(chromium, ".map .cell") == 30 * 7
    assert boxes(chromium, ".histograms svg path") == 2 * 3
    assert boxes(chromium, ".bars rect") == 2
    assert boxes(chromium, ".share rect") == 2
    colours = "[...document.querySelectorAll('.cell')].map(cell => getComputedStyle(cell).backgroundColor)"
    assert chromium.run(f"new Set({colours}).size") > 50


def test_bars_are_as_wide_as_the_sizes(chromium: browser.Browser, pages: Pages) -> None:
    chromium.open(pages.one)
    before, after = chromium.run(
        "[...document.querySelectorAll('.bars rect')].map(bar => bar.getBoundingClientRect().width)"
    )
    assert after / before == pytest.approx(113246208 / 269060552, abs=1e-3)


@pytest.mark.parametrize("width", WIDTHS)
def test_hovering_a_cell_shows_its_layer(chromium: browser.Browser, pages: Pages, width: int) -> None:
    chromium.open(pages.one, width)
    assert boxes(chromium, "#tip") == 0
    chromium.hover(".cell[data-name='model.layers.1.mlp.down_proj']")
    assert boxes(chromium, "#tip") == 1
    tip = chromium.run("document.getElementById('tip').innerText")
    for text in (
        "model.layers.1.mlp.down_proj",
        "w4a16-g64",
        "gptq",
        "weight error",
        "SQNR",
        "dB",
        "output error",
        "15.2%",
    ):
        assert text in tip
    place = chromium.run(
        "(r => [r.left, r.top, innerWidth - r.right, innerHeight - r.bottom])(tip.getBoundingClientRect())"
    )
    assert min(place) >= 0
    chromium.hover("h1")
    assert boxes(chromium, "#tip") == 0


def test_arrow_keys_move_through_the_heat_map(chromium: browser.Browser, pages: Pages) -> None:
    chromium.open(pages.one)
    chromium.run("document.querySelector('.cell[tabindex=\"0\"]').focus()")
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowLeft"):
        chromium.press(key)
    assert chromium.run("document.activeElement.dataset.name") == "model.layers.1.self_attn.k_proj"
    assert "model.layers.1.self_attn.k_proj" in chromium.run("document.getElementById('tip').innerText")
    chromium.press("Escape")
    assert boxes(chromium, "#tip") == 0


def test_the_heat_map_can_show_the_error_of_outputs(chromium: browser.Browser, pages: Pages) -> None:
    chromium.open(pages.one)
    darkest = """(cells => cells.map(cell => [getComputedStyle(cell).getPropertyValue("--t"), cell.dataset.name])
                 .sort()[cells.length - 1][1])([...document.querySelectorAll(".cell")])"""
    assert chromium.run(darkest) != "model.layers.1.mlp.down_proj"
    chromium.run("document.querySelector('input.output_error').click()")
    assert chromium.run(darkest) == "model.layers.1.mlp.down_proj"
    assert boxes(chromium, ".legend.output_error") == 1
    assert boxes(chromium, ".legend.relative_error") == 0


@pytest.mark.parametrize("width", WIDTHS)
def test_the_chart_of_a_comparison_is_drawn(chromium: browser.Browser, pages: Pages, width: int) -> None:
    chromium.open(pages.several, width)
    assert boxes(chromium, ".scatter circle") == 4
    place = "p => (r => [p.textContent, r.x, r.y])(p.querySelector('circle').getBoundingClientRect())"
    places = chromium.run(f"[...document.querySelectorAll('.point')].map({place})")
    lefts, tops = {name: x for name, x, _ in places}, {name: y for name, _, y in places}
    assert lefts["gptq:w4a16-g64"] < lefts["rtn:w8a8"]
    assert tops["rtn:w4a16-g64"] < tops["gptq:w4a16-g64"] < tops["rtn:w8a8"] < tops["rtn:w8a16"]


def test_a_click_on_a_heading_sorts_the_table(chromium: browser.Browser, pages: Pages) -> None:
    chromium.open(pages.several)
    names = "[...document.querySelectorAll('.recipes tbody tr')].map(row => row.cells[0].textContent)"
    click = "document.querySelectorAll('.recipes th button')[3].click()"
    by_divergence = ["rtn:w8a16", "rtn:w8a8", "gptq:w4a16-g64", "rtn:w4a16-g64"]
    chromium.run(click)
    assert chromium.run(names) == by_divergence
    chromium.run(click)
    assert chromium.run(names) == by_divergence[::-1]


def test_one_recipe_is_shown_at_a_time_and_a_link_chooses_it(chromium: browser.Browser, pages: Pages) -> None:
    chromium.open(pages.several)
    shown = (
        "[...document.querySelectorAll('.recipe')].filter(recipe => recipe.checkVisibility()).map(recipe => recipe.id)"
    )
    assert chromium.run(shown) == ["recipe-1"]
    chromium.run(
        "document.querySelector('.recipes a[href=\"#recipe-3\"]').click(), new Promise(done => setTimeout(done, 100))"
    )
    assert chromium.run(shown) == ["recipe-3"]
    chromium.run("document.querySelectorAll('.tabs a')[1].click()")
    assert chromium.run(shown) == ["recipe-2"]


def test_paper_shows_every_recipe_and_cuts_nothing_off(chromium: browser.Browser, pages: Pages) -> None:
    chromium.open(pages.several, width=718)  # A4 with margins of 1 cm, at 96 pixels an inch
    chromium.call("Emulation.setEmulatedMedia", media="print")
    assert boxes(chromium, "article.recipe") == 4
    assert chromium.run("document.scrollingElement.scrollWidth") <= 718
    right = "[...document.querySelectorAll('main *')].map(box => box.getBoundingClientRect().right)"
    assert chromium.run(f"Math.max(...{right})") <= 718 + 2  # the gap that stands around the cells of the heat map


def test_every_number_is_there_without_javascript(chromium: browser.Browser, pages: Pages) -> None:
    chromium.open(pages.several, script=False)
    counts = {"article.recipe": 4, ".recipes tbody tr": 4, ".scatter circle": 4, ".tile": 24, ".map .cell": 4 * 210}
    assert {selector: boxes(chromium, selector) for selector in counts} == counts
    assert chromium.run("document.querySelectorAll('details tbody tr').length") == 4 * 210
