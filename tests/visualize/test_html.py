"""graphquant.visualize.html: what stands on the page, and what a browser does with it."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphquant
from graphquant.report import Outcome, Report
from graphquant.visualize import html
from graphquant.visualize.colors import COLORS, KIND_COLORS
from graphquant.visualize.lines import Inspected, Line, inspect
from tests import zoo

HOSTILE = (
    "<img src=x onerror=\"document.title='owned'\">'&amp;</script><script>document.title='owned'"
)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
NO_CHROMIUM = "NOT CHECKED: the page in a browser. It needs Chromium: apt-get install chromium"


@dataclass
class Parsed(HTMLParser):
    """The text of every row, side by side, and all tags with their attributes."""

    rows: list[list[str]] = field(default_factory=list)
    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    in_cell: bool = False

    @classmethod
    def of(cls, page: str) -> Parsed:
        made = cls()
        super(cls, made).__init__()
        made.feed(page)
        made.rows = [[" ".join(side.split()) for side in row] for row in made.rows]
        return made

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        kinds = (dict(attrs).get("class") or "").split()
        if "row" in kinds:
            self.rows.append([])
        if "cell" in kinds:
            self.rows[-1].append("")
            self.in_cell = True
        elif tag in ("details", "section", "script") or "row" in kinds:
            self.in_cell = False

    def handle_data(self, data: str) -> None:
        if self.in_cell:
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def vit() -> tuple[list[Inspected], graphquant.AccuracyReport]:
    entry = zoo.load("vit")
    model, (args, kwargs) = entry.build("sdpa"), entry.inputs(2)
    return inspect(model, args, kwargs), graphquant.compare(model, [(args, kwargs)])


@pytest.fixture(scope="module")
def page(vit: tuple[list[Inspected], graphquant.AccuracyReport]) -> str:
    return html.page("vit", *vit)


def with_outcome(**what: Any) -> str:
    """A page with one linear of which the report says that."""
    line = Line("linear", ("linear",), "linear", "linear(x, w)", path="fc")
    outcome = Outcome("linear", "fc", "linear", M=2, N=3, K=4, **what)
    return html.page("m", [Inspected((line,), (line,), Report((outcome,)))])


def test_every_line_stands_on_its_side_in_graph_order(
    vit: tuple[list[Inspected], graphquant.AccuracyReport], page: str
) -> None:
    (one,) = vit[0]
    rows = Parsed.of(page).rows
    for side, lines in enumerate((one.before, one.after)):
        texts = [row[side].lstrip("-+~ ") for row in rows if row[side]]
        assert len(texts) == len(lines)
        for text, line in zip(texts, lines, strict=True):
            assert text.startswith(" ".join([line.text, *line.values]))
            assert line.rule in text


def test_every_site_has_its_rules_sizes_and_errors(
    vit: tuple[list[Inspected], graphquant.AccuracyReport], page: str
) -> None:
    (one,), accuracy = vit
    errors = {s.outcome.node: s for s in accuracy.sites}
    rows = Parsed.of(page).rows
    for o in one.report.outcomes:
        (line,) = (line for line in one.before if line.node == o.node)
        (text,) = (row[0] for row in rows if row[0].lstrip("-~ ").startswith(f"{line.text} "))
        assert " ".join([o.kind, *o.rules]) in text
        assert (f"{o.M} × {o.N} × {o.K}" in text) == (o.kind == "linear")
        assert (f"refused: {o.refused}" in text) == (not o.rules)
        if o.int8:
            local, accumulated = errors[o.node].local, errors[o.node].accumulated
            assert f"{local.sqnr:.1f} dB local ({local.relative:.2%}".replace("%", "") in text
            assert f"{accumulated.sqnr:.1f} dB accumulated" in text
    assert sum("dB local" in row[0] for row in rows) == len(accuracy.sites) == 13
    assert html.page("vit", [one]).count("dB local") == 0


class Twice(nn.Module):
    """One linear on two values of unlike size behind graph breaks, so that its errors differ."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.fc = nn.Linear(16, 24), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(self.first(x))
        torch._dynamo.graph_break()
        return self.fc(x**5)


def errors_shown(page: str) -> list[str]:
    """The local errors, in the order of the page."""
    texts = (row[0] for row in Parsed.of(page).rows)
    return [m[1] for text in texts if (m := re.search(r" ([\d.]+ dB) local", text))]


