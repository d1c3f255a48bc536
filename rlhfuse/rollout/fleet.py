"""The workers as the rollout scheduler knows them: what runs, what comes in, what is scored."""

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from rlhfuse.cost import CostModel
from rlhfuse.rollout.policy import Policy
from rlhfuse.rollout.ready import Ready
from rlhfuse.rollout.running import Running
from rlhfuse.sample import Sample, SampleState

LEAST_STEPS = 16  # a stretch is measured once it is so long
LEARNED_STEPS = 64  # after so many, half of what was believed before counts


@dataclass(slots=True)
class Worker:
    """`running` maps sample ids to the tokens that they were expected to get when they came,
    `inbound` to the tokens reserved for them (to the response limit); `calls` are (role, sample
    ids, predicted seconds), oldest first. `steps`: engine steps done, since any moment;
    `slowness`: seconds of a step over what was predicted."""

    alive: bool = True
    can_score: bool = True
    asleep: bool = False
    running: dict[int, float] = field(default_factory=dict)
    inbound: dict[int, int] = field(default_factory=dict)
    calls: deque[tuple[str, tuple[int, ...], float]] = field(default_factory=deque)
    last_role: str = ""
    load: int = 0  # tokens reserved
    expected: float = 0.0  # tokens that its samples will still get, as expected when they came
    steps: float = 0.0
    heard_s: float = 0.0  # `steps` are of this moment
    unsure: set[int] = field(default_factory=set)  # samples that came while others were stepped
    held: float = 0.0  # prompt tokens less offsets, summed over its samples
    slowness: float = 1.0
    watched_s: float = -1.0  # since when nothing but steps happened there; -1: not watched
    watched_steps: float = 0.0
    watched_due_s: float = 0.0  # what the steps since then should have taken

    @property
    def busy_s(self) -> float:
        """Predicted scoring that it has been given; half of the call under way is over."""
        if not self.calls:
            return 0.0
        return sum(seconds for _, _, seconds in self.calls) - 0.5 * self.calls[0][2]

    def look_away(self) -> None:
        """Something else than steps happens there: begin to watch again at the next progress."""
        self.watched_s, self.watched_steps = -1.0, self.steps

    @property
    def free(self) -> bool:
        return self.alive and self.can_score and not self.running and not self.inbound


