"""The workers as the rollout scheduler knows them: what runs, what comes in, what is scored."""

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from rlhfuse.rollout.policy import Policy
from rlhfuse.sample import Sample, SampleState


@dataclass(slots=True)
class Worker:
    """`running` and `inbound` map sample ids to the tokens reserved for them (to the response
    limit); `calls` are (role, sample ids, predicted seconds), oldest first."""

    alive: bool = True
    asleep: bool = False
    running: dict[int, int] = field(default_factory=dict)
    inbound: dict[int, int] = field(default_factory=dict)
    calls: deque[tuple[str, tuple[int, ...], float]] = field(default_factory=deque)
    last_role: str = ""
    load: int = 0  # tokens reserved
    ahead: int = 0  # tokens that its samples have probably got since they were last reported

    @property
    def busy_s(self) -> float:
        """Predicted scoring that it has been given; half of the call under way is over."""
        if not self.calls:
            return 0.0
        return sum(seconds for _, _, seconds in self.calls) - 0.5 * self.calls[0][2]

    @property
    def free(self) -> bool:
        return self.alive and not self.running and not self.inbound


class Fleet:
    """All workers. A sample that moves is on its source's `running` and in `inbound` of its
    destination until it has left."""

    def __init__(self, instances: int, policy: Policy) -> None:
        self.workers = [Worker() for _ in range(instances)]
        self._policy = policy
        self._destination: dict[int, int] = {}
        self.num_alive = instances
        # Free workers by the number of scoring calls they have; those with enough are in none.
        self._ready: list[dict[int, None]] = [{} for _ in range(policy.score_ahead)]
        self._slot: list[int] = [-1] * instances
        for instance in range(instances):
            self._note(instance)

    @property
    def num_inbound(self) -> int:
        return len(self._destination)

    def _note(self, instance: int) -> None:
        """File the worker by what it can take; to be called after every change."""
        worker = self.workers[instance]
        slot = len(worker.calls) if worker.free else -1
        slot = slot if slot < len(self._ready) else -1
        if slot != self._slot[instance]:
            if self._slot[instance] >= 0:
                del self._ready[self._slot[instance]][instance]
            if slot >= 0:
                self._ready[slot][instance] = None
            self._slot[instance] = slot

    def has_room(self, instance: int, sample: Sample) -> bool:
        """Whether the sample fits to its very end, whatever its length."""
        worker, policy = self.workers[instance], self._policy
        if len(worker.running) + len(worker.inbound) >= policy.max_running:
            return False
        if not policy.cache_tokens or not worker.load:
            return True
        return worker.load + self._reserve(sample) <= policy.cache_tokens

    def _reserve(self, sample: Sample) -> int:
        return sample.prompt_tokens + self._policy.max_response_tokens

    def place(self, sample: Sample) -> None:
        """The sample runs on `sample.instance`."""
        assert sample.instance is not None
        worker = self.workers[sample.instance]
        worker.running[sample.id] = self._reserve(sample)
        worker.load += worker.running[sample.id]
        self._note(sample.instance)

    def send(self, sample: Sample, destination: int) -> None:
        """The sample has been told to leave for `destination`."""
        worker = self.workers[destination]
        worker.inbound[sample.id] = self._reserve(sample)
        worker.load += worker.inbound[sample.id]
        self._destination[sample.id] = destination
        self._note(destination)

    def remove(self, sample: Sample) -> int | None:
        """Forget where the sample runs and is going to; returns where it was going."""
        if sample.instance is not None and sample.state is not SampleState.QUEUED:
            self._pop(sample.instance, self.workers[sample.instance].running, sample.id)
        destination = self._destination.pop(sample.id, None)
        if destination is not None:
            self._pop(destination, self.workers[destination].inbound, sample.id)
        return destination

    def _pop(self, instance: int, table: dict[int, int], sample_id: int) -> None:
        worker = self.workers[instance]
        worker.load -= table.pop(sample_id, 0)
        if not table:
            self._note(instance)

    def grew(self, instance: int, tokens: int) -> None:
        """A sample there got `tokens` since its last report: so did its neighbours, which are
        stepped together."""
        worker = self.workers[instance]
        worker.ahead = max(worker.ahead, tokens)

    def lose(self, instance: int) -> list[int]:
        """The worker is gone; returns the samples that ran there. Samples on their way to it go
        on at their source until they leave."""
        worker = self.workers[instance]
        worker.alive = False
        worker.calls.clear()
        worker.last_role = ""
        self.num_alive -= 1
        self._note(instance)
        return list(worker.running)

    def revive(self, instance: int) -> None:
        worker = self.workers[instance]
        if not worker.alive:
            worker.alive, worker.asleep = True, False
            self.num_alive += 1
            self._note(instance)

    def scorers(self) -> list[int]:
        """First workers of the blocks that are all alive."""
        block = self._policy.block
        firsts = range(0, len(self.workers), block)
        return [f for f in firsts if all(w.alive for w in self.workers[f : f + block])]

    def next_scorer(self) -> int | None:
        """The free scorer that has the fewest calls, or None: all are busy or have enough."""
        if self._policy.block == 1:
            return next((next(iter(ready)) for ready in self._ready if ready), None)
        block = self._policy.block
        able = [
            (len(self.workers[first].calls), first)
            for first in range(0, len(self.workers), block)
            if all(w.free for w in self.workers[first : first + block])
        ]
        calls, first = min(able, default=(0, None))
        return first if calls < self._policy.score_ahead else None

    def call(self, worker: int, role: str, sample_ids: tuple[int, ...], seconds: float) -> None:
        self.workers[worker].calls.append((role, sample_ids, seconds))
        self.workers[worker].last_role = role
        self._note(worker)

    def answered(self, worker: int, role: str, sample_ids: Sequence[int]) -> None:
        calls = self.workers[worker].calls
        for call in calls:
            if call[0] == role and call[1] == tuple(sample_ids):
                calls.remove(call)
                self._note(worker)
                return

    def outstanding(self) -> list[str]:
        """What is waited for, worker by worker, for people."""
        parts = []
        for i, worker in enumerate(self.workers):
            if not worker.alive:
                parts.append(f"instance {i} lost")
            for word, ids in (("generating", worker.running), ("coming in", worker.inbound)):
                if ids:
                    parts.append(f"instance {i}: {len(ids)} {word} ({shown(ids)})")
            parts += [f"worker {i}: {role} scores of {shown(ids)}" for role, ids, _ in worker.calls]
        return parts

    def validate(self, samples: Mapping[int, Sample]) -> None:
        """Assert that workers and samples tell the same story."""
        placed = {(s, i) for i, w in enumerate(self.workers) for s in w.running}
        told = {
            (s.id, s.instance)
            for s in samples.values()
            if s.state in (SampleState.RUNNING, SampleState.MOVING)
        }
        assert placed == told, f"{sorted(placed ^ told, key=str)}"
        moving = {s.id for s in samples.values() if s.state is SampleState.MOVING}
        assert moving == set(self._destination), "moving samples and their destinations"
        assert self.num_alive == sum(w.alive for w in self.workers)
        for i, worker in enumerate(self.workers):
            assert worker.load == sum(worker.running.values()) + sum(worker.inbound.values())
            ready = worker.free and len(worker.calls) < self._policy.score_ahead
            assert [i in r for r in self._ready].count(True) == ready, f"worker {i}: {ready=}"
            assert not ready or i in self._ready[len(worker.calls)]
            assert worker.alive or not (worker.running or worker.calls), f"worker {i} is lost"
            assert len(worker.running) <= self._policy.max_running, f"worker {i} is overfull"


def shown(ids: Collection[int]) -> str:
    """A few of the sample ids, for people."""
    more = f" and {len(ids) - 6} more" if len(ids) > 6 else ""
    return "samples " + ", ".join(map(str, sorted(ids)[:6])) + more
