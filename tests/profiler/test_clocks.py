"""Clock alignment: known skews are recovered, and timelines without any stay untouched."""

import random
from dataclasses import replace

import pytest

from bench.profiler_truth import FORWARD_S, disturbed, make
from rlhfuse.profiler.attribution import attribute
from rlhfuse.profiler.clocks import align
from rlhfuse.schedules.ir import Pipeline, Problem
from rlhfuse.schedules.standard import one_f_one_b
from rlhfuse.schedules.timing import simulate
from rlhfuse.timeline import ArgValue, Kind, Span, Timeline


def _truth(ranks: int, mbs: int, latency: float) -> Timeline:
    pipe = Pipeline.make("model", list(range(ranks)), mbs, 0.010, 0.020)
    return simulate(one_f_one_b(Problem(ranks, (pipe,), link_latency=latency)))


def _skewed(timeline: Timeline, skews: dict[str, float]) -> Timeline:
    return Timeline.merged(
        [Timeline(timeline.of_lane(lane)).shifted(skews[lane]) for lane in timeline.lanes]
    )


@pytest.mark.parametrize(("ranks", "mbs"), [(2, 2), (4, 8), (8, 16), (16, 32)])
def test_known_skews_come_back(ranks: int, mbs: int) -> None:
    """To 1 % of a task (here 0.1 ms), and the causes are what they were without any skew."""
    rng = random.Random(ranks)
    truth = _truth(ranks, mbs, latency=0.0005)
    skews = {lane: rng.uniform(-0.2, 0.2) for lane in truth.lanes}
    found = align(_skewed(truth, skews))
    base = skews["rank0"]
    for lane, offset in found.offsets_s.items():
        assert offset == pytest.approx(base - skews[lane], abs=1e-4)
    assert found.notes[0].endswith("0 remain")
    before, after = attribute(truth), attribute(found.timeline)
    assert after.wall_s == pytest.approx(before.wall_s, abs=2e-4)
    for cause, seconds in before.causes.items():
        assert after.causes[cause] == pytest.approx(seconds, abs=0.02 * before.wall_s)


def test_one_clock_stays_untouched() -> None:
    truth = _truth(4, 8, latency=0.0)
    found = align(truth)
    assert found.timeline.timeline() == truth
    assert found.offsets_s == {}
    assert found.notes == ()


@pytest.mark.parametrize(("replicas", "drift"), [(1, 2e-5), (2, 2e-5), (2, 2e-4)])
def test_jitter_drift_and_late_hosts_are_seen_through(replicas: int, drift: float) -> None:
    """Two replicas exchange no messages: their collectives put them on one clock, and, if they
    meet at the step's start and end, tell how the replicas' clocks drift apart."""
    rng = random.Random(5)
    spans: list[Span] = []
    for replica in range(replicas):
        pipe = Pipeline.make(f"m{replica}", [0, 1, 2, 3], 12, 0.010, 0.020)
        weights = [rng.uniform(0.9, 1.1) for _ in range(12)]
        pipe = replace(pipe, microbatch_weights=tuple(weights))
        made = simulate(one_f_one_b(Problem(4, (pipe,), link_latency=5e-4)))
        for span in made.spans:
            lane = f"rank{4 * replica + int(span.lane[4:])}"
            spans.append(Span(lane, span.start_s, span.end_s, span.kind, span.name))
    end = max(span.end_s for span in spans)
    if replicas > 1:
        for rank in range(8):
            args: dict[str, ArgValue] = {"what": "dp_sync", "collective": f"stage {rank % 4}"}
            spans.append(Span(f"rank{rank}", end, end + 0.01, Kind.TRANSFER, "sum", args))
            if drift > 2e-5:
                early: dict[str, ArgValue] = {"what": "dp_sync", "collective": f"first {rank % 4}"}
                spans.append(Span(f"rank{rank}", -0.01, 0.0, Kind.TRANSFER, "gather", early))
    clocks = {
        f"rank{r}": (rng.uniform(-0.2, 0.2), rng.uniform(-drift, drift))
        for r in range(4 * replicas)
    }
    shown = []
    for span in spans:
        offset, rate = clocks[span.lane]
        a, b = (t + offset + rate * t for t in (span.start_s, span.end_s))
        shown.append(Span(span.lane, a, b, span.kind, span.name, span.args))
    found = align(Timeline(tuple(shown)))
    first = found.timeline.begin_s - min(span.start_s for span in spans)
    for span, moved in zip(spans, found.timeline.source, strict=True):
        assert moved.start_s - first == pytest.approx(span.start_s, abs=1e-4)  # 1 % of a task
    before, after = attribute(Timeline(tuple(spans))), attribute(found.timeline)
    for mine, theirs in zip(before.lanes, after.lanes, strict=True):
        for cause, seconds in mine.causes.items():
            assert abs(theirs.causes.get(cause, 0.0) - seconds) < 0.02 * before.wall_s


@pytest.mark.parametrize("seed", range(4))
def test_a_link_with_few_waits_stays_as_its_messages_say(seed: int) -> None:
    """Two stages, two replicas, one slower: most inputs are there before they are needed, and
    tasks that start late for no reason must not pass for messages."""
    rng = random.Random(2020 + seed)
    truth = make(2, 2, 8, rng, gathers=seed % 2 == 1)
    shown, clocks = disturbed(truth, rng)
    found = align(shown)
    for moment in (0.0, truth.wall_s / 2):
        errors = []
        for lane, (offset, rate) in clocks.items():
            reads = moment + offset + rate * moment
            shift = found.offsets_s[lane] + found.drifts[lane] * (reads - shown.start_s)
            errors.append(reads + shift - moment)
        assert max(errors) - min(errors) < 0.01 * FORWARD_S
