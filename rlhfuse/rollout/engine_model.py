"""One simulated worker: an engine that steps its samples together, and a scorer, one at a time."""

from bisect import insort
from collections import deque
from dataclasses import dataclass, field
from math import inf


@dataclass(slots=True)
class EngineModel:
    """`steps` counts engine steps (fractions included) and only grows; a sample is complete when
    it reaches its own `due`. `context` is the sum of tokens held. `table`: step seconds by batch,
    at this worker's speed; beyond it `beyond_s` more per sample."""

    table: list[float]
    beyond_s: float
    context_s: float
    slow: float = 1.0
    alive: bool = True
    steps: float = 0.0
    at_s: float = 0.0  # `steps` and `context` are of this moment
    context: float = 0.0
    running: dict[int, float] = field(default_factory=dict)  # sample -> due
    # (-due, -sample), ascending: the next to complete is last. May hold samples that left.
    due: list[tuple[float, int]] = field(default_factory=list)
    calls: deque[tuple[str, tuple[int, ...]]] = field(default_factory=deque)
    role: str = ""  # the model loaded for scoring
    blocked_s: float = 0.0  # the engine stands still until then
    link_s: float = 0.0  # its link is busy until then
    version: int = 0  # completions planned before are void
    planned_s: float = inf  # when the completion that is not void is looked for
    epoch: int = 0  # calls and departures from before a loss are void
    prefixes: set[int] = field(default_factory=set)  # groups whose prompt is in the cache
    last: tuple[float, float, int, float] = (0.0, 0.0, 0, 0.0)  # start, steps, batch, context

    def step_s(self, steps: float) -> float:
        """Mean seconds per step over the next `steps` steps."""
        batch = len(self.running)
        if batch < len(self.table):
            base = self.table[batch]
        else:
            base = self.table[-1] + self.beyond_s * (batch - len(self.table) + 1)
        if self.context_s:
            base += self.context_s * (self.context + 0.5 * steps * batch)
        return base

    def catch_up(self, now_s: float) -> bool:
        """Bring `steps` to the present; whether any were made (then `last` tells of them)."""
        start_s = self.at_s if self.at_s > self.blocked_s else self.blocked_s
        batch = len(self.running)
        self.at_s = now_s
        if not batch or now_s <= start_s:
            return False
        elapsed = now_s - start_s
        first = self.step_s(0.0)
        if self.context_s:
            # Exact: elapsed = base x + context_s (context x + batch x^2 / 2), solved for x.
            square = self.context_s * batch
            steps = 2.0 * elapsed / (first + (first * first + 2.0 * square * elapsed) ** 0.5)
        else:
            steps = elapsed / first
        self.last = (start_s, steps, batch, self.context + 0.5 * steps * batch)
        self.steps += steps
        self.context += steps * batch
        return True

    def next_completion_s(self, now_s: float) -> float | None:
        """When the next sample is complete, if nothing changes; called at `at_s` = `now_s`."""
        due, running = self.due, self.running
        while due and running.get(-due[-1][1]) != -due[-1][0]:
            due.pop()
        if not due:
            return None
        steps = -due[-1][0] - self.steps
        steps = steps if steps > 0.0 else 0.0
        start_s = now_s if now_s > self.blocked_s else self.blocked_s
        return start_s + steps * self.step_s(steps)

    def pop_completed(self) -> list[int]:
        """Samples that have reached their due; they run no more."""
        completed = []
        due, running = self.due, self.running
        reached = -(self.steps + 1e-6)
        while due and due[-1][0] >= reached:
            at, number = due.pop()
            if running.get(-number) == -at:
                del running[-number]
                completed.append(-number)
        return completed

    def add(self, sample_id: int, tokens_to_come: float, held: float) -> None:
        due = self.steps + tokens_to_come
        self.running[sample_id] = due
        insort(self.due, (-due, -sample_id))
        self.context += held

    def block(self, now_s: float, seconds: float) -> float:
        """The worker does something that holds its engine up; returns when it starts."""
        start_s = now_s if now_s > self.blocked_s else self.blocked_s
        self.blocked_s = start_s + seconds * self.slow
        return start_s

    def lose(self) -> None:
        """The worker is gone, with all it held."""
        self.alive = False
        self.running.clear()
        self.due.clear()
        self.calls.clear()
        self.prefixes.clear()
        self.context, self.role = 0.0, ""
        self.version += 1
        self.planned_s = inf
        self.epoch += 1
