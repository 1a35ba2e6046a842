"""The canvas page in a real browser: saved traces, answers of a server, keyboard, hostile text."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from scripted import Scripted, peaks
from serve_kit import MESSAGES, PATIENCE, PROMPT, Gate, serving

import dllm
from dllm.decoding.page import policy, source
from dllm.decoding.trace import Trace
from dllm.serve.app import create_app
from dllm.serve.config import ServeConfig

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the path")

HOSTILE = "<img src=x onerror=alert(1)></script><b>"
REVISED = Trace(  # a canvas of four columns behind two of the prompt; one is taken back, then the canvas grows
    prompt=[1, 2], mask_id=9, sampler="wino", cache="dual", prompt_text="a prompt",
    commits=[[[2, 3], [4, 5]], [[4, 9], [3, 4]], [[4, 6], [5, 7]], [[6, 8]]], windows=[[2, 6]] * 3 + [[0, 0]],
    lengths=[6, 6, 7, 7], final=[1, 2, 3, 4, 6, 7, 8],
    confidence=[[0.9, 0.5], [None, 0.8], [0.7, 0.6], [None]], seconds=[0.02, 0.03, 0.05, 0.06],
    pieces={1: "a", 2: " prompt", 3: "one", 4: " two", 5: " wrong", 6: HOSTILE, 7: "\n", 8: " end"}, text="one two",
)  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        expect.set_options(timeout=1000 * PATIENCE)  # its own 5 s are short on a busy machine
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page that may complain of nothing: no error of its script, nothing that its policy forbids."""
    page, complaints = browser.new_page(), []
    page.set_default_timeout(1000 * PATIENCE)
    page.on("console", lambda message: complaints.append(message.text))  # refused requests belong to the tests
    page.on("pageerror", lambda error: complaints.append(str(error)))
    yield page
    page.close()
    assert [said for said in complaints if not said.startswith("Failed to load resource")] == []


def visit(page: Page, trace: Trace, folder: Path) -> None:
    """Open the page of a trace as a file."""
    (folder / "run.html").write_text(trace.to_html(), encoding="utf-8")
    page.goto((folder / "run.html").as_uri())
    expect(page.locator("#at")).not_to_be_empty()


def go(page: Page, step: int) -> None:
    """Drag the slider."""
    page.locator("#step").fill(str(step))
    expect(page.locator("#at")).to_have_text(re.compile(f"^step {step} "))


def cells(page: Page, panel: int = 0) -> list[tuple[str, str]]:
    """Text and kind of each column that is shown."""
    spans = page.locator(".canvas").nth(panel).locator("span")
    return [tuple(cell) for cell in spans.evaluate_all("all => all.map((s) => [s.textContent, s.className])")]


def test_the_page_is_small_and_asks_no_host_for_anything() -> None:
    assert len(source().encode()) < 60_000
    assert not re.findall(r"https?:|//[a-z]|<link|@import|url\(|style=|innerHTML|\bon\w+=|eval\(", source())
    assert policy().startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy()


def test_a_trace_within_the_page_ends_nothing_and_says_the_same() -> None:
    html = REVISED.to_html()
    assert html.count("</script>") == source().count("</script>")
    found = re.search(r'id="saved">(.*)</script>', html)
    assert found
    data = json.loads(found[1])
    assert Trace(**{**data, "pieces": {int(k): v for k, v in data["pieces"].items()}}) == REVISED


