"""Who hangs is found by who waits for whom; notes are of what lasts, and of nothing else."""

import time

import pytest
from torch._C._distributed_c10d import HashStore

from rlhfuse.schedules.ir import Op, Task
from rlhfuse.training.failure import Lookout, Note, Seat, last_of
from rlhfuse.training.links import Channel, Flow, Message, Step

STEPS = [Step(index, Task("actor", Op.F, 1, index), None, None) for index in range(3)]


@pytest.mark.parametrize(
    ("waits_for", "hangs"),
    [
        ({}, 1),  # rank 1, asked first, has noted nothing
        ({1: -1}, 1),  # it computes
        ({1: 2, 2: 3, 3: -1}, 3),
        ({1: 2, 2: 3}, 3),
        ({1: 2, 2: 3, 3: 1}, 3),  # a circle, which the channel check excludes
        ({1: 1}, 1),
    ],
)
def test_the_one_who_hangs_is_the_last_of_those_who_wait(
    waits_for: dict[int, int], hangs: int
) -> None:
    notes = {rank: Note(0, awaited) for rank, awaited in waits_for.items()}
    assert last_of(notes.get, 1) == (hangs, notes.get(hangs))


def test_what_lasts_is_noted_until_it_is_over() -> None:
    store, seat = HashStore(), Seat(rank=5, row=1, rank_of=lambda row: 10 * row + 5)
    message = Message(Channel(2, 1, "actor", Flow.ACTIVATION), 1, 2)

    def noted() -> Note | None:
        return Note.read(store, 5)

    def until(expected: Note | None) -> None:
        limit = time.monotonic() + 20.0
        while noted() != expected:
            assert time.monotonic() < limit, f"{noted()}, expected {expected}"
            time.sleep(0.01)

    with Lookout(store, seat, period_s=0.05) as lookout:
        assert noted() is None
        lookout.step = STEPS[1]
        until(Note(index=1, awaits=-1))
        lookout.step, lookout.awaits = STEPS[2], message
        until(Note(index=2, awaits=25))
        for index in range(40):  # nothing lasts
            lookout.step = STEPS[index % 2]
            time.sleep(0.01)
        until(None)
        lookout.step = STEPS[0]
        until(Note(index=0, awaits=25))
    until(None)
    with lookout:  # what a run before was at is over
        time.sleep(0.2)
        assert noted() is None
