"""Traces without labels: the schedule is told by launching threads and messages, or not at all."""

import json
import random
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhfuse.profiler.explain import Explained, explain_step
from rlhfuse.profiler.readers.detect import open_trace
from rlhfuse.schedules.interleaved import interleaved
from rlhfuse.schedules.ir import Op, Pipeline, Problem, Schedule, Task
from rlhfuse.schedules.standard import gpipe, one_f_one_b, zb_h1
from rlhfuse.schedules.timing import makespan, simulate

Event = dict[str, object]
_LINK_US = 40.0
_PAUSE_US = 12.0  # of every task, in which nothing is computed and messages go
_MAIN, _AUTOGRAD = 1, 2


class _Rank:
    """One rank's trace as PyTorch writes it; microseconds of a clock of its own."""

    def __init__(self, rank: int, world: int, skew: float) -> None:
        self.events: list[Event] = []
        self._info = {"backend": "nccl", "rank": rank, "world_size": world}
        self._skew, self._launches = 1e6 + skew, 0

    def add(self, cat: str, name: str, ts: float, dur: float, tid: int, **args: object) -> None:
        event = {"ph": "X", "cat": cat, "name": name, "ts": self._skew + ts, "dur": dur}
        self.events.append(event | {"pid": 1, "tid": tid, "args": args})

    def kernel(self, name: str, ts: float, dur: float, tid: int = _MAIN, early: float = 5) -> None:
        self._launches += 1
        self.add("cuda_runtime", "cudaLaunchKernel", ts - early, 2, tid, correlation=self._launches)
        self.add("kernel", name, ts, dur, 7, correlation=self._launches)

    def message(self, ts: float, end: float, calls: list[tuple[str, int]]) -> None:
        """A batch of sends and receives: its kernel says nothing of its own."""
        for place, (what, peer) in enumerate(calls):
            said = {"Collective name": what, "Dst Rank" if what == "send" else "Src Rank": peer}
            self.add("cpu_op", "record_param_comms", ts - 9 + place / 10, 0.05, _MAIN, **said)
        self.kernel("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", ts, end - ts)

    def save(self, folder: Path, number: int) -> None:
        whole = {"schemaVersion": 1, "distributedInfo": self._info, "traceEvents": self.events}
        (folder / f"rank{number}.json").write_text(json.dumps(whole))


def _peers(task: Task, problem: Problem) -> tuple[int | None, int | None]:
    """Ranks that a task's input comes from and its result goes to."""
    pipe = problem.pipeline(task.pipeline)
    step = 1 if task.op is Op.F else -1
    before, after = task.pp_stage - step, task.pp_stage + step

    def rank(stage: int) -> int | None:
        return pipe.stages[stage] if 0 <= stage < pipe.num_stages else None

    return rank(before), rank(after)


def _write(folder: Path, schedule: Schedule, *, batched: bool, steps: int = 1) -> None:
    """What each rank's profiler would have recorded of the schedule, in microseconds."""
    rng = random.Random(5)
    wall = makespan(schedule) + 300
    for number in range(schedule.problem.num_ranks):
        # Replicas here never meet in a collective, which alone would tell their clocks.
        skew = rng.uniform(-3e4, 3e4) if len(schedule.problem.pipelines) == 1 else 0.0
        rank = _Rank(number, schedule.problem.num_ranks, skew)
        for step in range(steps):
            _write_step(rank, schedule, number, step * wall, batched=batched)
        rank.save(folder, number)


def _write_step(
    rank: _Rank, schedule: Schedule, number: int, zero: float, *, batched: bool
) -> None:
    spans = {span.name: span for span in simulate(schedule).spans}
    rank.kernel("zero_grad", zero - 30, 10)
    free, waiting = zero, list[tuple[str, int]]()
    for task in schedule.rows[number]:
        span = spans[str(task)]
        source, target = _peers(task, schedule.problem)
        start, end = zero + span.start_s, zero + span.end_s - _PAUSE_US
        if source is not None and task.op is not Op.W:
            if waiting and not batched:
                rank.message(free, free + 5, waiting)
                free, waiting = free + 6, []
            rank.message(free, start, [*waiting, ("recv", source)])
        elif waiting:
            rank.message(free, free + 5, waiting)
        tid = _MAIN if task.op is Op.F else _AUTOGRAD
        if tid == _AUTOGRAD:
            rank.add("cpu_op", "autograd::engine::evaluate_function: MmBackward0", start, 9, tid)
        for part in range(4):
            length = (end - start) / 4
            rank.kernel(f"gemm_{part}", start + part * length, length - 0.5, tid)
        free = end
        waiting = [("send", target)] if target is not None and task.op is not Op.W else []
    if waiting:
        rank.message(free, free + _LINK_US, waiting)
        free += _LINK_US
    rank.kernel("clip_grad_norm", free + 10, 20)
    rank.add("gpu_user_annotation", "Optimizer.step#AdamW.step", free + 40, 30, 7)
    rank.kernel("adamw", free + 45, 20)


def _problem(ranks: int, microbatches: int, **more: float) -> Problem:
    rng = random.Random(ranks)
    forward = [rng.uniform(800, 1000) for _ in range(ranks)]
    backward = [2 * x for x in forward]
    weight = [x * more.get("weight", 0.0) for x in forward]
    pipe = Pipeline.make(
        "model", list(range(ranks)), microbatches, forward, backward, weight=weight
    )
    return Problem(ranks, (pipe,), None, _LINK_US)


