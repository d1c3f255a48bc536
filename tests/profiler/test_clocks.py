"""Clock alignment: known skews are recovered, and timelines without any stay untouched."""

import random

import pytest

from rlhfuse.profiler.attribution import attribute
from rlhfuse.profiler.clocks import align
from rlhfuse.schedules.ir import Pipeline, Problem
from rlhfuse.schedules.standard import one_f_one_b
from rlhfuse.schedules.timing import simulate
from rlhfuse.timeline import Timeline


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
