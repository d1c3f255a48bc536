"""Standard schedules against the bubble and memory formulas of their papers, and torch's orders."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.pipelining.schedules import (
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
    _Action,
)

from rlhfuse.schedules.bidirectional import chimera, dualpipe
from rlhfuse.schedules.checks import peak_memory
from rlhfuse.schedules.interleaved import chunked, interleaved
from rlhfuse.schedules.ir import Pipeline, Problem, Schedule
from rlhfuse.schedules.summary import standard_policies
from rlhfuse.schedules.timing import check_channels, makespan, simulate
from rlhfuse.schedules.zero_bubble import zb_v


def _one(p: int, m: int, unit: float = 1.0) -> Problem:
    return Problem(p, (Pipeline.make("model", range(p), m, unit, 2 * unit, weight=unit),))


def _two(p: int, m: int, backward: float) -> Problem:
    return Problem(
        p,
        (
            Pipeline.make("actor", range(p), m, 1, backward, weight=backward / 2),
            Pipeline.make("critic", range(p - 1, -1, -1), m, 1, backward, weight=backward / 2),
        ),
    )


def _legal(schedule: Schedule) -> Schedule:
    schedule.validate()
    check_channels(schedule)
    return schedule


@pytest.mark.parametrize("v", [2, 4])
@pytest.mark.parametrize(("p", "m"), [(1, 3), (2, 4), (4, 8), (4, 16), (8, 16), (16, 32)])
def test_interleaved_formula(p: int, m: int, v: int) -> None:
    """Bubble (p-1)(F+B)/v; p + (p-1)/v micro-batches on the first rank."""
    schedule = _legal(interleaved(_one(p, m), v))
    assert makespan(schedule) == pytest.approx(3 * m + 3 * (p - 1) / v)
    assert max(peak_memory(schedule)) == pytest.approx(p + (p - 1) / v)


@pytest.mark.parametrize(("p", "m"), [(1, 2), (2, 4), (4, 8), (8, 16), (16, 32)])
def test_zb_v_formula(p: int, m: int) -> None:
    """No pause between a rank's first and last task; p micro-batches on every rank."""
    schedule = _legal(zb_v(_one(p, m, unit=2.0)))
    assert makespan(schedule) == 6 * m + p - 1
    assert peak_memory(schedule) == (p,) * p
    timeline = simulate(schedule)
    for lane in timeline.lanes:
        spans = timeline.of_lane(lane)
        assert spans[-1].end_s - spans[0].start_s == pytest.approx(timeline.busy_s(lane))