@chromium
def test_each_step_of_a_saved_trace_is_shown(page: Page, tmp_path: Path) -> None:
    visit(page, REVISED, tmp_path)
    assert page.locator("#at").text_content() == "step 4 of 4"
    assert page.locator(".answer").text_content() == "one two"
    assert [(text, kind.split()[0]) for text, kind in cells(page)] == [
        ("one", "final"), (" two", "final"), (HOSTILE, "final"), ("⏎\n", "final"), (" end", "final")
    ]  # fmt: skip
    go(page, 0)
    assert cells(page) == [("▁", "mask")] * 4
    go(page, 1)
    assert cells(page) == [("one", "final opens"), ("▁", "mask"), (" wrong", "draft"), ("▁", "mask closes")]
    go(page, 2)
    assert cells(page) == [("one", "final opens"), (" two", "final"), (" wrong", "revoked"), ("▁", "mask closes")]
    facts = page.locator(".facts").text_content()
    assert facts == "step 2 of 4 · 2 of 4 columns final · 1.00 tokens a forward · 67 tokens/s · 15.0 ms a forward"
    go(page, 3)
    assert len(cells(page)) == 5
    assert page.locator("figcaption").text_content() == "milliseconds a forward, at most 20.0"


@chromium
def test_text_of_a_model_stays_text(page: Page, tmp_path: Path) -> None:
    hostile = replace(REVISED, sampler=HOSTILE, prompt_text=HOSTILE, text=HOSTILE, cache=HOSTILE)
    visit(page, hostile, tmp_path)
    assert page.locator("img, .panel b").count() == 0
    assert page.locator(".answer").text_content() == HOSTILE
    assert HOSTILE in page.locator("h2").text_content()


@chromium
def test_a_real_decode_is_replayed_to_its_answer(page: Page, tmp_path: Path) -> None:
    scripted = Scripted(peaks([(1, 0.6), (3, 0.9), (1, 0.5), (1, 0.8)], 5))
    out = dllm.generate(scripted, [0], max_new_tokens=4, block_length=4, sampler="confidence", steps=3, trace=True)
    visit(page, out.trace, tmp_path)
    for step in range(out.nfe + 1):
        go(page, step)
        written = dict(pair for pairs in out.trace.commits[:step] for pair in pairs)
        assert [text for text, _ in cells(page)] == [f"{written[c]} " if c in written else "▁" for c in range(1, 5)]
    assert [text for text, _ in cells(page)] == [text for text, _ in out.trace.cells()]


@chromium
def test_given_columns_of_an_infilled_text_have_no_step(page: Page, tmp_path: Path) -> None:
    trace = Trace([1, 9, 2, 9], 9, "confidence", [[[3, 4]], [[1, 3]]], [[1, 4]] * 2, [4, 4], [1, 3, 2, 4], start=1)
    visit(page, trace, tmp_path)
    assert [kind.split()[0] for _, kind in cells(page)] == ["final", "given", "final"]
    go(page, 1)
    assert cells(page) == [("▁", "mask opens"), ("2 ", "given"), ("4 ", "draft closes")]


@chromium
def test_everything_goes_by_keyboard(page: Page, tmp_path: Path) -> None:
    visit(page, REVISED, tmp_path)
    slider, told = page.locator("#step"), page.locator(".token")
    slider.focus()
    page.keyboard.press("ArrowLeft")
    expect(slider).to_have_attribute("aria-valuetext", "step 3 of 4")
    page.locator(".canvas [tabindex='0']").focus()
    assert told.text_content() == "column 1 · final, step 1 · confidence 0.900"
    page.keyboard.press("End")
    page.keyboard.press("ArrowLeft")
    assert told.text_content() == "column 4 · final, step 3 · confidence 0.600"
    assert page.locator(".canvas [tabindex='0']").count() == 1
    page.locator("#numbers").press("Space")
    expect(page.locator(".canvas")).to_have_class("canvas steps")
    page.locator("#speed").select_option("8")
    page.locator("#play").press("Enter")
    expect(page.locator("#at")).to_have_text("step 4 of 4")
    expect(page.locator("#play")).to_have_text("Play")


