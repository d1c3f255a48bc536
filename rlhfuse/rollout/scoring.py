"""Which finished samples need which role, who is at it, and how much a worker gets at a time."""

import heapq
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from rlhfuse.cost import CostModel
from rlhfuse.rollout.ready import Ready

Call = tuple[int, str, tuple[int, ...]]  # worker, role, sample ids
_Part = tuple[str, tuple[int, ...]]  # role, sample ids


@dataclass(slots=True)
class ScoreBoard:
    """A (sample, role) pair is missing, pending (may be given out), out (a worker has it) or held
    (done; the result is with a worker). Out and held are kept call by call, as they were given: a
    million samples are then some ten thousand entries. `tokens` counts prompt and response.
    `spared`: samples that a role need not score."""

    roles: tuple[str, ...]
    cost: CostModel
    spared: Mapping[str, Collection[int]] = field(default_factory=dict)  # samples, by role
    pending: dict[str, list[int]] = field(default_factory=dict)  # role -> samples
    pending_tokens: dict[str, int] = field(default_factory=dict)
    num_pending: int = 0
    out: dict[int, list[_Part]] = field(default_factory=dict)  # worker -> calls
    held: dict[int, list[_Part]] = field(default_factory=dict)  # worker -> calls
    tokens: dict[int, int] = field(default_factory=dict)
    missing: dict[int, int] = field(default_factory=dict)  # sample -> roles not yet held
    forgotten: set[int] = field(default_factory=set)  # what calls say of them is ignored

    def __post_init__(self) -> None:
        self.pending.update({role: [] for role in self.roles})
        self.pending_tokens = dict.fromkeys(self.roles, 0)

    @property
    def pending_s(self) -> float:
        """Scoring that nobody has been given, in worker seconds."""
        rate = self.cost.score_token_s
        return sum(rate[role] * tokens for role, tokens in self.pending_tokens.items())

    def add(self, sample_ids: Sequence[int], tokens: Sequence[int]) -> Sequence[int]:
        """Finished samples: every role that they need is pending. Returns those that need none."""
        self.tokens.update(zip(sample_ids, tokens, strict=True))
        if not self.spared:
            self.missing.update(dict.fromkeys(sample_ids, len(self.roles)))
            total = sum(tokens)
            for role in self.roles:
                self.pending[role].extend(sample_ids)
                self.pending_tokens[role] += total
            self.num_pending += len(self.roles) * len(sample_ids)
            return () if self.roles else sample_ids
        for sample_id, number in zip(sample_ids, tokens, strict=True):
            roles = self.needed(sample_id)
            self.missing[sample_id] = len(roles)
            for role in roles:
                self.pending[role].append(sample_id)
                self.pending_tokens[role] += number
            self.num_pending += len(roles)
        return [sample_id for sample_id in sample_ids if not self.missing[sample_id]]

    def needed(self, sample_id: int) -> tuple[str, ...]:
        """The roles that score this sample."""
        if not self.spared:
            return self.roles
        return tuple(r for r in self.roles if sample_id not in self.spared.get(r, ()))

    def forget(self, sample_id: int) -> None:
        """The sample was dropped or is done with; what is out will be ignored."""
        self.forgotten.add(sample_id)
        if not self.missing.get(sample_id):
            return
        for role in self.roles:
            if sample_id in self.pending[role]:
                self.pending[role].remove(sample_id)
                self.pending_tokens[role] -= self.tokens[sample_id]
                self.num_pending -= 1

    def take(self, role: str, most_tokens: float) -> tuple[tuple[int, ...], int]:
        """At least one pending sample, latest (so mostly longest) first, and the tokens of all
        that are taken; marks nothing as out."""
        pending = self.pending[role]
        total = first = 0
        for tokens in map(self.tokens.__getitem__, reversed(pending)):
            more = total + tokens
            if first and more > most_tokens:
                break
            total = more
            first -= 1
        ids = pending[first:][::-1]
        del pending[first:]
        self.pending_tokens[role] -= total
        self.num_pending -= len(ids)
        return tuple(ids), total

    def give(self, worker: int, role: str, sample_ids: tuple[int, ...]) -> None:
        self.out.setdefault(worker, []).append((role, sample_ids))

    def done(self, worker: int, role: str, sample_ids: tuple[int, ...]) -> list[int]:
        """Record results; returns the samples that now have every role. Strays are ignored."""
        call = (role, sample_ids)
        out = self.out.get(worker, [])
        if call not in out:
            return []
        out.remove(call)
        self.held.setdefault(worker, []).append(call)
        complete = []
        missing, forgotten = self.missing, self.forgotten
        for sample_id in sample_ids:
            if forgotten and sample_id in forgotten:
                continue
            left = missing[sample_id] - 1
            missing[sample_id] = left
            if not left:
                complete.append(sample_id)
        return complete

    def complete(self, sample_id: int) -> bool:
        return not (self.roles and self.missing.get(sample_id, 0))

    def lose(self, worker: int) -> set[int]:
        """What `worker` had or was at is pending again; returns the samples concerned."""
        lost: set[int] = set()
        for table in (self.out, self.held):
            for role, sample_ids in table.pop(worker, ()):
                for sample_id in sample_ids:
                    if sample_id in self.forgotten:
                        continue
                    self.missing[sample_id] += table is self.held
                    self.pending[role].append(sample_id)
                    self.pending_tokens[role] += self.tokens[sample_id]
                    self.num_pending += 1
                    lost.add(sample_id)
        return lost

    def validate(self, finished: set[int]) -> None:
        """Assert that each finished sample stands in exactly one place for every role that it
        needs, and others in none."""
        held = {role: self._of(self.held, role) for role in self.roles}
        for role in self.roles:
            places = [*self.pending[role], *self._of(self.out, role), *held[role]]
            assert len(places) == len(set(places)), f"{role}: a sample stands in two places"
            needing = finished - set(self.spared.get(role, ()))
            assert set(places) == needing, f"{role}: {set(places) ^ needing}"
            tokens = sum(self.tokens[sample_id] for sample_id in self.pending[role])
            assert self.pending_tokens[role] == tokens
        for sample_id in finished:
            missing = sum(sample_id not in held[role] for role in self.needed(sample_id))
            assert not self.roles or self.missing[sample_id] == missing
        assert self.num_pending == sum(map(len, self.pending.values()))

    def _of(self, table: dict[int, list[_Part]], role: str) -> list[int]:
        calls = (ids for parts in table.values() for named, ids in parts if named == role)
        return [s for ids in calls for s in ids if s not in self.forgotten]


