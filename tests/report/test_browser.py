"""The report in a real browser: draws, zooms, and runs nothing that a text says."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import pytest

from rlhfuse.profiler.arrays import Floats
from rlhfuse.profiler.readers.detect import open_trace
from rlhfuse.profiler.summary import summarize
from rlhfuse.profiler.table import KIND_CODE, SpanTable
from rlhfuse.report.page import write_report
from rlhfuse.report.profile_page import render_profile
from rlhfuse.timeline import Kind, Span, Timeline, load_chrome, save_chrome

pytestmark = pytest.mark.browser
MakeRun = Callable[..., Path]
HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=1'>"


class Browser(Protocol):
    errors: list[str]

    def call(self, method: str, session: str | None = None, **params: object) -> object: ...
    def open(self, page: Path) -> None: ...
    def evaluate(self, expression: str) -> object: ...


def _window(browser: Browser, view: int = 0) -> tuple[float, float]:
    browser.evaluate("new Promise(f => requestAnimationFrame(() => requestAnimationFrame(f)))")
    text = browser.evaluate(f"document.querySelectorAll('.timeline')[{view}].dataset.window")
    start, end = str(text).split()
    return float(start), float(end)


def _painted(browser: Browser, x: float, lane: int, color: str) -> bool:
    """Whether `color` is on the canvas near a share of the drawn width, in a lane's middle.

    A few pixels are looked at (a piece's edge is lighter), with some room for blending.
    """
    pixels = browser.evaluate(
        f"""(() => {{
          const v = rlhfuseViews[0], r = v.ratio;
          const px = Math.round((92 + {x} * (v.width - 92)) * r);
          const py = Math.round((v.top({lane}) + v.rowHeight / 2) * r);
          return [...v.canvas.getContext("2d").getImageData(px, py, 8, 1).data];
        }})()"""
    )
    assert isinstance(pixels, list)
    wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    found = [pixels[i : i + 3] for i in range(0, len(pixels), 4)]
    return any(max(abs(a - b) for a, b in zip(f, wanted, strict=True)) <= 4 for f in found)


def test_draws_and_zooms(browser: Browser, make_run: MakeRun) -> None:
    browser.open(write_report(make_run()))
    assert browser.errors == []
    whole = _window(browser)
    assert whole[0] == 0
    assert whole[1] > 4
    assert _painted(browser, 0.1, 0, "#0072b2")  # decode steps
    assert not _painted(browser, 0.1, 0, "#d55e00")
    box = browser.evaluate(
        "(() => { const b = rlhfuseViews[0].canvas.getBoundingClientRect();"
        " return [b.left, b.top, b.width]; })()"
    )
    assert isinstance(box, list)
    x, y = box[0] + 92 + (box[2] - 92) / 2, box[1] + 40

    def mouse(kind: str, **more: float | str) -> None:
        browser.call("Input.dispatchMouseEvent", None, type=kind, x=x, y=y, **more)

    mouse("mousePressed", button="left", clickCount=1)
    mouse("mouseReleased", button="left", clickCount=1)
    mouse("mouseWheel", deltaX=0, deltaY=-120)
    zoomed = _window(browser)
    assert zoomed[1] - zoomed[0] < 0.9 * (whole[1] - whole[0])
    middle = (whole[0] + whole[1]) / 2  # the pointer's moment stays where it is
    assert (zoomed[0] + zoomed[1]) / 2 == pytest.approx(middle, rel=0.01)
    browser.call("Input.dispatchKeyEvent", type="keyDown", key="ArrowRight")
    panned = _window(browser)
    assert panned[0] > zoomed[0]
    assert panned[1] - panned[0] == pytest.approx(zoomed[1] - zoomed[0])
    mouse("mouseMoved")
    assert "rank0" in str(browser.evaluate("document.querySelector('.tip').textContent"))
    browser.evaluate("document.querySelector('[data-act=all]').click()")
    assert _window(browser) == whole
    assert browser.errors == []


def test_the_legend_holds_one_sort_up(browser: Browser, make_run: MakeRun) -> None:
    browser.open(write_report(make_run()))
    first = "document.querySelector('.legend button')"
    browser.evaluate(f"{first}.click()")
    assert browser.evaluate(f"{first}.getAttribute('aria-pressed')") == "true"
    assert browser.evaluate("rlhfuseViews[0].pick >= 0") is True
    browser.evaluate(f"{first}.click()")
    assert browser.evaluate("rlhfuseViews[0].pick") == -1


def test_hostile_text_runs_nothing(browser: Browser, make_run: MakeRun) -> None:
    folder = make_run(prompt=HOSTILE, name="<img src=x onerror=hacked=1>")
    timeline = load_chrome(folder / "timeline" / "step_29.json")
    spans = (*timeline.spans, Span(HOSTILE, 0, 5, Kind.OTHER, HOSTILE, {"x": HOSTILE}))
    save_chrome(Timeline(spans), folder / "timeline" / "step_29.json")
    browser.open(write_report(folder))
    time.sleep(0.2)  # an image would have failed to load by now
    assert browser.evaluate("window.hacked === undefined") is True
    assert browser.evaluate("document.images.length") == 0
    assert browser.errors == []
    assert browser.evaluate(f"rlhfuseViews[0].data.lanes.includes({HOSTILE!r})") is True


@pytest.mark.slow
def test_a_million_spans_are_drawn_fast(browser: Browser, tmp_path: Path) -> None:
    count, lanes = 1_000_000, 8
    lane = np.arange(count) % lanes
    start: Floats = np.arange(count) // lanes * np.float64(1e-3)
    kind = np.full(count, KIND_CODE[Kind.GENERATE], dtype=np.int8)
    names = np.zeros(count, dtype=np.int64)
    table = SpanTable.build(
        tuple(f"rank{i}" for i in range(lanes)), ("decode",), lane, start, start + 9e-4, kind, names
    )
    page = tmp_path / "profile.html"
    page.write_text(render_profile(summarize("made up", [1], 1, table), table, "a million"))
    browser.open(page)
    assert browser.errors == []
    assert browser.evaluate("rlhfuseViews[0].data.offsets[8]") == pytest.approx(2e6, abs=16)
    median_ms = browser.evaluate(
        """(() => { const v = rlhfuseViews[0], times = [];
          for (let i = 0; i < 9; i++) {
            v.from = i * 0.1; v.to = v.span / (1 << i); const t = performance.now(); v.paint();
            times.push(performance.now() - t);
          }
          return times.sort((a, b) => a - b)[4]; })()"""
    )
    assert isinstance(median_ms, int | float)
    # About 20 on a quiet core without a graphics card; drawing every span would take minutes.
    assert median_ms < 3000


def test_a_profile_page_draws(browser: Browser, tmp_path: Path) -> None:
    data = Path(__file__).parents[1] / "profiler/data/primus_pp8"
    trace = open_trace([data])
    spans = SpanTable.of(trace.load(2).timeline).spans()
    hostile = Timeline((*spans, Span(HOSTILE, 0, 1, Kind.OTHER, HOSTILE)))
    summary = summarize(HOSTILE, trace.steps, 2, hostile, warnings=[HOSTILE])
    page = tmp_path / "profile.html"
    page.write_text(render_profile(summary, hostile, HOSTILE))
    browser.open(page)
    assert browser.errors == []
    assert browser.evaluate("window.hacked === undefined && document.images.length === 0") is True
    begin, end = _window(browser)
    assert end - begin == pytest.approx(hostile.wall_s, rel=1e-3)
    assert _painted(browser, 0.005, 0, "#f0b73f")  # rank 0 begins with a forward pass
    # Every message is an arrow: 16 micro-batches over 7 links, both ways.
    assert browser.evaluate("rlhfuseViews[0].arrowsDrawn") == 2 * 7 * 16
    browser.evaluate("rlhfuseViews[0].set(0, 0.2)")
    _window(browser)
    some = browser.evaluate("rlhfuseViews[0].arrowsDrawn")
    assert isinstance(some, int)
    assert 0 < some < 20