@chromium
def test_two_saved_traces_stand_side_by_side(page: Page, tmp_path: Path) -> None:
    shorter = replace(REVISED, sampler="klass", commits=REVISED.commits[:1], windows=[[2, 6]], lengths=[6],
                      final=[1, 2, 3, 9, 5, 9], confidence=[], seconds=[])  # fmt: skip
    for name, trace in {"a.json": REVISED, "b.json": shorter}.items():
        trace.save(tmp_path / name)
    (tmp_path / "bad.json").write_text("[1]")
    (tmp_path / "empty.html").write_text(source(), encoding="utf-8")
    page.goto((tmp_path / "empty.html").as_uri())
    page.set_input_files("#file", [tmp_path / "a.json", tmp_path / "b.json"])
    expect(page.locator("h2")).to_have_text(["wino, cache dual", "klass, cache dual"])
    go(page, 3)
    assert len(cells(page, 0)) == 5
    assert [text for text, _ in cells(page, 1)] == ["one", "▁", " wrong", "▁"]
    assert page.locator("figcaption").nth(1).text_content() == "tokens a forward, at most 2"
    with page.expect_download() as download:
        page.locator(".save").first.click()
    download.value.save_as(tmp_path / "again.json")
    assert Trace.load(tmp_path / "again.json") == REVISED
    page.set_input_files("#file", tmp_path / "bad.json")
    expect(page.locator("#said")).to_have_text("bad.json is not a trace written by dllm")


CONTRAST = """() => {
  const pixel = Object.assign(document.createElement("canvas"), {width: 1, height: 1})
  const context = pixel.getContext("2d", {willReadFrequently: true})
  const light = (...colours) => {
    context.clearRect(0, 0, 1, 1)
    for (const colour of colours) { context.fillStyle = colour; context.fillRect(0, 0, 1, 1) }
    const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].map((v) => v / 255)
      .map((v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    return .2126 * r + .7152 * g + .0722 * b
  }
  const paper = getComputedStyle(document.body).backgroundColor
  const texts = [...document.querySelectorAll("body *")].filter((e) => e.checkVisibility() && !e.disabled &&
    [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()) && !["OPTION", "SCRIPT"].includes(e.tagName))
  return texts.map((e) => {
    const style = getComputedStyle(e), behind = light(paper, style.backgroundColor), ink = light(style.color)
    return [(Math.max(behind, ink) + .05) / (Math.min(behind, ink) + .05), e.tagName + "." + e.className]
  })
}"""


@chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_in_any_light_and_at_320_pixels(page: Page, tmp_path: Path, scheme: str) -> None:
    page.set_viewport_size({"width": 320, "height": 640})
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    visit(page, replace(REVISED, sampler="localleap:" + "x" * 80), tmp_path)
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    seen = []
    for step in (1, 2, 4):
        go(page, step)
        seen += page.evaluate(CONTRAST)
    assert {"SPAN.final", "SPAN.draft", "SPAN.revoked"} <= {name for _, name in seen}
    assert [(contrast, name) for contrast, name in seen if contrast < 4.5] == []
    assert page.locator(".canvas span").first.evaluate("e => getComputedStyle(e).transitionDuration") == "0s"


@chromium
def test_a_screen_reader_meets_it_in_order(page: Page, tmp_path: Path) -> None:
    visit(page, REVISED, tmp_path)
    go(page, 2)
    assert page.locator("main").aria_snapshot() == SNAPSHOT.strip()


SNAPSHOT = """
- main:
  - status
  - region "Steps":
    - button "Play"
    - slider "Step": "2"
    - status: step 2 of 4
    - text: Speed
    - combobox "Speed":
      - option "¼ ×"
      - option "½ ×"
      - option "1 ×" [selected]
      - option "2 ×"
      - option "4 ×"
      - option "8 ×"
    - checkbox "Show steps"
    - text: Show steps
  - paragraph: first last · draft behind the final text · ▁ masked · taken back · window
  - region "wino, cache dual":
    - heading "wino, cache dual" [level=2]
    - status
    - paragraph: step 2 of 4 · 2 of 4 columns final · 1.00 tokens a forward · 67 tokens/s · 15.0 ms a forward
    - paragraph: a prompt
    - listbox "Canvas 1":
      - option "one"
      - option "two"
      - option "wrong"
      - option "masked": ▁
    - paragraph
    - paragraph: one two
    - figure "milliseconds a forward, at most 20.0"
    - button "Download trace"
"""


# -- of a server -------------------------------------------------------------------------------------------------------

