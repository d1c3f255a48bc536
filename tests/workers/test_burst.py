"""What engine steps are reported as: all of their time, once, and what newcomers cost apart."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhfuse.timeline import Kind, Span
from rlhfuse.workers.burst import Newcomer, StepMeter

DECODE_S, TOKEN_S = 4e-3, 5e-5


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=40))
def test_every_second_is_reported_once_and_newcomers_apart(
    arrivals: list[tuple[int, bool]],
) -> None:
    """Per step some samples come in, with or without their caches; then some leave."""
    rng = np.random.default_rng(len(arrivals))
    meter, now_s, spans = StepMeter("rank0"), 0.0, list[Span]()
    running: dict[int, int] = {}
    stepped_s, costs = 0.0, dict[Kind, float]()
    for count, cached in arrivals:
        tokens = 0
        for _ in range(count):
            sample_id, length = 1000 + len(running) + int(now_s * 1e6), int(rng.integers(5, 400))
            meter.enters(sample_id, Newcomer(length, cached))
            running[sample_id] = length
            tokens += length
        if not running:
            continue
        stayed = len(running) - count
        took_s = TOKEN_S * tokens + (DECODE_S if stayed else 0.0)
        spans += meter.add(now_s, now_s + took_s, dict(running))
        if count:
            kind = Kind.MIGRATE if cached else Kind.PREFILL
            costs[kind] = costs.get(kind, 0.0) + TOKEN_S * tokens
        now_s += took_s
        stepped_s += took_s
        for sample_id in list(running)[3:]:
            del running[sample_id]
    spans += meter.close()
    assert sum(span.duration_s for span in spans) == pytest.approx(stepped_s)
    for before, after in pairwise(spans):
        assert before.end_s <= after.start_s + 1e-12
    assert not meter.close()


def test_what_newcomers_cost_is_told_from_decoding() -> None:
    """Compared with the steps before; a lone newcomer's step is all its own."""
    meter = StepMeter("rank0")
    meter.enters(1, Newcomer(100, cached=False))
    (alone,) = meter.add(0.0, 100 * TOKEN_S, {1: 101})
    assert (alone.kind, alone.args["tokens"]) == (Kind.PREFILL, 100)
    assert alone.duration_s == pytest.approx(100 * TOKEN_S)
    for step in range(30):
        assert not meter.add(step, step + DECODE_S, {1: 102 + step})
    for cached, kind in ((False, Kind.PREFILL), (True, Kind.MIGRATE)):
        meter.enters(2, Newcomer(300, cached))
        burst, entry = meter.add(40.0, 40.0 + DECODE_S + 300 * TOKEN_S, {1: 140, 2: 301})
        assert (burst.kind, entry.kind) == (Kind.GENERATE, kind)
        assert entry.duration_s == pytest.approx(300 * TOKEN_S)
        assert meter.steps == 1
    meter.enters(3, Newcomer(5, cached=True))
    meter.clear()
    assert not meter.add(50.0, 50.0 + DECODE_S, {3: 9})


def test_near_ties_are_told_with_the_burst_that_they_were_in() -> None:
    meter = StepMeter("rank0")
    meter.enters(1, Newcomer(9, cached=False))
    meter.decided(1, 0.25)  # in a step that was all prefill: told with the next burst
    meter.add(0.0, 1.0, {1: 10})
    for step in range(3):
        meter.decided(step, 0.5 * step)
        meter.add(1.0 + step, 2.0 + step, {1: 11 + step})
    (span,) = meter.close()
    assert (span.args["near_ties"], span.args["exact_s"]) == (4, 1.75)
    meter.add(5.0, 6.0, {1: 14})
    assert "near_ties" not in meter.close()[0].args
