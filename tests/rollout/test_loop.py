"""Laws of the live loop: however often samples move, whoever dies, and in whatever order workers
answer, every sample ends with its own tokens and with scores that a living worker holds."""

import random
from dataclasses import dataclass, field
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
from rlhfuse.rollout.loop import RolloutLoop
from rlhfuse.rollout.policy import InterStage, Migration, Policy
from rlhfuse.rollout.records import Record
from rlhfuse.rollout.scheduler import RolloutScheduler

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
        if worker in self.living:  # what is sent to the dead is lost
            self.living[worker].inbox.append(command)

    def receive(self, timeout_s: float) -> list[tuple[str, m.Event]]:
        assert timeout_s > 0
        for _ in range(self._random.randint(1, 6)):
            self._advance()
        heard: list[tuple[str, m.Event]] = []
        for worker, process in self.living.items():
            count = self._random.randint(0, len(process.outbox))
            heard += [(worker, event) for event in process.outbox[:count]]
            del process.outbox[:count]
        return heard

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
                assert not process.running, "scores while it generates"
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


def _run(policy: Policy, seed: int, deaths: int = 0) -> tuple[_InMemory, tuple[Record, ...]]:
    workers = _InMemory(seed, instances=4, deaths=deaths)
    scheduler = RolloutScheduler(4, ROLES, CostModel.default(), policy)
    progress = Progress(1, console=Console(file=StringIO()))
    loop = RolloutLoop(
        workers, scheduler, None, progress, lambda ids: "", timeout_s=20.0, show=False
    )
    records = [
        Record(i, i // 2, np.arange(3, dtype=np.int32), i + 100, Row("p", "s", None, {}, "f:1"))
        for i in range(NUM_SAMPLES)
    ]
    loop.run(records, SAMPLING, 0, len(ROLES))
    return workers, loop.result().records


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


def test_a_sample_that_has_just_arrived_may_be_told_to_move_on() -> None:
    moved_on: set[int] = set()
    for seed in range(10):
        workers, records = _run(RESTLESS, seed)
        _check(workers, records)
        moved_on |= workers.left_twice
    assert moved_on, "no sample moved twice: the law was not tried"
