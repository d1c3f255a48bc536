"""The workers as the rollout scheduler knows them: what runs, what comes in, what is scored."""

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from rlhfuse.cost import CostModel
from rlhfuse.rollout import running as columns
from rlhfuse.rollout.policy import Policy
from rlhfuse.rollout.ready import Ready
from rlhfuse.rollout.running import Bools, Floats, Ints, Running
from rlhfuse.sample import Sample, SampleState


@dataclass(slots=True)
class Worker:
    """`record`: of `running.WORKER`, what changes with every sample. `calls` are (role, sample ids,
    predicted seconds), oldest first."""

    record: np.void
    can_score: bool = True
    asleep: bool = False
    calls: deque[tuple[str, tuple[int, ...], float]] = field(default_factory=deque)
    last_role: str = ""

    @property
    def alive(self) -> bool:
        return bool(self.record["alive"])

    @property
    def slowness(self) -> float:
        """Seconds of a step over what was predicted."""
        return float(self.record["slowness"])

    @property
    def busy_s(self) -> float:
        """Predicted scoring that it has been given; half of the call under way is over."""
        if not self.calls:
            return 0.0
        return sum(seconds for _, _, seconds in self.calls) - 0.5 * self.calls[0][2]

    @property
    def free(self) -> bool:
        record = self.record
        idle = not record["num"] and not record["inbound"]
        return bool(idle and record["alive"] and self.can_score)