class Fleet:
    """All workers. A sample that moves is on its source's `running` and in `inbound` of its
    destination until it has left."""

    def __init__(self, instances: int, policy: Policy, cost: CostModel) -> None:
        self.workers = [Worker() for _ in range(instances)]
        self.rows = Running()
        self.num_alive = instances
        self._policy = policy
        self._table = cost.step_table(policy.max_running).tolist()
        self._top = policy.max_running
        self._limit = policy.max_response_tokens
        self._context_s = cost.decode_context_s
        self._destination: dict[int, int] = {}
        self.ready = Ready(self.workers, policy.block, policy.score_ahead)

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
        return worker.load + self.reserve(sample) <= policy.cache_tokens

    def reserve(self, sample: Sample) -> int:
        return sample.prompt_tokens + self._limit

    def step_s(self, worker: Worker) -> float:
        """What a step of the worker's samples should take."""
        batch = len(worker.running)
        base: float = self._table[batch] if batch <= self._top else self._table[-1]
        if self._context_s:
            base += self._context_s * (worker.held + worker.steps * batch)  # tokens held
        return base

    def steps_at(self, worker: Worker, now_s: float) -> float:
        """Steps that the worker has probably done by now."""
        if not worker.running or now_s <= worker.heard_s:
            return worker.steps
        return worker.steps + (now_s - worker.heard_s) / (worker.slowness * self.step_s(worker))

    def place(self, sample: Sample, expected: float, now_s: float) -> None:
        """The sample runs on `sample.instance`; `expected`: tokens that it will still get."""
        assert sample.instance is not None
        worker = self.workers[sample.instance]
        steps = self.steps_at(worker, now_s)
        if not worker.running:
            worker.heard_s = now_s
        elif steps > worker.steps:
            worker.unsure.add(sample.id)
        offset = steps - sample.response_tokens
        worker.running[sample.id] = expected
        worker.load += sample.prompt_tokens + self._limit
        worker.expected += expected
        worker.look_away()
        worker.held += sample.prompt_tokens - offset
        self.rows.add(sample, sample.instance, offset)
        self.ready.note(sample.instance)

    def send(self, sample: Sample, destination: int) -> None:
        """The sample has been told to leave for `destination`."""
        assert sample.instance is not None
        self.workers[sample.instance].look_away()  # its batch is another from now on
        worker = self.workers[destination]
        worker.inbound[sample.id] = self.reserve(sample)
        worker.load += worker.inbound[sample.id]
        self._destination[sample.id] = destination
        self.ready.note(destination)

    def remove(self, sample: Sample) -> int | None:
        """Forget where the sample runs and is going to; returns where it was going."""
        if sample.instance is not None and sample.state is not SampleState.QUEUED:
            worker = self.workers[sample.instance]
            expected = worker.running.pop(sample.id, None)
            if expected is not None:
                worker.held -= sample.prompt_tokens - self.rows.remove(sample.id)
                worker.expected -= expected
                worker.load -= sample.prompt_tokens + self._limit
                if worker.unsure:
                    worker.unsure.discard(sample.id)
                if sample.state is SampleState.MOVING or not worker.running:
                    worker.look_away()
                if not worker.running:
                    worker.expected = worker.held = 0.0
                    self.ready.note(sample.instance)
        if not self._destination:
            return None
        destination = self._destination.pop(sample.id, None)
        if destination is not None:
            worker = self.workers[destination]
            worker.load -= worker.inbound.pop(sample.id)
            self.ready.note(destination)
        return destination

    def reached(self, instance: int, sample_id: int, tokens: int, now_s: float) -> None:
        """The sample is seen to have `tokens`: so many steps has its engine done."""
        row = self.rows.place.get(sample_id)
        if row is None or self.rows.homes[row] != instance:
            return
        worker = self.workers[instance]
        steps = tokens + self.rows.offsets[row]
        if sample_id in worker.unsure or steps < worker.steps:
            # It came while others were stepped, or stood still: they say where the engine is.
            worker.unsure.discard(sample_id)
            offset = self.steps_at(worker, now_s) - tokens
            worker.held -= offset - self.rows.offsets[row]
            self.rows.offsets[row] = offset
            return
        if steps > worker.steps:
            worker.watched_due_s += (steps - worker.steps) * self.step_s(worker)
            worker.steps = steps
            if worker.watched_s < 0.0 or steps >= worker.watched_steps + LEAST_STEPS:
                _watch(worker, now_s)
        worker.heard_s = now_s

    def lose(self, instance: int) -> list[int]:
        """The worker is gone; returns the samples that ran there. Samples on their way to it go
        on at their source until they leave."""
        worker = self.workers[instance]
        worker.alive = False
        worker.calls.clear()
        worker.last_role = ""
        self.num_alive -= 1
        self.ready.note(instance)
        return list(worker.running)

    def lose_scorer(self, instance: int) -> None:
        worker = self.workers[instance]
        worker.can_score = False
        worker.calls.clear()
        worker.last_role = ""
        self.ready.note(instance)

    def revive(self, instance: int) -> None:
        worker = self.workers[instance]
        worker.can_score = True
        if not worker.alive:
            worker.alive, worker.asleep = True, False
            worker.slowness = 1.0
            worker.look_away()
            self.num_alive += 1
        self.ready.note(instance)

    def scorers(self) -> list[int]:
        """First workers of the blocks that can all score."""
        block = self._policy.block
        firsts = range(0, len(self.workers), block)
        usable = [w.alive and w.can_score for w in self.workers]
        return [f for f in firsts if all(usable[f : f + block])]

    def call(self, worker: int, role: str, sample_ids: tuple[int, ...], seconds: float) -> None:
        self.workers[worker].calls.append((role, sample_ids, seconds))
        self.workers[worker].last_role = role
        self.ready.note(worker)

    def answered(self, worker: int, role: str, sample_ids: Sequence[int]) -> None:
        calls = self.workers[worker].calls
        for call in calls:
            if call[0] == role and call[1] == tuple(sample_ids):
                calls.remove(call)
                self.ready.note(worker)
                return

    def outstanding(self) -> list[str]:
        """What is waited for, worker by worker, for people."""
        parts = []
        for i, worker in enumerate(self.workers):
            if not worker.alive:
                parts.append(f"instance {i} lost")
            elif not worker.can_score:
                parts.append(f"scorer {i} lost")
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
        ids, _, homes, _, _ = self.rows.columns()
        assert set(zip(ids.tolist(), homes.tolist(), strict=True)) == told, "rows and samples"
        moving = {s.id for s in samples.values() if s.state is SampleState.MOVING}
        assert moving == set(self._destination), "moving samples and their destinations"
        assert self.num_alive == sum(w.alive for w in self.workers)
        for i, worker in enumerate(self.workers):
            reserved = sum(self.reserve(samples[s]) for s in worker.running)
            assert worker.load == reserved + sum(worker.inbound.values())
            assert worker.alive or not (worker.running or worker.calls), f"worker {i} is lost"
            room = len(worker.running) + len(worker.inbound)
            assert room <= self._policy.max_running, f"worker {i} is overfull"
            if self._policy.cache_tokens and room > 1:
                assert worker.load <= self._policy.cache_tokens, f"worker {i}: cache overfull"
        self.ready.validate()


def _watch(worker: Worker, now_s: float) -> None:
    """Learn how slow the worker is, from stretches of pure stepping of some length."""
    done = worker.steps - worker.watched_steps
    if worker.watched_s < 0.0 and done <= 0.0:
        return  # not yet at it
    if worker.watched_s >= 0.0:
        if done < LEAST_STEPS or worker.watched_due_s <= 0.0:
            return
        ratio = (now_s - worker.watched_s) / worker.watched_due_s
        weight = done / (done + LEARNED_STEPS)
        worker.slowness += weight * (min(max(ratio, 0.5), 8.0) - worker.slowness)
    worker.watched_s, worker.watched_steps, worker.watched_due_s = now_s, worker.steps, 0.0


def shown(ids: Collection[int]) -> str:
    """A few of the sample ids, for people."""
    more = f" and {len(ids) - 6} more" if len(ids) > 6 else ""
    return "samples " + ", ".join(map(str, sorted(ids)[:6])) + more