KEY = "none"  # what the kit's own client sends


@pytest.fixture(scope="module")
def site() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("DLLM_API_KEY", KEY)
        with serving() as site:
            yield site


def ready(page: Page, site: Any, **fields: str) -> None:
    """Open the server's page, and fill the fields of a request."""
    page.goto(site.url)
    expect(page.locator("#said")).to_have_text(re.compile("asks for an API key"))
    expect(page.locator("#run")).to_be_disabled()
    page.locator("#key").fill(KEY)
    page.locator("#key").press("Tab")
    expect(page.locator("#run")).to_be_enabled()
    for name, value in {"prompt": PROMPT, "length": "24", "block": "8", **fields}.items():
        field = page.locator(f"#{name}")
        (field.select_option if name in ("kind", "bound", "cache") else field.fill)(value)


def snippet(page: Page, kind: str) -> str:
    """A request as the page copies it."""
    page.locator(f"#{kind}").click()
    expect(page.locator("#snippet")).to_have_text(re.compile("^curl" if kind == "curl" else "import openai"))
    text = page.locator("#snippet").text_content()
    assert text is not None
    return text


def asked(page: Page) -> dict[str, Any]:
    """The body of the request that the page copies for curl."""
    found: dict[str, Any] = json.loads(shlex.split(snippet(page, "curl").replace("\\\n", ""))[-1])
    return found


@chromium
def test_an_answer_fills_in_and_is_what_the_api_says(page: Page, site: Any, tmp_path: Path, capsys: Any) -> None:
    ready(page, site, sampler="klass:kappa=0.9", rival="confidence", top="2")
    page.locator("#run").click()
    expect(page.locator(".state")).to_have_text(["done", "done"])
    site.client.api_key = KEY
    common = {"model": "tiny", "messages": MESSAGES, "max_tokens": 24, "seed": 0, "temperature": 0}
    for panel, sampler in enumerate(("klass:kappa=0.9", "confidence")):
        extra = {"block_length": 8, "return_trace": True, "sampler": sampler}
        plain = site.client.chat.completions.create(**common, extra_body=extra).choices[0]
        answer, trace = plain.message.content, plain.dllm["trace"]
        assert page.locator(".answer").nth(panel).text_content() == answer
        shown = "".join(text for text, _ in cells(page, panel)).replace("⏎", "")
        assert shown.startswith(answer)
        with page.expect_download() as download:
            page.locator(".save").nth(panel).click()
        download.value.save_as(tmp_path / "run.json")
        saved = Trace.load(tmp_path / "run.json")
        assert (saved.text, saved.commits, saved.sampler) == (answer, trace["commits"], trace["sampler"])
    expect(page.locator("#follow")).to_be_hidden()
    page.locator(".canvas").nth(1).locator("span").first.hover()
    told = re.compile(r"column 1 · final, step \d+ · confidence .* · “Tom” .* · “")
    expect(page.locator(".token").nth(1)).to_have_text(told)
    go(page, 0)
    assert {text for text, _ in cells(page, 1)} == {"▁"}
    exec(snippet(page, "python"), {})
    assert "".join(capsys.readouterr().out).strip() == page.locator(".answer").first.text_content()


