"""Who hangs is found by who waits for whom; notes are of what lasts, and of nothing else."""

import threading
import time

import pytest
from torch._C._distributed_c10d import HashStore

from rlhfuse.schedules.ir import Op, Task
from rlhfuse.training.failure import Lookout, Note, Position, last_of
from rlhfuse.training.links import Channel, Flow, Message, Step


def step(index: int) -> Step:
    return Step(index, Task("actor", Op.F, 1, index), None, None)


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
    store, position = HashStore(), Position(rank=5, row=1, rank_of=lambda row: 10 * row + 5)
    message = Message(Channel(2, 1, "actor", Flow.ACTIVATION), 1, 2)

    def noted() -> Note | None:
        return Note.read(store, 5)

    def until(expected: Note | None) -> None:
        limit = time.monotonic() + 20.0
        while noted() != expected:
            assert time.monotonic() < limit, f"{noted()}, expected {expected}"
            time.sleep(0.01)

    with Lookout(store, position, period_s=0.05) as lookout:
        assert noted() is None
        lookout.step = step(1)
        until(Note(index=1, awaits=-1))
        lookout.step, lookout.awaits = step(2), message
        until(Note(index=2, awaits=25))
        limit, index = time.monotonic() + 20.0, 3
        while noted() is not None:  # nothing lasts
            assert time.monotonic() < limit
            lookout.step = step(index)
            index += 1
            time.sleep(0.001)
        lookout.step = step(0)
        until(Note(index=0, awaits=25))
    until(None)
    with lookout:  # what a run before was at is over
        time.sleep(0.2)
        assert noted() is None


class SlowStore(HashStore):
    """Holds up who writes, until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.go_on = threading.Event(), threading.Event()

    def set(self, key: str, value: str) -> None:
        self.asked.set()
        assert self.go_on.wait(20.0)
        super().set(key, value)


def test_a_store_that_does_not_answer_holds_up_no_run_and_leaves_no_thread_behind() -> None:
    store = SlowStore()
    lookout = Lookout(store, Position(5, 1, lambda row: row), period_s=0.05)
    with lookout:
        lookout.step = step(1)
        assert store.asked.wait(20.0)
    with lookout:  # the first one's thread is still held up
        assert threads() == 2
        store.go_on.set()
        limit = time.monotonic() + 20.0
        while threads() > 1:
            assert time.monotonic() < limit, "the first one's thread goes on"
            time.sleep(0.01)


def threads() -> int:
    return sum(thread.name == "lookout" for thread in threading.enumerate())