def spared_cost(
    cost: CostModel, samples: Collection[int], spared: Mapping[str, Collection[int]]
) -> CostModel:
    """Costs with which to predict the scoring of samples that are still to come: of a role that
    scores but some of them, as much less on each."""
    if not samples or not spared:
        return cost
    rates = dict(cost.score_token_s)
    for role, ids in spared.items():
        rates[role] *= 1 - sum(sample_id in ids for sample_id in samples) / len(samples)
    return replace(cost, score_token_s=rates)


def place_call(
    waiting_s: dict[str, float], ready: Ready, swap_s: float, ahead: int
) -> tuple[int, str] | None:
    """The next (worker, role) to call: a role goes where its model is loaded; it is loaded on
    one more worker where nobody has it, or where those who have it would take longer than the
    swap. `waiting_s`: pending seconds of each role that has any."""
    roles = sorted(waiting_s, key=lambda role: (-waiting_s[role], role))
    for calls in range(ahead):
        if swap_s > 0:
            for role in roles:
                worker = ready.holder(role, calls)
                if worker is not None:
                    return worker, role
        worker = ready.any(calls, roles if swap_s > 0 else ())
        if worker is None:
            continue
        for role in roles:
            holders = ready.num_holding(role)
            if swap_s == 0 or not holders or waiting_s[role] > swap_s * holders:
                return worker, role
    return None


def spread(board: ScoreBoard, workers: Sequence[int], token_budget: int) -> list[Call]:
    """All that is pending, evenly over `workers`, in calls of at most `token_budget` tokens (or
    one sample): the serial baseline. Takes everything from the board's pending.

    Where models must be swapped, samples stay in the order of their roles and each worker gets
    one stretch of equal seconds, so that it loads few; else largest first to the least loaded.
    """
    rates = board.cost.score_token_s
    tasks = [
        (-rates[role] * board.tokens[sample_id], sample_id, role, board.tokens[sample_id])
        for role in board.roles
        for sample_id in board.pending[role]
    ]
    mine: dict[tuple[int, str], list[tuple[int, int]]] = {}
    if board.cost.swap_s > 0:
        _stretches(tasks, workers, mine)
    else:
        _largest_first(tasks, workers, mine)
    calls: list[Call] = []
    for (worker, role), samples in sorted(mine.items()):
        call: list[int] = []
        total = 0
        for sample_id, tokens in samples:
            if call and total + tokens > token_budget:
                calls.append((worker, role, tuple(call)))
                call, total = [], 0
            call.append(sample_id)
            total += tokens
        calls.append((worker, role, tuple(call)))
    for role in board.roles:
        board.pending[role].clear()
        board.pending_tokens[role] = 0
    board.num_pending = 0
    return calls


_Task = tuple[float, int, str, int]
_Mine = dict[tuple[int, str], list[tuple[int, int]]]


def _stretches(tasks: Sequence[_Task], workers: Sequence[int], mine: _Mine) -> None:
    total = -sum(task[0] for task in tasks) or 1.0
    passed = 0.0
    for negative_s, sample_id, role, tokens in tasks:
        middle = passed - 0.5 * negative_s
        worker = workers[min(int(middle / total * len(workers)), len(workers) - 1)]
        passed -= negative_s
        mine.setdefault((worker, role), []).append((sample_id, tokens))


def _largest_first(tasks: Sequence[_Task], workers: Sequence[int], mine: _Mine) -> None:
    heap = [(0.0, worker) for worker in sorted(workers)]
    for negative_s, sample_id, role, tokens in sorted(tasks):
        load, worker = heap[0]
        heapq.heapreplace(heap, (load - negative_s, worker))
        mine.setdefault((worker, role), []).append((sample_id, tokens))