class Fleet:
    """All workers. A sample that moves runs at its source, and its tokens (to the response limit)
    are reserved at its destination, until it has left."""

    def __init__(self, instances: int, policy: Policy, cost: CostModel) -> None:
        self._records = columns.no_workers(instances)
        self.workers = [Worker(record) for record in self._records]
        self.num_alive = instances
        self._policy, self._cost = policy, cost
        self._limit = policy.max_response_tokens
        self.ready = Ready(self.workers, policy.block, policy.score_ahead)
        self.begin(())

    def begin(self, samples: Sequence[Sample]) -> None:
        """A new iteration: nothing runs, and these samples will."""
        assert not self._records["num"].any(), "samples of the iteration before still run"
        self.number = {sample.id: k for k, sample in enumerate(samples)}
        self._ids = np.array([s.id for s in samples], dtype=np.int64)
        self._groups = np.array([s.group for s in samples], dtype=np.int64)
        distinct, self._group_number = np.unique(self._groups, return_inverse=True)
        self.num_groups = len(distinct)
        table = self._cost.step_table(self._policy.max_running)
        self.running: Running = columns.nothing_running(
            self._records, samples, table, self._cost.decode_context_s, self._limit
        )

    @property
    def num_inbound(self) -> int:
        return int(self.running.size[1])

    @property
    def expected_tokens(self) -> float:
        """That running samples were expected to get when they came."""
        return float(self._records["expected"].sum())

    def group_number(self, sample: Sample) -> int:
        """The sample's group, counted from 0 on."""
        return int(self._group_number[self.number[sample.id]])

    def send(self, sample: Sample, destination: int) -> None:
        """The sample has been told to leave for `destination`."""
        columns.send(self.running, self.number[sample.id], destination)
        self.ready.note(destination)

    def arrive(self, sample: Sample, expected: float, now_s: float) -> int:
        """The sample, which was MOVING, runs at its destination, which is returned; -1: that is
        lost, and the sample still where it was. `expected`: tokens to come."""
        number, tokens = self.number[sample.id], sample.response_tokens
        to, emptied = columns.arrive(self.running, number, tokens, float(expected), float(now_s))
        if emptied >= 0:
            self.ready.note(emptied)
        return int(to)

    def remove(self, sample: Sample) -> None:
        """Forget where the sample runs and is going to."""
        number = self.number[sample.id]
        if self.running.place[number] < 0:
            return
        for instance in columns.remove(self.running, number):
            if instance >= 0:
                self.ready.note(instance)

    def reached(self, instance: int, sample_id: int, tokens: int, now_s: float) -> None:
        """The sample is seen to have `tokens`: so many steps has its engine done."""
        columns.reached(self.running, self.number[sample_id], instance, tokens, float(now_s))

    def finished(
        self,
        sample_ids: Sequence[int],
        instances: Sequence[int],
        tokens: Sequence[int],
        times: Sequence[float],
    ) -> None:
        """These samples are complete where they run, one after the other: as `reached` and
        `remove` of each."""
        emptied = np.empty(len(sample_ids), dtype=np.int64)
        count = columns.finished(
            self.running,
            np.array([self.number[s] for s in sample_ids], dtype=np.int64),
            np.array(instances, dtype=np.int64),
            np.array(tokens, dtype=np.int64),
            np.array(times, dtype=np.float64),
            emptied,
        )
        for instance in emptied[:count].tolist():
            self.ready.note(instance)

    def columns(self) -> tuple[Ints, Ints, Ints, Floats, Floats]:
        """Of the running samples: ids, groups, homes, prompt tokens, offsets; each [n]."""
        rows = self.running.rows[: self.running.size[0]]
        numbers = rows["number"]
        prompts = self.running.prompts[numbers].astype(np.float64)
        home, offset = rows["home"].copy(), rows["offset"].copy()
        return self._ids[numbers], self._groups[numbers], home, prompts, offset

    def steps(self, now_s: float) -> Floats:
        """Steps that each worker has probably done by now. [i]"""
        return np.asarray(columns.all_steps(self.running, float(now_s)))

    def slowness(self) -> Floats:
        """Of each worker. [i]"""
        return np.array(self._records["slowness"])

    @property
    def alive(self) -> Bools:
        """Each worker. [i]"""
        return np.asarray(self._records["alive"] > 0)

    def lose(self, instance: int) -> list[int]:
        """The worker is gone; returns the samples that ran there. Samples on their way to it go
        on at their source until they leave."""
        worker = self.workers[instance]
        worker.record["alive"] = 0
        worker.calls.clear()
        worker.last_role = ""
        self.num_alive -= 1
        self.ready.note(instance)
        return self.samples_of(instance)

    def coming_to(self, instance: int) -> list[int]:
        """The samples that were told to go there."""
        coming: list[int] = self._ids[self.running.to == instance].tolist()
        return coming

    def samples_of(self, instance: int) -> list[int]:
        """The samples that run there."""
        rows = self.running.rows[: self.running.size[0]]
        mine: list[int] = np.sort(self._ids[rows["number"][rows["home"] == instance]]).tolist()
        return mine

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
            worker.record["alive"], worker.record["slowness"] = 1, 1.0
            worker.asleep = False
            columns.look_away(self.running, instance)
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
            for word, ids in (("generating", self.samples_of(i)), ("coming in", self.coming_to(i))):
                if ids:
                    parts.append(f"instance {i}: {len(ids)} {word} ({shown(ids)})")
            parts += [f"worker {i}: {role} scores of {shown(ids)}" for role, ids, _ in worker.calls]
        return parts

    def validate(self, samples: Mapping[int, Sample]) -> None:
        """Assert that workers and samples tell the same story."""
        told = {
            (s.id, s.instance)
            for s in samples.values()
            if s.state in (SampleState.RUNNING, SampleState.MOVING)
        }
        ids, _, homes, _, _ = self.columns()
        placed = set(zip(ids.tolist(), homes.tolist(), strict=True))
        assert placed == told, f"{sorted(placed ^ told, key=str)}"
        moving = {s.id for s in samples.values() if s.state is SampleState.MOVING}
        going = set(self._ids[self.running.to >= 0].tolist())
        assert moving == going, "moving samples and their destinations"
        assert self.num_inbound == len(going)
        assert self.num_alive == sum(w.alive for w in self.workers)
        for i, worker in enumerate(self.workers):
            mine, coming, record = self.samples_of(i), self.coming_to(i), worker.record
            reserved = sum(samples[s].prompt_tokens + self._limit for s in mine + coming)
            assert record["load"] == reserved
            assert (record["num"], record["inbound"]) == (len(mine), len(coming))
            assert worker.alive or not (mine or worker.calls), f"worker {i} is lost"
            room = len(mine) + len(coming)
            assert room <= self._policy.max_running, f"worker {i} is overfull"
            if self._policy.cache_tokens and room > 1:
                assert record["load"] <= self._policy.cache_tokens, f"worker {i}: cache overfull"
        self.ready.validate()


def shown(ids: Collection[int]) -> str:
    """A few of the sample ids, for people."""
    more = f" and {len(ids) - 6} more" if len(ids) > 6 else ""
    return "samples " + ", ".join(map(str, sorted(ids)[:6])) + more