def test_calls_of_one_linear_have_their_own_errors_also_behind_a_graph_break() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Twice()).eval(), torch.randn(32, 16)
    found, accuracy = inspect(model, (x,)), graphquant.compare(model, [x])
    assert len(found) == 2
    paths = [o.path for one in found for o in one.report.outcomes]
    assert paths == ["0.first", "0.fc", "0.fc"]
    shown = errors_shown(html.page("twice", found, accuracy))
    assert shown == [f"{s.local.sqnr:.1f} dB" for s in accuracy.sites]
    assert len(set(shown)) == 3


def test_times_are_shown_where_they_were_measured() -> None:
    measured = with_outcome(rules=("linear",), float_us=20.25, int8_us=12.5)
    assert "12.5 µs int8, 20.2 µs float" in measured
    assert "µs" not in with_outcome(rules=("linear",))


def test_smoothing_is_shown() -> None:
    assert "smoothed (alpha 0.5)" in with_outcome(rules=("linear",), smoothed="alpha 0.5")
    assert "not smoothed: no norm" in with_outcome(rules=("linear",), not_smoothed="no norm")


def test_an_outcome_without_a_line_is_a_note() -> None:
    outcome = Outcome("norm", "lost.norm", "elsewhere", refused="nobody knows")
    page = html.page("m", [Inspected((), (), Report((outcome,)))])
    assert "note: norm lost.norm: refused: nobody knows" in page


def test_rules_have_the_colors_of_the_other_picture(page: str) -> None:
    buttons = [dict(attrs) for tag, attrs in Parsed.of(page).tags if tag == "button"]
    searched = {b["data-search"] for b in buttons if "data-search" in b}
    for rule in ("stack_siblings", "norm_linear", "act_linear", "linear", "residual"):
        assert f"rule:{rule}" in searched
        assert f'<span class="tag" style="background:{COLORS[rule]}">{rule}</span>' in page
    assert "rule:layer_scale" not in searched  # this model has none


def test_layers_are_closed_and_what_is_around_them_is_open(page: str) -> None:
    modules = [attrs for tag, attrs in Parsed.of(page).tags if "data-path" in attrs]
    is_open = {m["data-path"]: "open" in m for m in modules}
    assert is_open["layers"]
    assert not any(is_open[path] for path in ("layers.0", "layers.1", "layers.0.attention"))
    assert "like 0" in page  # the second layer


def layers(*refused: str) -> str:
    """A page with layers that are the same, but for the reason why their linear is in float."""
    lines = tuple(
        Line(f"n{i}_{j}", (f"n{i}_{j}",), "linear", "linear()", path=f"{i}.fc")
        for i in range(len(refused))
        for j in range(html.FEW + 1)  # so many that the layer can be opened and closed
    )
    fates = tuple(
        Outcome("linear", f"{i}.fc", f"n{i}_0", refused=why) for i, why in enumerate(refused)
    )
    return html.page("m", [Inspected(lines, lines, Report(fates))])


def test_a_layer_that_is_treated_unlike_is_not_called_alike() -> None:
    alike = re.findall(r"like [\w.]+</span>", layers("excluded", "excluded", "too small"))
    assert alike == ["like 0.fc</span>"]


def test_nothing_on_the_page_points_outside(page: str) -> None:
    parsed = Parsed.of(page)
    assert not {tag for tag, _ in parsed.tags} & {"link", "img", "iframe", "object", "base", "form"}
    assert not {name for _, attrs in parsed.tags for name in attrs} & {"src", "href", "srcset"}
    assert not re.search(r"https?:|//[a-z]|url\(|@import", page)
    assert "default-src 'none'" in page


