"""Laws of the live loop: however often samples move, whoever dies, and in whatever order workers
answer, every sample ends with its own tokens and with scores that a living worker holds, or in a
group that was trained once with all of them."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from io import StringIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from rlhfuse import messages as m
from rlhfuse.cost import CostModel
from rlhfuse.data import Row
from rlhfuse.progress import Progress
from rlhfuse.rollout.groups import TRAIN
from rlhfuse.rollout.loop import RolloutLoop
from rlhfuse.rollout.policy import InterStage, Migration, Policy
from rlhfuse.rollout.records import Record
from rlhfuse.rollout.scheduler import RolloutScheduler
from rlhfuse.rollout.stage import train_samples

ROLES = ("critic", "reference", "reward")
SAMPLING = m.Sampling(1.0, 0, 1.0, 0.0, 64, 0, ())
NUM_SAMPLES = 24
# Moves whenever it may: a sample that has just arrived is often told to move on.
RESTLESS = Policy(
    migration=Migration.FORCED,
    forced=tuple((NUM_SAMPLES, 4 - step % 4) for step in range(40)),
    hysteresis_s=0.0,
)
POLICIES = {
    "serial": Policy(inter_stage=InterStage.OFF, migration=Migration.OFF),
    "never": Policy(migration=Migration.OFF),
    "auto": Policy(hysteresis_s=0.0),
    "paper": Policy(migration=Migration.PAPER, paper_threshold=0.5),
    "restless": RESTLESS,
}


def _response(seed: int) -> bytes:
    """What a sample's model says: fixed by its seed alone, with a long tail."""
    draw = random.Random(seed)
    length = min(64, 1 + int(4 * draw.paretovariate(0.9)))
    return np.asarray([draw.randrange(1000) for _ in range(length)], dtype=np.int32).tobytes()


@dataclass
class _Process:
    """One rollout worker: an inbox, running samples as bytes that are there and reported."""

    name: str
    inbox: list[m.Command] = field(default_factory=list)
    outbox: list[m.Event] = field(default_factory=list)
    running: dict[int, tuple[int, int, int]] = field(default_factory=dict)  # seed, there, reported
    departed: set[int] = field(default_factory=set)
    held: set[tuple[str, int]] = field(default_factory=set)
    asleep: bool = False


