"""Laws of attribution: nothing lost, nothing twice, and known causes found."""

import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rlhfuse.profiler.attribution import StepAttribution, attribute, segments_by_lane
from rlhfuse.profiler.causes import IDLE, MOVEMENT, WORK, Cause
from rlhfuse.profiler.rounds import find_rounds
from rlhfuse.timeline import Kind, Span, Timeline


def _span(lane: int, start: float, end: float, kind: Kind, name: str = "", **args: str) -> Span:
    return Span(f"rank{lane}", start, end, kind, name or kind.value, dict(args))


def _causes(step: StepAttribution, lane: int) -> dict[Cause, float]:
    found = next(x for x in step.lanes if x.lane == f"rank{lane}")
    return {cause: round(seconds, 9) for cause, seconds in found.causes.items()}


@st.composite
def timelines(draw: st.DrawFn) -> Timeline:
    names = st.sampled_from(["actor:0F0", "actor:1B0", "critic:1F1", "critic:0W1", "x", "decode"])
    spans = draw(
        st.lists(
            st.builds(
                lambda lane, start, length, kind, name, what: Span(
                    lane, start / 8, (start + length) / 8, kind, name, {"what": what}
                ),
                st.sampled_from(["rank0", "rank1", "rank2", "controller"]),
                st.integers(0, 80),
                st.integers(0, 40),
                st.sampled_from(list(Kind)),
                names,
                st.sampled_from(["", "reward", "weights", "barrier"]),
            ),
            min_size=1,
            max_size=30,
        )
    )
    return Timeline(tuple(spans))


@settings(max_examples=200, deadline=None)
@given(timelines())
def test_causes_add_up_to_the_wall_time(timeline: Timeline) -> None:
    step = attribute(timeline)
    for lane in step.lanes:
        assert sum(lane.causes.values()) == lane.wall_s == step.wall_s  # exactly, in any order
        assert sum(reversed(lane.causes.values())) == lane.wall_s
        assert math.isclose(lane.wall_s, timeline.wall_s, rel_tol=1e-12)
        assert all(seconds > 0 for seconds in lane.causes.values())
    metrics = step.metrics()
    total = sum(value for name, value in metrics.items() if name.startswith("bubble/"))
    assert total == metrics["perf/device_s"]


@settings(max_examples=100, deadline=None)
@example([(0.0, 2.225073858507e-311)])
@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e3)), min_size=1, max_size=20))
def test_sums_are_exact_at_any_times(times: list[tuple[float, float]]) -> None:
    spans = [
        Span(f"rank{i % 5}", start, start + length, list(Kind)[i % len(Kind)], f"a:{i % 2}F{i}")
        for i, (start, length) in enumerate(times)
    ]
    step = attribute(Timeline(tuple(spans)))
    assert all(sum(lane.causes.values()) == lane.wall_s for lane in step.lanes)
    assert sum(step.causes.values()) == step.wall_s * len(step.lanes)


@settings(max_examples=100, deadline=None)
@given(timelines())
def test_segments_touch_and_cover_the_window(timeline: Timeline) -> None:
    for segments in segments_by_lane(timeline).values():
        reach = timeline.start_s
        for segment in segments:
            assert segment.start_s == reach
            assert segment.end_s > segment.start_s
            reach = segment.end_s
        assert reach == pytest.approx(timeline.end_s)


@settings(max_examples=100, deadline=None)
@given(timelines())
def test_a_lane_is_idle_exactly_where_no_span_covers_it(timeline: Timeline) -> None:
    busy = timeline.of_kinds([k for k in Kind if k not in (Kind.WAIT, Kind.OTHER)])
    step = attribute(busy)
    for lane in step.lanes:
        idle_s = sum(lane.causes.get(cause, 0) for cause in IDLE)
        assert lane.wall_s - idle_s == pytest.approx(busy.busy_s(lane.lane))


@settings(max_examples=50, deadline=None)
@given(timelines(), st.integers(-1000, 1000))
def test_moving_the_clock_changes_nothing(timeline: Timeline, offset: int) -> None:
    assert attribute(timeline.shifted(offset)).lanes == attribute(timeline).lanes


def test_every_cause_is_of_one_category() -> None:
    assert sorted(WORK + MOVEMENT + IDLE) == sorted(Cause)
    assert len(set(WORK + MOVEMENT + IDLE)) == len(Cause)


def test_long_tail_and_early_scoring() -> None:
    """Fused: lane 0 scored what there was, then had to wait for lane 1's long samples."""
    step = attribute(
        Timeline(
            (
                _span(0, 0, 4, Kind.GENERATE),
                _span(0, 4, 6, Kind.SCORE),
                _span(0, 10, 11, Kind.SCORE),
                _span(1, 0, 10, Kind.GENERATE),
                _span(1, 10, 11, Kind.SCORE),
            )
        )
    )
    assert _causes(step, 0) == {Cause.GENERATE: 4, Cause.SCORE: 3, Cause.LONG_TAIL: 4}
    assert _causes(step, 1) == {Cause.GENERATE: 10, Cause.SCORE: 1}


def test_barrier_hides_scoring_that_was_ready() -> None:
    """Serial: 3 s of scoring were held back; only the rest of the tail is the tail's fault."""
    step = attribute(
        Timeline(
            (
                _span(0, 0, 4, Kind.GENERATE),
                _span(0, 10, 13, Kind.SCORE),
                _span(1, 0, 10, Kind.GENERATE),
                _span(1, 10, 12, Kind.SCORE),
            )
        )
    )
    assert _causes(step, 0) == {
        Cause.GENERATE: 4,
        Cause.STAGE_WAIT: 3,
        Cause.LONG_TAIL: 3,
        Cause.SCORE: 3,
    }
    assert _causes(step, 1) == {Cause.GENERATE: 10, Cause.SCORE: 2, Cause.STAGE_WAIT: 1}


