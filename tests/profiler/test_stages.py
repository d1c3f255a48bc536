"""Generation and scoring arranged otherwise: arithmetic that is checked by hand and by search."""

import random

import numpy as np
import pytest

from rlhfuse.profiler.stages import EARLY, MOVED, SERIAL, Rollout, rollout_of, stage_what_ifs
from rlhfuse.profiler.table import SpanTable
from rlhfuse.timeline import Kind, Span, Timeline


def _step(*rows: tuple[int, float, float, Kind]) -> SpanTable:
    return SpanTable.of(Timeline(tuple(Span(f"rank{r}", a, b, k, k) for r, a, b, k in rows)))


def test_a_serial_step_gains_by_scoring_early() -> None:
    table = _step(
        (0, 0, 4, Kind.GENERATE),
        (1, 0, 10, Kind.GENERATE),
        (0, 10, 13, Kind.SCORE),
        (1, 10, 11, Kind.SCORE),
        (0, 13, 20, Kind.OPTIMIZER),
    )
    found = {what.name: what.makespan_s for what in stage_what_ifs(table, table.wall_s)}
    # Lane 0 scores from 4 to 7, lane 1 from 10 to 11; shared, lane 0 does all of it by 8.
    assert found == {EARLY: pytest.approx(20 - 2), MOVED: pytest.approx(20 - 3)}


def test_a_fused_step_is_held_against_a_serial_one() -> None:
    table = _step(
        (0, 0, 4, Kind.GENERATE),
        (0, 4, 7, Kind.SCORE),
        (1, 0, 10, Kind.GENERATE),
        (1, 10, 11, Kind.SCORE),
    )
    (what,) = stage_what_ifs(table, table.wall_s)
    assert what.name == SERIAL
    assert what.makespan_s == pytest.approx(13)


def test_steps_without_both_stages_have_nothing_to_say() -> None:
    assert rollout_of(_step((0, 0, 1, Kind.GENERATE))) is None
    assert stage_what_ifs(_step((0, 0, 1, Kind.F)), 1.0) == []


def test_shared_scoring_ends_when_no_work_is_left() -> None:
    """The water level is right: up to it all lanes' free time is just the work there is."""
    rng = random.Random(4)
    for _ in range(200):
        lanes = rng.randrange(1, 9)
        free = np.array([rng.uniform(0, 10) for _ in range(lanes)])
        work = np.array([rng.uniform(0, 5) for _ in range(lanes)])
        rollout = Rollout(free, work, 99.0, fused=False)
        level = rollout.moved_s()
        room = np.maximum(0, level - free).sum()
        assert room >= work.sum() - 1e-9
        if level > rollout.last_s:
            assert room == pytest.approx(work.sum())
        assert level <= rollout.early_s() + 1e-9
        assert rollout.early_s() <= rollout.serial_s() + 1e-9
