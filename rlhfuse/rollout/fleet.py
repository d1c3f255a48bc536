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
        self._free = dict.fromkeys(range(instances))  # ordered set of workers that may be free

    @property
    def num_inbound(self) -> int:
        return len(self._destination)

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
        self._free.pop(sample.instance, None)

    def send(self, sample: Sample, destination: int) -> None:
        """The sample has been told to leave for `destination`."""
        worker = self.workers[destination]
        worker.inbound[sample.id] = self._reserve(sample)
        worker.load += worker.inbound[sample.id]
        self._destination[sample.id] = destination
        self._free.pop(destination, None)

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
        if worker.free:
            self._free[instance] = None

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
        self._free.pop(instance, None)
        return list(worker.running)

    def revive(self, instance: int) -> None:
        worker = self.workers[instance]
        if not worker.alive:
            worker.alive, worker.asleep = True, False
            self.num_alive += 1
            if worker.free:
                self._free[instance] = None

    def leaders(self, *, free_only: bool) -> list[int]:
        """First workers of the blocks that are all alive (and all free)."""
        block = self._policy.block
        if block == 1:
            if free_only:
                return list(self._free)
            return [i for i, w in enumerate(self.workers) if w.alive]
        firsts = range(0, len(self.workers), block)
        return [
            first
            for first in firsts
            if all(w.free if free_only else w.alive for w in self.workers[first : first + block])
        ]

    def call(self, worker: int, role: str, sample_ids: tuple[int, ...], seconds: float) -> None:
        self.workers[worker].calls.append((role, sample_ids, seconds))
        self.workers[worker].last_role = role

    def answered(self, worker: int, role: str, sample_ids: Sequence[int]) -> None:
        calls = self.workers[worker].calls
        for call in calls:
            if call[0] == role and call[1] == tuple(sample_ids):
                calls.remove(call)
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
            assert worker.free == (i in self._free), f"worker {i}: {worker.free=}"
            assert worker.alive or not (worker.running or worker.calls), f"worker {i} is lost"
            assert len(worker.running) <= self._policy.max_running, f"worker {i} is overfull"


def shown(ids: Collection[int]) -> str:
    """A few of the sample ids, for people."""
    more = f" and {len(ids) - 6} more" if len(ids) > 6 else ""
    return "samples " + ", ".join(map(str, sorted(ids)[:6])) + more
