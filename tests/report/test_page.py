"""The report: complete, safe with hostile text, and honest about what is missing."""

import json
import random
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rlhfuse.profiler.attribution import attribute
from rlhfuse.report import charts
from rlhfuse.report.lanes import lane_data
from rlhfuse.report.page import write_report
from rlhfuse.timeline import Kind, Span, Timeline, load_chrome, save_chrome

MakeRun = Callable[..., Path]
HOSTILE = (
    '</script></pre><script>window.hacked=1</script><img src=x onerror="hacked=1">\'"&{{x}}@@body@@'
)


class _Page(HTMLParser):
    """Tags, attributes and text of a page, as a browser would see them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.blocks: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        (self.blocks if self.tags and self.tags[-1] == "script" else self.texts).append(data)


def _read(path: Path) -> _Page:
    return _Page(path.read_text())


def test_a_whole_run_is_shown(make_run: MakeRun) -> None:
    folder = make_run()
    path = write_report(folder)
    assert path == folder / "report.html"
    text = " ".join(_read(path).texts)
    for expected in (
        "sentiment / quickstart",
        "0.36 \u2192 0.79",  # first and last validation, from the made-up curve
        "30 steps of PPO",
        "Step 29",
        "Step 30, serial",
        "long tail",
        "Samples, before and after",
        "the garden will thank us",
        "AMD EPYC 9B14",
        "versions.torch",
        "audit_every: 10",
    ):
        assert expected in text, expected
    assert "What this page could not show" not in text
    assert not list(folder.glob("*.part"))


def test_the_page_loads_nothing(make_run: MakeRun) -> None:
    page = _read(write_report(make_run()))
    assert not {"link", "img", "iframe", "object", "embed", "base"} & set(page.tags)
    assert not [value for name, value in page.attributes if name in ("src", "href", "action")]
    assert "default-src 'none'" in str(page.attributes)


def test_hostile_text_stays_text(make_run: MakeRun) -> None:
    clean, folder = make_run(), make_run(prompt=HOSTILE, name="<img src=x onerror=hacked=1>")
    timeline = load_chrome(folder / "timeline" / "step_29.json")
    hostile = Span(HOSTILE, 0, 1, Kind.OTHER, HOSTILE, {HOSTILE: HOSTILE})
    save_chrome(Timeline((*timeline.spans, hostile)), folder / "timeline" / "step_29.json")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for i, row in enumerate(rows):
        row[f"val-core/{HOSTILE}/reward/mean@1"] = i
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    safe, page = _read(write_report(clean)), _read(write_report(folder))
    assert page.tags.count("script") == safe.tags.count("script")
    assert set(page.tags) == set(safe.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    # It is shown for what it is: in the samples, the configuration and the environment.
    shown = "".join(page.texts)
    assert shown.count(HOSTILE) >= 4
    assert shown.count("Where time went") == 1


@pytest.mark.parametrize(
    "gone",
    ["metrics.jsonl", "samples.jsonl", "config.yaml", "environment.json", "timeline/step_29.json"],
)
def test_missing_and_broken_pieces_are_named(make_run: MakeRun, gone: str) -> None:
    folder = make_run()
    whole = _read(write_report(folder)).texts
    broken = random.Random(1).randbytes(100)
    (folder / gone).write_bytes(broken)
    text = "".join(_read(write_report(folder)).texts)
    if gone != "config.yaml":  # any text is shown as the configuration
        assert f"{Path(gone).name}" in text.partition("What this page could not show")[2]
    (folder / gone).unlink()
    if gone == "timeline/step_29.json":
        (folder / "timeline/step_30.json").unlink()
    text = "".join(_read(write_report(folder)).texts)
    notice = "timeline/ holds no step" if "timeline" in gone else f"{gone} is missing"
    assert notice in text.partition("What this page could not show")[2]
    assert notice not in "".join(whole)


def test_an_empty_folder_makes_a_page(tmp_path: Path) -> None:
    text = "".join(_read(write_report(tmp_path)).texts)
    assert "metrics.jsonl is missing" in text
    assert "not known" in text


def test_no_folder_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such run folder"):
        write_report(tmp_path / "nowhere")


def test_drawn_time_is_attributed_time(make_run: MakeRun) -> None:
    """What the legend adds up is what the attribution says: nothing is drawn twice or lost."""
    timeline = load_chrome(make_run(num_ranks=4) / "timeline" / "step_29.json")
    data = lane_data(timeline, "x")
    step = attribute(timeline)
    assert sum(data.style_seconds) == pytest.approx(step.wall_s * len(step.lanes))
    idle = sum(
        s for s, (_, _, idle) in zip(data.style_seconds, data.style_table, strict=True) if idle
    )
    assert idle == pytest.approx(step.idle_fraction * step.wall_s * len(step.lanes))


def test_a_large_timeline_stays_small_enough() -> None:
    spans = [
        Span(
            f"rank{i % 8}", i // 8 * 1e-3, (i // 8 + 0.9) * 1e-3, Kind.GENERATE, f"decode {i % 64}"
        )
        for i in range(80_000)
    ]
    data = lane_data(Timeline(tuple(spans)), "large")
    assert data.offsets[-1] == pytest.approx(160_000, abs=16)
    assert len(data.name_table) == 65
    assert len(data.edges) + len(data.styles) + len(data.names) < 16 * 160_000


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, 7), (0, 1e-9), (1e12, 1e12 + 5), (5, 5)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    ticks = charts.nice_ticks(low, high)
    assert 1 <= len(ticks) <= 7
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)


def test_points_that_are_no_numbers_are_left_out() -> None:
    line = charts.Line("x", "#000", [(1, float("nan")), (2, 1.0), (3, float("inf")), (4, 2.0)])
    drawn = charts.line_chart([line], [], "step", "y")
    assert "nan" not in drawn
    assert "inf" not in drawn
    assert charts.line_chart([charts.Line("x", "#000", [(1, float("nan"))])], [], "", "") == ""


def test_memory_stands_beside_its_plan(make_run: MakeRun) -> None:
    """The most of all steps, and nothing where a run says nothing of it."""
    folder = make_run()
    page = write_report(folder).read_text()
    cells = ["rank 0", "1.5 GiB", "1.2 GiB", "1.25"]
    assert [cell for cell in cells if f">{cell}</td>" not in page] == []
    metrics = folder / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace("memory/rank", "other/rank"))
    assert "against plan" not in write_report(folder).read_text()
