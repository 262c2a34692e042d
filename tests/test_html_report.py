"""The HTML report in a real browser, and the activations that it shows.

Needs Chromium (``apt-get install chromium``): without one the tests fail, they are not skipped. One browser for all.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from playwright.sync_api import Browser, Page, expect, sync_playwright
from tiny_model import MASK, masked_ids, tiny_model

import freeact_fx
from freeact_fx import ConfigError, QuantConfig, TokenTypes
from freeact_fx.inspection.html import html, write_html
from freeact_fx.report import (
    ActivationReport,
    GraphReport,
    GroupReport,
    LinearReport,
    Report,
)

OPTIONS = {"token_types": TokenTypes.mask_token(MASK)}
TYPES = ("unmasked", "masked", "first")
KINDS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


def decoder_report(num_layers: int = 6, *, lines_per_linear: int = 7) -> Report:
    """Of a decoder's shapes, with errors, bytes, times and code; the last layer differs in its plan, the head is left
    alone, one Linear has default types and one refused ones."""
    linears, groups = [], []
    for layer in range(num_layers):
        for kind, members in enumerate(KINDS):
            names = tuple(f"model.layers.{layer}.{name}" for name in members)
            plan = "shift" if layer == num_layers - 1 else "branch"
            predicted = {"single": 0.05, plan: 0.01}
            counts = dict(zip(TYPES, (4000, 3800, 12), strict=True))
            groups.append(
                GroupReport(
                    names[0], names, plan, (64, 64), (64, 64), 64, (64,), predicted, None, counts
                )
            )
            for name in names:
                error = {t: 0.01 * (1 + kind) + 0.001 * layer for t in TYPES}
                row = LinearReport(name, (4096, 4096), group=names[0], state="typed", plan=plan)
                row.type_source = "input_ids == 126336 -> masked; first position"
                row.engine, row.kernel, row.precision = "oneDNN u8 x s8", "qlinear", "W4A4"
                row.dense_bytes, row.packed_bytes, row.engine_bytes = 2 << 24, 9 << 20, 1 << 24
                row.measured_error, row.predicted_error, row.graphs = error, error, (0,)
                row.time_ms, row.dense_time_ms = 1.5, 2.5
                linears.append(row)
    linears[1].state, linears[1].way_out = "default", "Hand them in with freeact_fx.token_types."
    linears[2].state, linears[2].type_source = "refused", "two sources conflict at add_3"
    reason, way_out = "listed in QuantConfig.skip", "take it out of QuantConfig.skip"
    head = LinearReport("lm_head", (128256, 4096), precision="bfloat16", dense_bytes=1 << 30)
    head.reason, head.way_out, head.graphs = reason, way_out, (0,)
    linears.append(head)
    code = [
        f"    {'linear' if at == 3 else 'add'}_{i}_{at} = op(x, {r.name.replace('.', '_')}_weight)"
        f"  # bf16[1, s0, 4096]  {r.name}"
        for i, r in enumerate(linears)
        for at in range(lines_per_linear)
    ]
    names = tuple(r.name for r in linears)
    graphs = [
        GraphReport(0, f"the graph with {names[0]}", names, 1600, 4200, "a call of print()"),
        GraphReport(1, "a graph without Linears", (), 12, 0, None, "x.size(1) == 16"),
    ]
    graphs[0].types_from = ({"tokens": "input_ids", "source": "ids"},)
    graphs[1].types_from = ({"tokens": "inputs_embeds", "source": "unknown"},)
    graphs[0].before = graphs[0].after = "\n".join(["def forward(", "):", *code])
    edges = tuple(float(i - 64) for i in range(129))
    activations = [
        ActivationReport(groups[0].name, t, stage, edges, tuple(range(64)) * 2, 10)
        for t in TYPES
        for stage in ("before", "after")
    ]
    model = {"class": "LLaDAModelLM", "num_parameters": 8_015_581_184}
    versions = {"freeact_fx": "0.1.0", "torch": "2.13.0", "triton": None, "device": "cpu"}
    return Report(linears, groups, graphs, activations, model, versions, {}, TYPES)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if found is None:
        pytest.fail(
            "These tests need Chromium: apt-get install chromium (Debian), or -m 'not browser'."
        )
    flags = (
        "no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
        "disable-component-update disable-sync"
    )
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=found, args=[f"--{flag}" for flag in flags.split()]
        )
        yield chromium
        chromium.close()


Open = Callable[..., Page]


@pytest.fixture
def show(browser: Browser, tmp_path: Path) -> Iterator[Open]:
    """Opens a report; at the end the page must have been quiet: no message, no error, no request."""
    complaints: list[str] = []
    contexts = []

    def open_report(report: Report, address: str = "", **settings: str) -> Page:
        file = tmp_path / "report.html"
        write_html(report, file)
        size = {"width": 1440, "height": 1000}
        contexts.append(browser.new_context(viewport=size, **settings))
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda message: complaints.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        page.on("request", lambda request: complaints.append(f"request: {request.url}"))
        page.goto(file.as_uri() + address)
        assert page.evaluate("document.documentElement.dataset.readyMs") is not None, complaints
        complaints.remove(f"request: {file.as_uri()}")
        return page

    yield open_report
    for context in contexts:
        context.close()
    assert complaints == []


def facts(page: Page) -> str:
    return page.locator("#facts").inner_text()


def focused(page: Page) -> str:
    """Accessible name, or text, of what has the focus."""
    script = (
        "(document.activeElement.getAttribute('aria-label') ?? document.activeElement.innerText)"
    )
    return str(page.evaluate(script))


# ------------------------------------------------------------------ the file


def test_one_file_without_addresses_that_holds_the_report() -> None:
    report = decoder_report()
    report.linears[0].predicted_error = {"unmasked": float("nan")}
    text = html(report)
    embedded = re.search(r'id="report-data">(.*?)</script>', text, re.DOTALL)
    assert embedded is not None
    expected = report.to_dict()
    expected["linears"][0]["predicted_error"] = {"unmasked": None}
    assert json.loads(embedded[1]) == json.loads(json.dumps(expected))
    outside_scripts = re.sub(r"(<script[^>]*>).*?</script>", r"\1", text, flags=re.DOTALL)
    assert len(outside_scripts) < 100_000
    assert not re.search(r"\bsrc=|https?:|@import|url\((?!#)", outside_scripts)
    assert "sourceMappingURL" not in text
    assert html(report.to_dict()) == text


def test_eight_billion_parameters_take_less_than_five_megabytes() -> None:
    """225 Linears; the code of such a graph has about 1600 lines before and 4200 after the passes."""
    report = decoder_report(32, lines_per_linear=19)
    assert len(report.linears) == 225
    assert len(html(report)) < 5e6


# ------------------------------------------------------------------ in the browser


@pytest.mark.browser
def test_real_report_opens_quietly_and_shows_what_was_done(show: Open) -> None:
    model, ids = tiny_model(), masked_ids()
    report = freeact_fx.explain(model, ids, options=OPTIONS, code=True)
    page = show(report)
    assert page.title() == "TinyModel, freeact_fx report"
    overview = page.locator("#overview").inner_text()
    assert "14 of 15" in overview
    assert "1 Linear left alone: " + (report["lm_head"].reason or "") in overview
    assert "2 layers of equal facts" in page.locator("#tree").inner_text()
    assert "The transforms are data-free" not in page.locator("#costs").inner_text()
    assert "data-free" in page.locator("#errors").inner_text()
    page.locator("#graphs").scroll_into_view_if_needed()
    page.locator("#pane-after").wait_for()
    assert "transform_quantize" in page.locator("#pane-after").text_content()
    assert "transform_quantize" not in page.locator("#pane-before").text_content()


@pytest.mark.browser
def test_a_click_shows_every_fact_of_a_linear(show: Open) -> None:
    page = show(decoder_report())
    page.get_by_text("Layer by layer").click()
    page.get_by_text("model.layers.3", exact=True).first.click()
    page.locator(".layer", has_text="model.layers.3").get_by_role(
        "treeitem", name=re.compile("^k_proj")
    ).click()
    text = facts(page)
    wanted = (
        "model.layers.3.self_attn.k_proj|branch, typed|4,096 × 4,096|"
        "oneDNN u8 x s8|qlinear|W4A4|33.6 MB|9.4 MB|16.8 MB|1.50 ms|2.50 ms|model.layers.3.self_attn.v_proj|"
        "64 × 64|unmasked 4,000, masked 3,800, first 12|branch ✓|1.3 %|Graph 0, before and after"
    )
    for part in wanted.split("|"):
        assert part in text
    chain = page.locator("#facts .chain li")
    assert chain.all_inner_texts() == ["input_ids == 126336", "masked", "first position"]
    assert page.locator("#facts .chain li.start").count() == 2
    page.get_by_role("treeitem", name=re.compile("^lm_head")).locator(".row").click()
    assert "Left alone: listed in QuantConfig.skip" in facts(page)
    assert "Way out: take it out of QuantConfig.skip" in facts(page)


@pytest.mark.browser
def test_equal_layers_are_one_until_they_are_unfolded(show: Open) -> None:
    """Layer 0 has other states than 1 to 4, and 5 another plan."""
    page = show(decoder_report())
    rows = page.locator("#tree > .item > .row > b")
    assert rows.all_inner_texts() == [
        "model.layers.0",
        "model.layers.1 – 4",
        "model.layers.5",
        "lm_head",
    ]
    run = page.locator(".run")
    assert run.locator(".node.linear").count() == 7  # one drawing for four layers
    run.locator(".node.linear").nth(6).click()
    assert "model.layers.*.mlp.down_proj" in facts(page)
    assert "4 Linears" in facts(page)
    run.get_by_text("Layer by layer").click()
    run.locator(".layer .row").nth(1).click()
    assert run.locator(".node.linear").count() == 14
    nodes = page.locator(".node.linear").evaluate_all(
        "nodes => nodes.map(node => node.getBoundingClientRect().toJSON())"
    )
    for i, a in enumerate(nodes):
        for b in nodes[:i]:
            apart_x = a["right"] <= b["left"] or b["right"] <= a["left"]
            assert apart_x or a["bottom"] <= b["top"] or b["bottom"] <= a["top"]
    page.get_by_role("button", name="Fold all").click()
    assert page.locator(".node").count() == 0


@pytest.mark.browser
def test_search_finds_layers_and_linears(show: Open) -> None:
    page = show(decoder_report())
    page.keyboard.press("/")
    page.keyboard.type("layers.3 down")
    assert page.locator("#found li").all_inner_texts()[0].startswith("model.layers.3.mlp.down_proj")
    page.keyboard.press("Enter")
    assert "model.layers.3.mlp.down_proj" in facts(page)
    assert focused(page).startswith("down_proj")
    assert page.url.endswith("#model.layers.3.mlp.down_proj")
    page.fill("#search", "model.layers.4")
    page.keyboard.press("Enter")
    assert focused(page) == "layer model.layers.4, 7 Linears"
    page.fill("#search", "no such thing")
    assert "Nothing has these words" in page.locator("#found").inner_text()


@pytest.mark.browser
def test_an_address_with_a_name_opens_there(show: Open) -> None:
    page = show(decoder_report(), "#model.layers.2.mlp.up_proj")
    assert "model.layers.2.mlp.up_proj" in facts(page)
    assert focused(page).startswith("up_proj")


@pytest.mark.browser
def test_keyboard_alone_reaches_everything(show: Open) -> None:
    page = show(decoder_report())
    seen = []
    for _ in range(40):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.closest('[id]')?.id"))
        if seen[-1] == "tree":
            break
    assert seen[0] == "walk" or "search" in seen
    assert seen[-1] == "tree"
    # One tab stop for the tree; arrows walk it, fold and unfold it.
    assert page.locator('#tree [tabindex="0"]').count() == 1
    assert focused(page) == "layer model.layers.0, 7 Linears"
    page.keyboard.press("ArrowDown")
    assert focused(page).startswith("model.layers.1 – 4")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    assert focused(page).startswith("q_proj")
    assert "model.layers.*.self_attn.q_proj" in facts(page)
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert page.evaluate(outline) == "solid"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "facts"
    page.keyboard.press("Escape")
    assert focused(page).startswith("q_proj")
    page.keyboard.press("End")
    assert focused(page).startswith("lm_head")
    # The table is one stop too.
    page.locator("#row-order").focus()
    page.keyboard.press("Tab")
    assert focused(page).startswith("model.layers.0")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert focused(page).startswith("self_attn.q_proj")
    page.keyboard.press("Enter")
    assert "model.layers.0.self_attn.q_proj" in facts(page)


@pytest.mark.browser
def test_what_deserves_attention_is_listed(show: Open) -> None:
    page = show(decoder_report())
    text = page.locator("#overview").inner_text()
    for part in (
        "1 Linear planned for the default type “unmasked”",
        "Hand them in with freeact_fx.token_types.",
        "1 Linear with refused types",
        "Types unknown where tokens enter: graph 1",
        "Graph 0 ends at a break",
        "a call of print()",
        "Graph 1 was compiled again",
        "x.size(1) == 16",
    ):
        assert part in text
    page.locator(".notices li", has_text="refused").get_by_role("button").click()
    rows = page.locator("#linears tbody tr").all_inner_texts()
    assert len(rows) == 1
    assert "model.layers.0.self_attn.v_proj" in rows[0]


@pytest.mark.browser
def test_breaks_of_one_cause_are_one_notice(show: Open) -> None:
    """A vision-language model has dozens of them; where types crossed one is told."""
    report = decoder_report()
    for index in (2, 3):
        crossed = {"tokens": "inputs_embeds", "source": "an earlier graph", "graph": 0}
        graph = GraphReport(
            index, f"graph {index}", (), 12, 0, "a call of print()", "x.size(1) == 16"
        )
        graph.types_from = (crossed,) if index == 3 else ()
        report.graphs.append(graph)
    page = show(report)
    text = page.locator("#overview").inner_text()
    assert "Graphs 0, 2, 3 end at the same break" in text
    assert "Graphs 1, 2, 3 were compiled again" in text
    assert text.count("a call of print()") == text.count("x.size(1) == 16") == 1
    assert "Graph 3 takes its types from graph 0" in text
    page.locator("#graphs").scroll_into_view_if_needed()
    assert "inputs_embeds: graph 0" in page.locator("#graphs tbody").inner_text()


@pytest.mark.browser
def test_charts_show_errors_bytes_times_and_activations(show: Open) -> None:
    page = show(decoder_report())
    for section in ("errors", "costs", "activations"):
        page.locator(f"#{section}").scroll_into_view_if_needed()
        page.locator(f"#{section} .chart svg").first.wait_for()
    titles = page.locator("#errors .chart svg text").all_text_contents()
    assert {*TYPES, "q_proj, k_proj, v_proj", "down_proj", "4.5 %"} <= set(titles)
    assert page.locator("#costs .chart").count() == 2
    times = page.locator("#costs .chart").nth(1)
    times.scroll_into_view_if_needed()
    assert "27.0 ms" in times.locator("svg").text_content()  # three Linears of six layers
    assert "before the transform" in page.locator("#activations svg").text_content()
    # A cell of the heat map leads to its group.
    page.locator("#errors .chart").scroll_into_view_if_needed()
    cell = page.locator("#errors .chart svg text", has_text=re.compile(r"^4\.3 %$")).first
    cell.click(force=True)
    assert "model.layers.3.mlp.down_proj" in facts(page)


@pytest.mark.browser
def test_code_of_a_linear_is_marked_on_both_sides(show: Open) -> None:
    page = show(decoder_report())
    page.fill("#search", "layers.1.mlp.up")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Graph 0, before and after").click()
    for stage in ("before", "after"):
        hits = page.locator(f"#pane-{stage} .hit").all_text_contents()
        assert len(hits) == 7
        assert all("model.layers.1.mlp.up_proj" in line for line in hits)
    current = page.locator("#pane-after .current")
    first = current.text_content()
    page.get_by_role("button", name="Next").click()
    assert current.text_content() != first


@pytest.mark.browser
def test_text_of_a_report_is_never_markup(show: Open) -> None:
    evil = "</script><script>document.title='hacked'</script><img src=x onerror=\"document.title='hacked'\">"
    report = decoder_report(1)
    report.model["class"] = report.linears[-1].reason = report.linears[0].kernel = evil
    report.graphs[0].before = report.graphs[0].break_reason = evil
    report.type_names = (evil, *TYPES[1:])
    for linear in report.linears[:-1]:
        linear.measured_error = {evil: 0.5}
    page = show(report)
    assert page.title() == f"{evil}, freeact_fx report"
    assert page.locator("h1").inner_text() == evil
    page.locator("#errors .chart svg").hover()
    page.locator(".node.linear").first.click()
    assert evil in facts(page)
    assert page.locator("img").count() == 0


@pytest.mark.browser
def test_colours_and_motion_follow_the_system(show: Open) -> None:
    brightness = "parseInt(getComputedStyle(document.body).backgroundColor.match(/[0-9]+/)[0])"
    page = show(decoder_report(), color_scheme="light", reduced_motion="no-preference")
    assert page.evaluate(brightness) > 200
    assert page.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == "smooth"
    page.locator("#costs").scroll_into_view_if_needed()
    text = page.locator("#costs .chart svg text").first
    light = text.get_attribute("fill") or ""
    page.emulate_media(color_scheme="dark", reduced_motion="reduce")
    assert page.evaluate(brightness) < 60
    # The browser tells its listeners with the next frame.
    expect(text).not_to_have_attribute("fill", light, timeout=20_000)
    assert page.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == "auto"


@pytest.mark.browser
def test_more_than_a_thousand_linears_stay_quick(show: Open) -> None:
    """Drawn in 2.3 s on two cores under a load of 9, a choice then takes 0.4 s; the bounds leave room for worse."""
    report = decoder_report(160)
    assert len(report.linears) == 1121
    for i, linear in enumerate(report.linears[:-1]):
        linear.packed_bytes += i
        linear.plan = "branch" if (i // 7) % 3 else "shift"  # runs of one and two layers
    start = time.perf_counter()
    page = show(report)
    assert time.perf_counter() - start < 20
    tiles = page.locator(".tile strong")
    assert all(t.evaluate("t => t.scrollWidth <= t.clientWidth") for t in tiles.all())
    start = time.perf_counter()
    page.fill("#row-filter", "down_proj")
    page.fill("#search", "layers.157.mlp.up_proj")
    page.keyboard.press("Enter")
    assert "model.layers.157.mlp.up_proj" in facts(page)
    assert time.perf_counter() - start < 20
    assert page.locator("#linears tbody tr").count() == 160
    assert page.evaluate("document.querySelectorAll('*').length") < 60_000


# ------------------------------------------------------------------ activations


def activations(report: Report, stage: str) -> dict[tuple[str, str], ActivationReport]:
    return {(a.group, a.type): a for a in report.activations if a.stage == stage}


def test_activations_are_those_of_the_model() -> None:
    """Counted by hand for the first group, whose input is the norm of the embeddings."""
    model, ids = tiny_model(), masked_ids()
    patterns = ("*blocks.0.k", "blocks.1.down")
    report = freeact_fx.explain(model, ids, options=OPTIONS, activations=patterns)
    before = activations(report, "before")
    assert {group for group, _ in before} == {"blocks.0.q", "blocks.1.down"}
    with torch.no_grad():
        x = model.blocks[0].attention_norm(model.embed(ids))
    types = TokenTypes.mask_token(MASK).from_ids(ids)
    types[:, 0] = 2
    for number, name in enumerate(("unmasked", "masked", "first")):
        found, mine = before["blocks.0.q", name], x[types == number]
        assert found.num_tokens == len(mine)
        edges = torch.tensor(found.edges)
        assert found.counts == tuple(mine.histogram(edges)[0].long().tolist())
        assert float(mine.abs().max()) <= found.edges[-1] < 4 * float(mine.abs().max())


def test_activations_after_the_transform_are_less_spread() -> None:
    """An outlier channel: 30 times the others before, near the others' size behind an orthogonal transform."""
    model, ids = tiny_model(), masked_ids()
    with torch.no_grad():
        model.blocks[0].attention_norm.weight[5] = 30
    report = freeact_fx.explain(model, ids, options=OPTIONS, activations="blocks.0.q")
    before, after = activations(report, "before"), activations(report, "after")
    for key in before:
        assert after[key].edges[-1] <= before[key].edges[-1] / 2
        assert sum(after[key].counts) == sum(before[key].counts)