class Hostile(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.add_module(HOSTILE.replace(".", ""), nn.Linear(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.get_submodule(HOSTILE.replace(".", ""))(x)


@pytest.fixture(scope="module")
def hostile() -> str:
    """What a model can bring: module names; and, to be sure, every other text."""
    model, x = Hostile().eval(), torch.randn(4, 16)
    (one,), accuracy = inspect(model, (x,)), graphquant.compare(model, [x])
    assert any("onerror" in line.path for line in one.before)
    line = Line("n", (HOSTILE,), HOSTILE, f"{HOSTILE}({HOSTILE})", (HOSTILE,), path=HOSTILE)
    inner = replace(line, node="m", path=f"{HOSTILE}.0.{HOSTILE}")
    outcome = Outcome("linear", HOSTILE, "n", refused=HOSTILE, not_smoothed=HOSTILE)
    report = Report((outcome,), notes=(HOSTILE,))
    outputs = tuple(replace(o, name=HOSTILE) for o in accuracy.outputs)
    found = [one, Inspected((line, inner), (inner,), report)]
    return html.page(HOSTILE, found, replace(accuracy, outputs=outputs), [HOSTILE])


def test_a_hostile_name_does_not_become_markup(hostile: str, page: str) -> None:
    parsed = Parsed.of(hostile)
    ours = {tag for tag, _ in Parsed.of(page).tags}
    assert {tag for tag, _ in parsed.tags} <= ours
    assert [tag for tag, _ in parsed.tags].count("script") == 1
    assert not any(name.startswith("on") for _, attrs in parsed.tags for name in attrs)
    assert any(HOSTILE in cell for row in parsed.rows for cell in row)


def onnx_like() -> list[Line]:
    return [
        Line("x", ("x",), "input", "input", ("[2, 8] float32",)),
        Line("xq", ("xq",), "QuantizeLinear", "QuantizeLinear(x)", rule="quantize", path="h.0.fc"),
        Line("y", ("y",), "MatMulInteger", "MatMulInteger(xq)", rule="int8 product", path="h.0.fc"),
        Line("z", ("z",), "Add", "Add(y, b)", path="h.1"),
    ]


def test_one_side_shows_kinds_in_their_colors() -> None:
    parsed = Parsed.of(page := html.one_sided("m.onnx", onnx_like()))
    assert [len(row) for row in parsed.rows] == [1] * 4
    assert parsed.rows[0] == ["x = input [2, 8] float32"]
    for kind in ("quantize", "int8 product"):
        assert f'<span class="tag" style="background:{KIND_COLORS[kind]}">{kind}</span>' in page
    assert "QuantizeLinear 1, MatMulInteger 1, Add 1" in page


# in a browser -------------------------------------------------------------------------------------


class Browser:
    """Opens pages, and keeps what they ask the network for and what goes wrong in them."""

    def __init__(self, chromium: Any, folder: Path) -> None:
        self._chromium = chromium
        self._folder = folder
        self.requests: list[str] = []
        self.errors: list[str] = []

    def open(self, text: str) -> Any:
        file = self._folder / "page.html"
        file.write_text(text, encoding="utf-8")
        page = self._chromium.new_page()
        page.set_default_timeout(20_000)  # ms, for a machine with much else to do
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.goto(file.as_uri())
        assert self.requests == [file.as_uri()]
        return page


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip(NO_CHROMIUM)
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    with sync_api.sync_playwright() as playwright:
        root = os.geteuid() == 0  # Chromium's sandbox does not run as root
        browser = playwright.chromium.launch(executable_path=CHROMIUM, chromium_sandbox=not root)
        yield browser
        browser.close()


@pytest.fixture
def browser(chromium: Any, tmp_path: Path) -> Iterator[Browser]:
    made = Browser(chromium, tmp_path)
    yield made
    assert made.errors == []
    assert len(made.requests) == 1, f"fetched {made.requests[1:]}"


def visible(shown: Any, path: str) -> Any:
    """The rows on the screen that belong to a module."""
    return shown.locator(f'.row[data-find~="{path}"]').filter(visible=True)


def test_a_click_opens_a_layer(browser: Browser, page: str) -> None:
    shown = browser.open(page)
    rows = visible(shown, "layers.0.layernorm_before")
    assert rows.count() == 0
    layer = shown.locator('[data-path="layers.0"] > summary')
    layer.click()
    assert rows.count() == 1 and "norm_linear" in rows.inner_text()
    assert visible(shown, "layers.1.layernorm_before").count() == 0
    layer.click()
    assert rows.count() == 0


def test_the_keyboard_opens_a_layer(browser: Browser, page: str) -> None:
    shown = browser.open(page)
    shown.locator('[data-path="layers.1"] > summary').focus()
    shown.keyboard.press("Enter")
    assert visible(shown, "layers.1.layernorm_before").count() == 1


def test_a_search_finds_a_site_opens_its_layer_and_marks_it(browser: Browser, page: str) -> None:
    shown = browser.open(page)
    before = shown.locator(".row").filter(visible=True).count()
    shown.keyboard.press("/")
    shown.keyboard.type("Layers.1 FC2.weight")
    rows = shown.locator(".row").filter(visible=True)
    found = visible(shown, "layers.1.mlp.fc2")
    assert found.count() == 1 and "34 × 64 × 128" in found.inner_text()
    paths = [row.get_attribute("data-find") for row in rows.all()]
    assert paths and all("layers.1" in path for path in paths)
    assert (
        shown.locator("#count").inner_text()
        == f"{len(paths)} of {shown.locator('.row').count()} lines"
    )
    marked = shown.evaluate("[...CSS.highlights.get('found')].map(String)")
    assert "fc2.weight" in marked
    shown.keyboard.press("Enter")
    assert shown.locator(".row.here").count() == 1
    shown.keyboard.press("Escape")
    assert shown.locator(".row").filter(visible=True).count() == before  # closed again
    assert shown.evaluate("CSS.highlights.get('found').size") == 0


def test_enter_goes_through_what_was_found_and_round(browser: Browser, page: str) -> None:
    shown = browser.open(page)
    shown.fill("#search", "q_proj norm_quantize")
    places = []
    for key in ("Enter", "Enter", "Enter", "Shift+Enter"):
        shown.press("#search", key)
        places.append(shown.locator(".row.here").get_attribute("data-find").split()[0])
        assert shown.locator(".row.here").filter(visible=True).count() == 1
    first, second = (f"layers.{i}.attention.q_proj" for i in (0, 1))
    assert places == [first, second, first, second]
    shown.fill("#search", "no such thing")
    assert shown.locator(".row").filter(visible=True).count() == 0
    assert shown.locator("#count").inner_text().startswith("0 of ")
    shown.press("#search", "Enter")


def test_a_rule_in_the_legend_shows_its_lines(browser: Browser, page: str) -> None:
    shown = browser.open(page)
    shown.click('button[data-search="rule:linear"]')
    rows = shown.locator(".row").filter(visible=True)
    tags = [row.locator(".tag").all_inner_texts() for row in rows.all()]
    assert tags and all("linear" in names for names in tags)  # and not norm_linear alone
    shown.click('button[data-search="rule:refused"]')
    assert "refused" in rows.inner_text()


def test_all_can_be_opened_and_closed(browser: Browser, page: str) -> None:
    shown = browser.open(page)
    rows = shown.locator(".row")
    shown.click("#open")
    assert rows.filter(visible=True).count() == rows.count()
    shown.click("#close")
    assert visible(shown, "layers.0.layernorm_before").count() == 0


def test_nothing_is_fetched(browser: Browser, page: str) -> None:
    shown = browser.open(page)
    shown.click("#open")
    shown.fill("#search", "linear")
    assert shown.evaluate("performance.getEntriesByType('resource').length") == 0


def test_the_policy_of_the_page_forbids_to_fetch(browser: Browser, page: str) -> None:
    shown = browser.open(page)
    refused = """() => new Promise((done) => {
        document.addEventListener("securitypolicyviolation", (e) => done(e.effectiveDirective));
        document.body.append(Object.assign(new Image(), { src: "image.png" }));
    })"""
    assert shown.evaluate(refused) == "img-src"
    browser.requests.pop()  # the one that was refused


def test_a_hostile_name_does_nothing(browser: Browser, hostile: str) -> None:
    shown = browser.open(hostile)
    shown.click("#open")
    shown.fill("#search", "onerror=")
    assert shown.locator(".row").filter(visible=True).count() >= 3
    assert shown.title() == f"{' '.join(HOSTILE.split())} · graphquant"
    assert shown.locator("img").count() == 0
    assert shown.locator("script").count() == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 1600])
def test_no_line_is_wider_than_the_screen(
    browser: Browser, page: str, scheme: str, width: int
) -> None:
    shown = browser.open(page)
    shown.emulate_media(color_scheme=scheme)
    shown.set_viewport_size({"width": width, "height": 900})
    shown.click("#open")
    assert shown.evaluate("document.documentElement.scrollWidth") <= width
    ink, paper = shown.evaluate(
        "() => { const s = getComputedStyle(document.body); return [s.color, s.backgroundColor] }"
    )
    light = [sum(map(int, re.findall(r"\d+", color)[:3])) / 765 for color in (ink, paper)]
    assert (
        (light[0] < 0.3 and light[1] > 0.9)
        if scheme == "light"
        else (light[0] > 0.7 and light[1] < 0.2)
    )


def test_one_side_opens_in_a_browser(browser: Browser) -> None:
    shown = browser.open(html.one_sided("m.onnx", onnx_like()))
    shown.click('[data-path="h"] > summary') if shown.locator('[data-path="h"]').count() else None
    shown.fill("#search", "matmulinteger")
    rows = shown.locator(".row").filter(visible=True)
    assert rows.count() == 1 and "int8 product" in rows.inner_text()