@chromium
def test_a_run_can_be_cancelled_and_what_came_of_it_is_a_trace(
    page: Page, site: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ready(page, site, sampler="confidence")
    gate = Gate(monkeypatch, site.backend.model)
    gate.shut(after=5)
    try:
        page.locator("#run").click()
        expect(page.locator("#following")).to_be_visible()
        assert gate.inside.wait(PATIENCE)
        expect(page.locator("#at")).to_have_text("step 5 of 5")
        page.locator("#cancel").click()
        expect(page.locator(".state")).to_have_text("cancelled")
        expect(page.locator("#run")).to_be_enabled()
    finally:
        gate.open.set()
    site.idle()
    with page.expect_download() as download:
        page.locator(".save").click()
    download.value.save_as(tmp_path / "run.json")
    saved = Trace.load(tmp_path / "run.json")
    whole = dllm.generate("tiny", PROMPT, sampler="confidence", max_new_tokens=24, block_length=8, trace=True).trace
    assert whole is not None and len(saved.commits) == 5
    came, first = ([pair for pairs in trace.commits[:5] for pair in pairs] for trace in (saved, whole))
    assert sorted(came) == sorted(first)  # steps may share an event
    ids, size = {column: token for column, token in came}, len(whole.prompt)
    assert saved.final == whole.prompt + [ids.get(column, whole.mask_id) for column in range(size, size + 24)]
    same = ("prompt", "prompt_text", "sampler", "cache", "start", "mask_id")
    assert [getattr(saved, name) for name in same] == [getattr(whole, name) for name in same]
    assert (saved.windows[-1], saved.lengths[-1]) == (whole.windows[4], whole.lengths[4])


@chromium
def test_a_token_of_a_bound_answer_says_how_likely_it_was_there(page: Page, site: Any) -> None:
    ready(page, site, sampler="confidence", bound="regex", rule="[A-C]x")
    page.locator("#run").click()
    expect(page.locator(".state")).to_have_text("done")
    page.locator(".canvas span").nth(1).hover()
    expect(page.locator(".token")).to_have_text(re.compile("confidence 0.* · under the constraint 1.000"))


@chromium
def test_a_refusal_is_text(page: Page, site: Any) -> None:
    ready(page, site, sampler=HOSTILE, prompt=HOSTILE)
    page.locator("#run").click()
    expect(page.locator(".state")).to_have_text(re.compile("img src=x"))
    page.locator("#sampler").fill("confidence:steps=")
    page.locator("#run").click()
    expect(page.locator(".state")).to_have_text(re.compile("steps"))
    assert page.locator("img").count() == 0
    page.locator("#bound").select_option("json_schema")
    page.locator("#rule").fill("{")
    page.locator("#run").click()
    expect(page.locator("#said")).to_have_text(re.compile("^no JSON schema: "))


@chromium
def test_every_field_reaches_the_request_but_the_key(page: Page, site: Any) -> None:
    ready(page, site, seed="7", temperature="0.5", cache="prefix", sampler="klass", prompt="it's")
    common = {"model": "tiny", "max_tokens": 24, "temperature": 0.5, "seed": 7, "cache": "prefix", "block_length": 8,
              "sampler": "klass"}  # fmt: skip
    assert asked(page) == {**common, "messages": [{"role": "user", "content": "it's"}]}
    assert "Bearer $DLLM_API_KEY" in page.locator("#snippet").text_content()
    page.locator("#kind").select_option("text")
    page.locator("#top").fill("3")
    for kind, rule, field in (
        ("regex", "a\\d", {"regex": "a\\d"}),
        ("choices", "one\ntwo\n", {"choices": ["one", "two"]}),
        ("json_schema", '{"type": "null"}', {"constraint": {"json_schema": {"type": "null"}}}),
    ):
        page.locator("#bound").select_option(kind)
        page.locator("#rule").fill(rule)
        assert asked(page) == {**common, "prompt": "it's", "logprobs": 3, **field}
    assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]


@chromium
def test_the_form_can_be_read_at_320_pixels(page: Page, site: Any) -> None:
    page.set_viewport_size({"width": 320, "height": 640})
    ready(page, site, bound="regex", rule="[0-9]{400}")
    snippet(page, "python")
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    assert [seen for seen in page.evaluate(CONTRAST) if seen[0] < 4.5] == []


def test_the_page_may_ask_its_own_server_alone(site: Any) -> None:
    first = httpx2.get(site.url)
    assert (first.status_code, first.headers["Location"]) == (307, "canvas")
    page = httpx2.get(f"{site.url}/canvas")
    assert page.text == source()
    allowed = page.headers["Content-Security-Policy"]
    assert allowed == f"{policy()}; connect-src 'self'; frame-ancestors 'none'"
    assert "/canvas" not in {route.path for route in create_app(site.backend, ServeConfig(canvas=False)).routes}