class Twice(torch.nn.Module):
    """One Linear that is called with small values, then with large ones."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(48, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + self.inner(100 * x)


def test_activations_of_several_calls_are_counted_together() -> None:
    x = torch.randn(2, 16, 48)
    report = freeact_fx.explain(Twice().eval(), x, activations="inner")
    (found,) = (a for a in report.activations if a.stage == "before")
    assert found.num_tokens == 2 * 32
    expected = torch.cat([x, 100 * x]).histogram(torch.tensor(found.edges))[0]
    assert found.counts == tuple(expected.long().tolist())


def test_activations_of_a_converted_model_use_its_own_transforms() -> None:
    model, ids = tiny_model(), masked_ids()
    checkpoint = freeact_fx.calibrate(model, [ids], QuantConfig(**OPTIONS), progress=False)
    options = {"checkpoint": checkpoint}
    dense = freeact_fx.explain(model, ids, options=options, activations=("blocks.0.*",))
    freeact_fx.convert(model, checkpoint)
    converted = freeact_fx.explain(model, ids, activations=("blocks.0.*",))
    assert len(converted.activations) == len(dense.activations) == 4 * 3 * 2
    # In front of the first group nothing is rounded yet, so its activation is the dense model's.
    for stage in ("before", "after"):
        for key, found in activations(dense, stage).items():
            if key[0] == "blocks.0.q":
                assert activations(converted, stage)[key] == found


def test_activations_say_what_is_missing() -> None:
    model, ids = tiny_model(), masked_ids()
    with pytest.raises(ConfigError, match=r"no quantised Linear has such a name.*'blocks.0.q'"):
        freeact_fx.explain(model, ids, options=OPTIONS, activations=("blocks.9.*",))
    with pytest.raises(ConfigError, match="parameters without values"):
        freeact_fx.explain(
            model.to("meta"), ids.to("meta"), options=OPTIONS, activations=("blocks.0.*",)
        )