class _InMemory:
    """Workers without processes; chance decides who gets on and who dies."""

    def __init__(self, seed: int, instances: int, deaths: int) -> None:
        self._random = random.Random(seed)
        self._deaths = deaths
        self._born = 0
        self.rollout = tuple(f"rollout{i}" for i in range(instances))
        self.training = tuple(f"training{i}" for i in range(instances))
        self.groups: dict[str, list[m.TrainGroup]] = {worker: [] for worker in self.training}
        self.trained: Counter[int] = Counter()
        self.needs_logprobs = False
        self.living: dict[str, _Process] = {name: self._spawn() for name in self.rollout}
        self.left_twice: set[int] = set()
        self._left: dict[int, int] = {}

    def _spawn(self) -> _Process:
        self._born += 1
        return _Process(f"process{self._born}")

    def serving(self) -> dict[int, str]:
        names = {i: self.living.get(worker) for i, worker in enumerate(self.rollout)}
        return {i: process.name for i, process in names.items() if process is not None}

    def endpoint(self, worker: str) -> str:
        return f"memory://{self.living[worker].name}" if worker in self.living else ""

    def send(self, worker: str, command: m.Command) -> None:
        if isinstance(command, m.TrainGroup):
            self.groups[worker].append(command)
        elif worker in self.living:  # what is sent to the dead is lost
            self.living[worker].inbox.append(command)

    def receive(self, timeout_s: float) -> list[tuple[str, m.Event]]:
        assert timeout_s > 0
        for _ in range(self._random.randint(1, 6)):
            self._advance()
        heard: list[tuple[str, m.Event]] = self._train_one()
        for worker, process in self.living.items():
            count = self._random.randint(0, len(process.outbox))
            heard += [(worker, event) for event in process.outbox[:count]]
            del process.outbox[:count]
        return heard

    def _train_one(self) -> list[tuple[str, m.Event]]:
        """A training worker does what it was told, if all that it needs is there."""
        busy = [worker for worker, told in self.groups.items() if told]
        if not busy or self._random.random() < 0.5:
            return []
        worker = self._random.choice(busy)
        samples = self.groups[worker].pop(0).samples
        rollout = self.living.get(self.rollout[self.training.index(worker)])
        if rollout is not None:
            assert self.needs_logprobs or not rollout.running, "trains while it generates"
            assert not any(isinstance(c, m.Score) for c in rollout.inbox), "trains while it scores"
        held = {f"memory://{p.name}": p.held for p in self.living.values()}
        missing = {
            endpoint
            for sample in samples
            for role, endpoint in sample.endpoints.items()
            if (role, sample.tokens.sample_id) not in held.get(endpoint, ())
        }
        if self.needs_logprobs:
            assert all(sample.rollout_endpoint for sample in samples)
            missing |= {s.rollout_endpoint for s in samples} - held.keys()
        ids = tuple(sample.tokens.sample_id for sample in samples)
        if not missing:
            self.trained.update(ids)
            for sample in samples:
                assert bytes(sample.tokens.response) == _response(sample.tokens.sample_id + 100)
                assert {*sample.endpoints, "reward"} == set(ROLES)
                assert sample.score == float(sample.tokens.sample_id)
        return [(worker, m.GroupTrained(step=1, sample_ids=ids, missing=tuple(missing)))]

    def _advance(self) -> None:
        worker = self._random.choice(self.rollout)
        process = self.living.get(worker)
        if process is None:
            self.living[worker] = self._spawn()
        elif self._deaths and len(self.living) > 1 and self._random.random() < 0.02:
            self._deaths -= 1
            del self.living[worker]
        elif process.inbox and self._random.random() < 0.7:
            self._obey(process, process.inbox.pop(0))
        else:
            self._decode(process)

    def _obey(self, process: _Process, command: m.Command) -> None:
        match command:
            case m.Generate():
                assert not process.asleep
                for item in command.items:
                    self._begin(process, item)
            case m.Export():
                self._export(process, command.sample_ids)
            case m.Score():
                # What died with a worker is generated again wherever there is one.
                assert self.needs_logprobs or not process.running, "scores while it generates"
                ids = tuple(sample.sample_id for sample in command.samples)
                for sample in command.samples:
                    assert bytes(sample.response) == _response(sample.sample_id + 100)
                process.held |= {(command.role, i) for i in ids}
                process.outbox.append(m.Scored(command.role, ids, tuple(map(float, ids))))
            case m.Sleep() | m.Wake():
                process.asleep = isinstance(command, m.Sleep)
            case _:
                raise AssertionError(command)

    def _begin(self, process: _Process, item: m.GenerateItem) -> None:
        sample_id, response = item.tokens.sample_id, bytes(item.tokens.response)
        assert all(sample_id not in other.running for other in self.living.values())
        assert _response(item.seed).startswith(response)
        for other in self.living.values():
            if item.cache_from == f"memory://{other.name}":
                assert sample_id in other.departed
        process.running[sample_id] = (item.seed, len(response), len(response))

    def _grown(self, process: _Process, sample_id: int) -> m.Growth:
        seed, there, reported = process.running[sample_id]
        process.running[sample_id] = (seed, there, there)
        response = _response(seed)
        reason = "stop" if there == len(response) else ""
        return m.Growth(sample_id, response[reported:there], there // 4, reason)

    def _export(self, process: _Process, sample_ids: tuple[int, ...]) -> None:
        left = [self._grown(process, i) for i in sample_ids if i in process.running]
        for growth in left:
            del process.running[growth.sample_id]
            process.departed.add(growth.sample_id)
            self._left[growth.sample_id] = self._left.get(growth.sample_id, 0) + 1
            if self._left[growth.sample_id] > 1:
                self.left_twice.add(growth.sample_id)
        process.outbox.append(m.Exported(growths=tuple(left), requested=sample_ids))

    def _decode(self, process: _Process) -> None:
        for sample_id, (seed, there, reported) in process.running.items():
            there = min(len(_response(seed)), there + 4)
            process.running[sample_id] = (seed, there, reported)
        ended = [
            i for i, (seed, there, _) in process.running.items() if there == len(_response(seed))
        ]
        if ended or (process.running and self._random.random() < 0.3):
            growths = tuple(self._grown(process, i) for i in list(process.running))
            process.outbox.append(m.Grown(growths=growths))
        for sample_id in ended:
            del process.running[sample_id]


def _run(
    policy: Policy, seed: int, deaths: int = 0, *, train: bool = False, needs_logprobs: bool = False
) -> tuple[_InMemory, tuple[Record, ...]]:
    workers = _InMemory(seed, instances=4, deaths=deaths)
    workers.needs_logprobs = needs_logprobs
    cost = CostModel.default()
    cost = replace(cost, score_token_s={**cost.score_token_s, TRAIN: 5e-4})
    scheduler = RolloutScheduler(4, ROLES, cost, policy, train_groups=train)
    progress = Progress(1, console=Console(file=StringIO()))
    loop = RolloutLoop(
        workers,
        scheduler,
        None,
        progress,
        lambda ids: "",
        timeout_s=20.0,
        show=False,
        needs_logprobs=needs_logprobs,
        plan_group=_plan_group if train else None,
    )
    records = [
        Record(i, i // 2, np.arange(3, dtype=np.int32), i + 100, Row("p", "s", None, {}, "f:1"))
        for i in range(NUM_SAMPLES)
    ]
    loop.run(records, SAMPLING, 0, len(ROLES))
    return workers, loop.result().records


def _plan_group(group: Sequence[Record], replica: int) -> m.TrainGroup:
    samples = tuple(train_samples(group))
    return m.TrainGroup(step=1, samples=samples, batch=m.MiniBatch({}, ()), kl_coef=0.0)


def _check(workers: _InMemory, records: tuple[Record, ...]) -> None:
    holders = {f"memory://{p.name}": p.held for p in workers.living.values()}
    for record in records:
        assert bytes(record.response) == _response(record.seed)
        assert record.finish_reason == "stop"
        assert record.score == float(record.sample_id)
        for role in ("critic", "reference"):
            assert (role, record.sample_id) in holders[record.endpoints[role]]


@pytest.mark.parametrize("name", list(POLICIES))
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_every_sample_ends_with_its_own_tokens_and_scores(name: str, seed: int) -> None:
    _check(*_run(POLICIES[name], seed))


@pytest.mark.parametrize("name", list(POLICIES))
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), deaths=st.integers(1, 6))
def test_whoever_dies_and_comes_back(name: str, seed: int, deaths: int) -> None:
    _check(*_run(POLICIES[name], seed, deaths))


@pytest.mark.parametrize("name", ["auto", "paper", "restless"])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), deaths=st.integers(0, 6), needs_logprobs=st.booleans())
def test_every_sample_is_trained_on_once_whoever_dies(
    name: str, seed: int, deaths: int, needs_logprobs: bool
) -> None:
    workers, records = _run(POLICIES[name], seed, deaths, train=True, needs_logprobs=needs_logprobs)
    assert workers.trained == Counter(record.sample_id for record in records)


def test_a_sample_that_has_just_arrived_may_be_told_to_move_on() -> None:
    moved_on: set[int] = set()
    for seed in range(10):
        workers, records = _run(RESTLESS, seed)
        _check(workers, records)
        moved_on |= workers.left_twice
    assert moved_on, "no sample moved twice: the law was not tried"