def test_stages_outside_training_are_told_apart() -> None:
    spans = (
        _span(0, 0, 1, Kind.GENERATE),
        _span(1, 0, 0.5, Kind.GENERATE),
        _span(1, 0.75, 1, Kind.GENERATE),
        Span("rewards", 1, 3, Kind.REWARD, "compute_score"),
        _span(0, 4, 5, Kind.OPTIMIZER),
        _span(0, 5, 6, Kind.WEIGHTS),
        _span(0, 6, 7, Kind.CHECKPOINT),
        _span(1, 6.5, 7, Kind.WAIT, what="weights"),
    )
    step = attribute(Timeline(spans))
    assert [lane.lane for lane in step.lanes] == ["rank0", "rank1"]
    assert _causes(step, 1) == {
        Cause.GENERATE: 0.75,
        Cause.HOST_GAP: 0.25,
        Cause.REWARD_WAIT: 2,
        Cause.CONTROLLER: 1,
        Cause.STAGE_WAIT: 1,
        Cause.WEIGHT_SYNC: 1.5,
        Cause.CHECKPOINT_WAIT: 0.5,
    }


def test_one_f_one_b_by_hand() -> None:
    """Two ranks, two micro-batches, F 1 s, B 2 s, each message 0.25 s late at rank 1."""
    spans = (
        _span(0, 0, 1, Kind.F, "a:0F0"),
        _span(0, 1, 2, Kind.F, "a:0F1"),
        _span(1, 1.25, 2.25, Kind.F, "a:1F0"),
        _span(1, 2.25, 4.25, Kind.B, "a:1B0"),
        _span(1, 4.25, 5.25, Kind.F, "a:1F1"),
        _span(0, 2.0, 4.5, Kind.WAIT, "recv", peer="rank1"),
        _span(0, 4.5, 6.5, Kind.B, "a:0B0"),
        _span(1, 5.25, 7.25, Kind.B, "a:1B1"),
        _span(0, 7.5, 9.5, Kind.B, "a:0B1"),
    )
    step = attribute(Timeline(spans))
    assert _causes(step, 0) == {
        Cause.FORWARD: 2,
        Cause.BACKWARD: 4,
        Cause.DOWNSTREAM: 2.25 + 0.75,
        Cause.TRANSFER: 0.25,  # inside a recorded wait, after the peer had finished
        Cause.HOST_GAP: 0.25,  # the same without one: we cannot blame the wire
    }
    assert _causes(step, 1) == {
        Cause.FORWARD: 2,
        Cause.BACKWARD: 4,
        Cause.WARM_UP: 1,
        Cause.HOST_GAP: 0.25,
        Cause.COOL_DOWN: 2.25,
    }


def test_serial_models_are_two_rounds_and_fused_models_one() -> None:
    serial = (
        _span(0, 0, 1, Kind.F, "actor:0F0"),
        _span(1, 1, 2, Kind.F, "actor:1F0"),
        _span(1, 2, 4, Kind.B, "actor:1B0"),
        _span(0, 4, 6, Kind.B, "actor:0B0"),
        _span(1, 6, 7, Kind.F, "critic:0F0"),
        _span(0, 7, 8, Kind.F, "critic:1F0"),
        _span(0, 8, 10, Kind.B, "critic:1B0"),
        _span(1, 10, 12, Kind.B, "critic:0B0"),
    )
    step = attribute(Timeline(serial))
    assert _causes(step, 1)[Cause.COOL_DOWN] == 2
    assert _causes(step, 0)[Cause.WARM_UP] == 1
    # The same work with the critic running backwards through the actor's bubbles.
    fused = (
        _span(0, 0, 1, Kind.F, "actor:0F0"),
        _span(1, 0, 1, Kind.F, "critic:0F0"),
        _span(0, 1, 2, Kind.F, "critic:1F0"),
        _span(1, 1, 2, Kind.F, "actor:1F0"),
        _span(0, 2, 4, Kind.B, "critic:1B0"),
        _span(1, 2, 4, Kind.B, "actor:1B0"),
        _span(0, 4, 6, Kind.B, "actor:0B0"),
        _span(1, 4, 6, Kind.B, "critic:0B0"),
    )
    assert attribute(Timeline(fused)).bubble_fraction == 0
    assert step.bubble_fraction == pytest.approx(0.5)


def test_only_exposed_transfers_count() -> None:
    step = attribute(Timeline((_span(0, 0, 4, Kind.TRANSFER), _span(0, 1, 3, Kind.F, "a:0F0"))))
    assert _causes(step, 0) == {Cause.TRANSFER: 2, Cause.FORWARD: 2}


def test_an_empty_timeline_is_no_time() -> None:
    step = attribute(Timeline(()))
    assert step.lanes == ()
    assert step.wall_s == step.bubble_fraction == step.idle_fraction == 0


def test_rounds_that_are_named_stay_apart() -> None:
    """Rank 0 begins the second round while rank 1 still works on the first."""
    spans = tuple(
        Span(f"rank{rank}", start, start + 2, Kind.F, f"a:{rank}F0", {"round": number})
        for rank, number, start in ((0, 1, 0), (1, 1, 2), (0, 2, 2.5), (1, 2, 4.5))
    )
    step = attribute(Timeline(spans))
    assert len(find_rounds(spans)) == 2
    assert _causes(step, 0)[Cause.COOL_DOWN] == 2.5  # 0.5 of the first round, 2 of the second
    assert _causes(step, 1) == {Cause.FORWARD: 4, Cause.WARM_UP: 2.5}