@pytest.mark.parametrize("units", [1, 2, 3])
@pytest.mark.parametrize("p", [2, 4, 8, 16])
def test_chimera_formula(p: int, units: int) -> None:
    """Bubble fraction (p-2)/(2n+p-2) with n micro-batches in all, F = B; p/2+1 to p held."""
    schedule = _legal(chimera(_two(p, units * p // 2, backward=1)))
    n = units * p
    assert 1 - 2 * n / makespan(schedule) == pytest.approx((p - 2) / (2 * n + p - 2))
    peaks = peak_memory(schedule)
    assert (min(peaks), max(peaks)) == (p / 2 + 1, p)


@pytest.mark.parametrize("p", [2, 4, 8, 16])
def test_chimera_unit_with_long_backwards(p: int) -> None:
    """Bubble fraction (p-2)/(3n/2+p-2) where B = 2F."""
    schedule = _legal(chimera(_two(p, p // 2, backward=2)))
    assert 1 - 3 * p / makespan(schedule) == pytest.approx((p - 2) / (1.5 * p + p - 2))


@pytest.mark.parametrize("more", [0, 1, 8])
@pytest.mark.parametrize("p", [2, 4, 8, 16])
def test_dualpipe_formula(p: int, more: int) -> None:
    """Bubble at most (p/2-1)(F+2B-3W); p + 1 micro-batches held, both models together."""
    schedule = _legal(dualpipe(_two(p, p + more, backward=2)))
    bubble = makespan(schedule) - 6 * (p + more)
    assert 0 <= bubble <= (p / 2 - 1) * (1 + 2 * 2 - 3)
    assert max(peak_memory(schedule)) == p + 1


def _torch_rows(
    kind: type[ScheduleInterleaved1F1B] | type[ScheduleZBVZeroBubble], p: int, m: int, v: int
) -> list[list[str]]:
    """The orders that torch's own generator gives, without starting a process group."""
    bare: Any = SimpleNamespace(
        pp_group_size=p,
        num_stages=p * v,
        n_local_stages=v,
        _n_microbatches=m,
        number_of_rounds=max(1, m // p),
        microbatches_per_round=m // max(1, m // p),
    )
    rows: list[Sequence[_Action | None]] = [
        kind._calculate_single_rank_operations(bare, rank) for rank in range(p)
    ]
    return [[str(action) for action in row if action is not None] for row in rows]


def _plain_rows(schedule: Schedule) -> list[list[str]]:
    return [[str(task).split(":")[1] for task in row] for row in schedule.rows]


@pytest.mark.parametrize(("p", "m"), [(2, 4), (4, 4), (4, 12), (8, 16)])
def test_orders_are_those_of_torch(p: int, m: int) -> None:
    assert _plain_rows(zb_v(_one(p, m))) == _torch_rows(ScheduleZBVZeroBubble, p, m, 2)
    for v in (2, 4):
        ours = _plain_rows(interleaved(_one(p, m), v))
        assert ours == _torch_rows(ScheduleInterleaved1F1B, p, m, v)


def test_chunks_keep_each_ranks_work_and_memory() -> None:
    pipe = Pipeline.make("a", [2, 0, 1], 6, [1, 2, 3], [2, 4, 7], weight=1, activation=[3, 1, 2])
    problem = Problem(3, (pipe,))
    for chunks, fold in ((2, False), (2, True), (3, False)):
        cut = chunked(problem, chunks, fold=fold).pipelines[0]
        for field in ("forward", "backward", "weight", "activation"):
            per_rank: dict[int, float] = {}
            for rank, value in zip(cut.stages, getattr(cut, field), strict=True):
                per_rank[rank] = per_rank.get(rank, 0.0) + value
            assert per_rank == pytest.approx(
                dict(zip(pipe.stages, getattr(pipe, field), strict=True))
            )


def test_what_a_policy_cannot_do_is_said() -> None:
    with pytest.raises(ValueError, match=r"6 micro-batches, not a multiple .* take 4 or 8"):
        interleaved(_one(4, 6))
    with pytest.raises(ValueError, match="over the memory cap of 4"):
        interleaved(Problem(4, _one(4, 8).pipelines, memory_cap=4.0))
    with pytest.raises(ValueError, match="reversed"):
        dualpipe(Problem(2, (_one(2, 4).pipelines[0], Pipeline.make("b", [0, 1], 4, 1, 2))))
    with pytest.raises(ValueError, match="at least as many as ranks"):
        dualpipe(_two(4, 2, backward=2))
    folded = Pipeline.make("a", [0, 1, 1, 0], 4, 1, 2, interleaved=True)
    with pytest.raises(ValueError, match="loop"):
        interleaved(Problem(2, (folded,)))
    assert zb_v(Problem(2, (folded,))).problem.pipelines == (folded,)


def test_policies_are_legal_on_uneven_models_and_blocks() -> None:
    """Three models, one of them in two copies and one forward-only; uneven stages; links."""
    problem = Problem(
        4,
        (
            Pipeline.make("actor", range(4), 8, [1, 2, 2, 3], [2, 4, 4, 7], weight=1),
            Pipeline.make("critic0", [1, 0], 4, 1, 2, weight=1, release=5.0),
            Pipeline.make("critic1", [3, 2], 4, 1, 2),
            Pipeline.make("reference", range(4), 8, 1, 0),
        ),
        link_latency=0.25,
    )
    for policy in standard_policies():
        if policy.name != "dualpipe":
            _legal(policy.make(problem))
