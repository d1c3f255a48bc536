"""Which finished samples need which role, who is at it, and how much a worker gets at a time."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from rlhfuse.cost import CostModel


@dataclass(slots=True)
class ScoreBoard:
    """A (sample, role) pair is missing, pending (may be given out), out (a worker has it) or held
    (done; the result is with a worker). `tokens` counts prompt and response."""

    roles: tuple[str, ...]
    cost: CostModel
    pending: dict[str, dict[int, int]] = field(default_factory=dict)  # role -> sample -> tokens
    pending_s: float = 0.0
    num_pending: int = 0
    out: dict[str, dict[int, int]] = field(default_factory=dict)  # role -> sample -> worker
    held: dict[str, dict[int, int]] = field(default_factory=dict)
    tokens: dict[int, int] = field(default_factory=dict)
    missing: dict[int, int] = field(default_factory=dict)  # sample -> roles not yet held

    def __post_init__(self) -> None:
        for table in (self.pending, self.out, self.held):
            table.update({role: {} for role in self.roles})

    def add(self, sample_id: int, tokens: int) -> None:
        """A finished sample: every role is pending."""
        self.tokens[sample_id] = tokens
        self.missing[sample_id] = len(self.roles)
        for role in self.roles:
            self.pending[role][sample_id] = tokens
            self.pending_s += self.cost.score_token_s[role] * tokens
        self.num_pending += len(self.roles)

    def forget(self, sample_id: int) -> None:
        """The sample was dropped; what is out will be ignored."""
        for role in self.roles:
            if sample_id in self.pending[role]:
                self._take(role, sample_id)
            self.out[role].pop(sample_id, None)
            self.held[role].pop(sample_id, None)

    def take(self, role: str, most_tokens: float) -> tuple[int, ...]:
        """At least one pending sample, latest (so mostly longest) first; marks nothing as out."""
        ids: list[int] = []
        total = 0
        for sample_id in reversed(self.pending[role]):
            tokens = self.pending[role][sample_id]
            if ids and total + tokens > most_tokens:
                break
            ids.append(sample_id)
            total += tokens
        for sample_id in ids:
            self._take(role, sample_id)
        return tuple(ids)

    def give(self, worker: int, role: str, sample_ids: Sequence[int]) -> None:
        for sample_id in sample_ids:
            self.out[role][sample_id] = worker

    def done(self, worker: int, role: str, sample_ids: Sequence[int]) -> list[int]:
        """Record results; returns the samples that now have every role. Strays are ignored."""
        complete = []
        out, held = self.out[role], self.held[role]
        for sample_id in sample_ids:
            if out.get(sample_id) != worker:
                continue
            del out[sample_id]
            held[sample_id] = worker
            self.missing[sample_id] -= 1
            if not self.missing[sample_id]:
                complete.append(sample_id)
        return complete

    def complete(self, sample_id: int) -> bool:
        return not self.missing.get(sample_id, 0)

    def lose(self, worker: int) -> set[int]:
        """What `worker` had or was at is pending again; returns the samples concerned."""
        lost: set[int] = set()
        for role in self.roles:
            for table in (self.out[role], self.held[role]):
                for sample_id in [s for s, w in table.items() if w == worker]:
                    del table[sample_id]
                    self.missing[sample_id] += table is self.held[role]
                    self.pending[role][sample_id] = self.tokens[sample_id]
                    self.pending_s += self.cost.score_token_s[role] * self.tokens[sample_id]
                    self.num_pending += 1
                    lost.add(sample_id)
        return lost

    def best_role(self, last: str) -> str:
        """The role to score next on a worker that has `last` loaded: the same while swaps cost
        anything, else the one with the most pending. Empty: nothing is pending."""
        if self.cost.swap_s > 0 and self.pending.get(last):
            return last
        most = max(((len(self.pending[r]), -i, r) for i, r in enumerate(self.roles)), default=None)
        return most[2] if most is not None and most[0] else ""

    def validate(self, finished: set[int]) -> None:
        """Assert that each finished sample stands in exactly one place per role, others in none."""
        for role in self.roles:
            places = [*self.pending[role], *self.out[role], *self.held[role]]
            assert len(places) == len(set(places)), f"{role}: a sample stands in two places"
            assert set(places) == finished, f"{role}: {set(places) ^ finished}"
        for sample_id in finished:
            missing = sum(sample_id not in self.held[role] for role in self.roles)
            assert not self.roles or self.missing[sample_id] == missing
        assert self.num_pending == sum(map(len, self.pending.values()))

    def _take(self, role: str, sample_id: int) -> None:
        tokens = self.pending[role].pop(sample_id)
        self.pending_s -= self.cost.score_token_s[role] * tokens
        self.num_pending -= 1
        if not self.num_pending:
            self.pending_s = 0.0  # no rounding is left behind


def spread(
    board: ScoreBoard, workers: Sequence[int], token_budget: int
) -> list[tuple[int, str, tuple[int, ...]]]:
    """All that is pending, evenly over `workers` (largest first to the least loaded), in calls of
    at most `token_budget` tokens (or one sample). Takes everything from the board's pending."""
    tasks = [
        (-board.cost.score_token_s[role] * tokens, sample_id, role, tokens)
        for role in board.roles
        for sample_id, tokens in board.pending[role].items()
    ]
    load = dict.fromkeys(workers, 0.0)
    mine: dict[tuple[int, str], list[tuple[int, int]]] = {}
    for negative_s, sample_id, role, tokens in sorted(tasks):
        worker = min(workers, key=lambda w: (load[w], w))
        load[worker] -= negative_s
        mine.setdefault((worker, role), []).append((sample_id, tokens))
    calls = []
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
    board.pending_s, board.num_pending = 0.0, 0
    return calls