def _replicas() -> Problem:
    pipe = _problem(3, 4).pipelines[0]
    pipes = (replace(pipe, name="replica0"), replace(pipe, name="replica1", stages=(3, 4, 5)))
    return Problem(6, pipes, None, _LINK_US)


def _depth_first(schedule: Schedule) -> Schedule:
    """The same chunks in another order: every micro-batch goes through all of them at once."""
    rows = []
    for row in schedule.rows:
        forward = sorted((t for t in row if t.op is Op.F), key=lambda t: (t.microbatch, t.pp_stage))
        backward = sorted(
            (t for t in row if t.op is Op.B), key=lambda t: (t.microbatch, -t.pp_stage)
        )
        rows.append((*forward, *backward))
    return Schedule(schedule.problem, tuple(rows))


def _explained(folder: Path) -> Explained:
    return explain_step(open_trace([folder]), None, critic_scale=None)


def _cases() -> Iterator[tuple[str, Schedule]]:
    yield "1F1B", one_f_one_b(_problem(4, 6))
    yield "1F1B", one_f_one_b(_problem(2, 3))
    yield "GPipe", gpipe(_problem(3, 4))
    yield "1F1B, 2 data-parallel replicas", one_f_one_b(_replicas())
    yield "interleaved (2 chunks a rank)", interleaved(_problem(4, 8), 2)
    yield "interleaved (3 chunks a rank)", interleaved(_problem(3, 6), 3)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("case", range(6))
def test_what_ran_is_told_without_labels(tmp_path: Path, case: int, batched: bool) -> None:
    """Every task comes back, in its order, on its rank and for as long as it took."""
    name, schedule = list(_cases())[case]
    _write(tmp_path, schedule, batched=batched, steps=2)
    found = _explained(tmp_path)
    assert found.summary.schedule is not None
    assert found.summary.schedule.name == name
    assert len(found.rounds) == 2
    for training in found.rounds:
        assert training.schedule.rows == schedule.rows
        for task, seconds in training.durations.items():
            pipe = schedule.problem.pipeline(task.pipeline)
            expected = pipe.duration(task.op, task.pp_stage) - _PAUSE_US
            # The first one of all may begin with the zeroing of gradients.
            room = 35 if str(task).endswith(":0F0") else 1
            assert seconds * 1e6 == pytest.approx(expected, abs=room)
    assert found.summary.bubble_fraction is not None
    assert any("no labels" in told for told in found.summary.warnings)
    assert {"forward", "backward"} < set(found.summary.causes)


def _no_evidence(folder: Path) -> None:
    """Threads that autograd runs on are not known: the profiler recorded no CPU activity."""
    for path in folder.iterdir():
        whole = json.loads(path.read_text())
        kept = [e for e in whole["traceEvents"] if "autograd" not in e["name"]]
        path.write_text(json.dumps(whole | {"traceEvents": kept}))


def _to_itself(folder: Path) -> None:
    path = folder / "rank1.json"
    whole = json.loads(path.read_text())
    for event in whole["traceEvents"]:
        event["args"] = {k: 1 if k == "Dst Rank" else v for k, v in event["args"].items()}
    path.write_text(json.dumps(whole))


def _one_rank_less(folder: Path) -> None:
    (folder / "rank2.json").unlink()


@pytest.mark.parametrize(
    ("schedule", "damage", "why"),
    [
        (zb_h1(_problem(4, 6, weight=1.0)), None, "not told by messages"),
        (_depth_first(interleaved(_problem(4, 4), 2)), None, "did not take turns"),
        (interleaved(_problem(2, 4), 2), None, "not told by messages"),
        (one_f_one_b(_problem(3, 4)), _no_evidence, "no backward kernels"),
        (one_f_one_b(_problem(3, 4)), _to_itself, "rank 1 exchanges messages with itself"),
        (one_f_one_b(_problem(3, 4)), _one_rank_less, "ranks [2] are not in the trace"),
    ],
)
def test_what_structure_does_not_tell_is_not_guessed(
    tmp_path: Path, schedule: Schedule, damage: object, why: str
) -> None:
    _write(tmp_path, schedule, batched=False)
    if callable(damage):
        damage(tmp_path)
    summary = _explained(tmp_path).summary
    assert summary.schedule is None
    assert why in " ".join(summary.warnings)


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("traces")
    _write(folder, interleaved(_problem(3, 3), 2), batched=True)
    return folder


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_odd_events_end_in_a_clear_line(traces: Path, data: st.DataObject) -> None:
    """Events lost, moved, doubled, or with other ranks and times, in any number."""
    odd = data.draw(st.sampled_from([-1, 0, 1, 2, 7, 2**40, 2**70, 1e300, None, "1", True]))
    with tempfile.TemporaryDirectory() as folder:
        for number in range(3):
            whole = json.loads((traces / f"rank{number}.json").read_text())
            events = whole["traceEvents"]
            for _ in range(data.draw(st.integers(0, 4))):
                at = data.draw(st.integers(0, len(events) - 1))
                key = data.draw(st.sampled_from(["drop", "ts", "dur", "tid", "args", "double"]))
                if key == "drop":
                    del events[at]
                elif key == "double":
                    events.append(dict(events[at]))
                elif key == "args":
                    events[at]["args"] = dict.fromkeys(events[at]["args"], odd)
                else:
                    events[at][key] = odd if key == "tid" or isinstance(odd, int) else 5.0
            (Path(folder) / f"rank{number}.json").write_text(json.dumps(whole))
        told = ""
        try:
            _explained(Path(folder))
        except ValueError as error:
            told = str(error)
        assert "\n" not in told
