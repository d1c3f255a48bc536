"""When to weigh whether the tail should move, by which rule, and the orders that follow."""

from collections.abc import Mapping, Sequence
from math import ceil, inf

import numpy as np

from rlhfuse.cost import CostModel
from rlhfuse.rollout import events as ev
from rlhfuse.rollout.fleet import Fleet
from rlhfuse.rollout.lengths import LengthModel
from rlhfuse.rollout.migration import Frame, Move, decide
from rlhfuse.rollout.opening import opening_blocks
from rlhfuse.rollout.paper import best_threshold, decide_by_threshold, decide_forced
from rlhfuse.rollout.policy import Migration, Policy
from rlhfuse.rollout.snapshot import Books, Tail, snapshot, takes_cache
from rlhfuse.sample import Sample, SampleState

LOOK_AGAIN = 0.05  # part of the running samples that must finish before the tail is weighed again
NOT_BEFORE_S = 0.03  # a weighing costs the controller about a millisecond
ALMOST = 1.0 - 1e-9  # sums of times are rounded
LOOK_AGAIN_S = 0.2  # or this much time must pass, or the same part of the time since the start


class TailWatch:
    """One iteration's decisions to move. Weighs again only when enough has changed."""

    def __init__(
        self,
        books: Books,
        cost: CostModel,
        policy: Policy,
        lengths: LengthModel,
        roles: tuple[str, ...],
    ) -> None:
        table = cost.step_table(max(64, min(policy.max_running, books.num_samples, 4096)))
        self._frame = Frame(lengths, cost, policy, roles, books.groups.train, table)
        self._books, self._policy = books, policy
        self._weighed = (0, float("-inf"))  # samples generating, time
        self._few, self._next_s = 0.0, 0.0  # weigh again with so few samples, or from then on
        self._moved_s = float("-inf")
        self._start_s: float | None = None
        self._threshold: float | None = None  # the paper's, until it is passed
        self._passed = 0  # orders carried out (or passed over)

    def opening(self, samples: Sequence[Sample], out: list[ev.Command]) -> int:
        """The number of instances that samples are first dispatched to."""
        workers = self._books.fleet.workers
        size, policy = self._policy.block, self._policy
        if policy.migration is not Migration.AUTO or not samples:
            return len(workers)
        prompt = sum(s.prompt_tokens for s in samples) / len(samples)
        blocks = len(workers) // size
        number, gain_s = opening_blocks(len(samples), blocks, prompt, self._frame)
        if number >= blocks:
            return len(workers)
        text = f"{number} of {blocks} {_word(size)} begin, the rest score: {gain_s:.3f} s sooner"
        out.append(ev.Decision(text, gain_s))
        return number * size

    def due(self, now_s: float, num_generating: int) -> bool:
        """Whether to weigh now. At least two workers, no move under way, enough changed."""
        count, weighed_s = self._weighed
        if self._few < num_generating <= count and now_s < self._next_s:
            return False
        policy, fleet = self._policy, self._books.fleet
        soon = policy.migration is Migration.AUTO and now_s - weighed_s < NOT_BEFORE_S
        if soon and num_generating <= count:
            return False
        if policy.migration is Migration.OFF or fleet.num_inbound or fleet.num_alive < 2:
            return False
        if now_s - self._moved_s < policy.hysteresis_s:
            return False
        self._start_s = now_s if self._start_s is None else self._start_s
        part = LOOK_AGAIN if num_generating < 1000 else 2 * LOOK_AGAIN
        self._few = num_generating / (1.0 + part)
        self._next_s = now_s + max(LOOK_AGAIN_S, LOOK_AGAIN * (now_s - self._start_s))
        self._weighed = (num_generating, now_s)
        return True

    def quiet(self, now_s: float, num_generating: int) -> tuple[int, float]:
        """(how many, until when): `due` says no while no more samples finish before then."""
        policy, fleet = self._policy, self._books.fleet
        if policy.migration is Migration.OFF or fleet.num_inbound or fleet.num_alive < 2:
            return num_generating, inf
        count, weighed_s = self._weighed
        if num_generating > count:
            return 0, inf
        soon_s = weighed_s + NOT_BEFORE_S if policy.migration is Migration.AUTO else -inf
        pause_s = max(soon_s, self._moved_s + policy.hysteresis_s) * ALMOST
        if now_s < pause_s:
            return num_generating, pause_s
        return max(0, ceil(num_generating - self._few) - 1), self._next_s

    def weigh(self) -> tuple[Tail, Move] | None:
        """The move to make now, for the tail as it is."""
        num, now_s = self._weighed
        if self._policy.migration is Migration.FORCED and not self._ordered(num):
            return None
        tail = snapshot(self._books, self._policy, now_s)
        match self._policy.migration:
            case Migration.PAPER:
                move = self._by_threshold(tail)
            case Migration.FORCED:
                move = self._forced(tail)
            case _:
                move = decide(tail, self._frame)
        if move is None:
            return None
        self._moved_s = now_s
        return tail, move

    def _by_threshold(self, tail: Tail) -> Move | None:
        if self._threshold is None:
            self._threshold = self._policy.paper_threshold or best_threshold(
                tail.num_samples, len(tail.alive), float(tail.prompts.mean()), self._frame
            )
        move = decide_by_threshold(tail, self._threshold, self._frame)
        if move is not None:
            self._threshold = 0.0  # one move an iteration
        return move

    def _ordered(self, num_generating: int) -> bool:
        forced = self._policy.forced
        return self._passed < len(forced) and num_generating <= forced[self._passed][0]

    def _forced(self, tail: Tail) -> Move | None:
        _, number = self._policy.forced[self._passed]
        self._passed += 1
        return decide_forced(tail, number, self._frame)


def _word(block: int) -> str:
    return "blocks" if block > 1 else "instances"


def carry_out(
    tail: Tail,
    move: Move,
    samples: Mapping[int, Sample],
    fleet: Fleet,
    cost: CostModel,
    policy: Policy,
) -> list[ev.Command]:
    """The move as commands; its samples are MOVING from here on, each by the cheaper of taking
    its cache along and being prefilled again."""
    out: list[ev.Command] = [ev.Decision(move.text, move.gain_s)]
    orders: dict[tuple[int, int, bool], list[int]] = {}
    moved = np.flatnonzero(np.asarray(move.destinations) != tail.home).tolist()
    ids, homes = tail.sample_ids.tolist(), tail.home.tolist()
    takes = takes_cache(tail.prompts + tail.tokens, cost, policy)
    for j in moved:
        sample, source, destination = samples[ids[j]], homes[j], move.destinations[j]
        assert source == sample.instance
        orders.setdefault((source, destination, bool(takes[j])), []).append(sample.id)
        sample.move(SampleState.MOVING)
        fleet.send(sample, destination)
    for (source, destination, cached), ids in sorted(orders.items()):
        out += wake(fleet, destination)
        out.append(ev.Migrate(source, destination, tuple(ids), cached))
    return out


def wake(fleet: Fleet, instance: int) -> list[ev.Command]:
    """Samples come to an instance: its engine must be awake."""
    if not fleet.workers[instance].asleep:
        return []
    fleet.workers[instance].asleep = False
    return [ev.Wake(instance)]
