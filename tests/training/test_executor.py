"""Schedules run over gloo give what a plain loop gives; failures end all ranks and say where."""

import os
import time
from datetime import timedelta

import pytest
import torch
from torch import nn
from torch.distributed.distributed_c10d import _get_default_store

from rlhfuse.schedules.ir import Op, Pipeline, Problem, Schedule, rows_from_text
from rlhfuse.schedules.standard import gpipe, one_f_one_b
from rlhfuse.schedules.timing import check_channels
from rlhfuse.timeline import Kind, Span
from rlhfuse.training.channels import Channels
from rlhfuse.training.clock import HostClock
from rlhfuse.training.executor import Executor
from rlhfuse.training.failure import StepFailed
from rlhfuse.training.gradients import GradientSums
from rlhfuse.training.split import WeightStore, split_linears
from rlhfuse.training.stage_runner import AutogradRunner, Compute
from tests.training.ranks import run_ranks

WIDTH = 32
ROWS = (16, 48, 32)
CPU = torch.device("cpu")
Gradients = dict[str, list[torch.Tensor]]


def problem(num_ranks: int, num_microbatches: int = 3) -> Problem:
    ranks = range(num_ranks)
    return Problem(
        num_ranks,
        (
            Pipeline.make("actor", ranks, num_microbatches, 1, 2, weight=1),
            Pipeline.make("critic", ranks[::-1], num_microbatches, 1, 2, weight=1),
        ),
    )


def fused_by_hand() -> Schedule:
    """Two ranks, both models at once, weight gradients split off here and there."""
    rows = rows_from_text(
        "actor:0F0 actor:0F1 critic:1F0 critic:1B0 actor:0I0 critic:1F1 actor:0F2 actor:0W0 "
        "critic:1I1 actor:0I1 critic:1F2 critic:1W1 actor:0W1 critic:1B2 actor:0B2\n"
        "critic:0F0 critic:0F1 actor:1F0 actor:1I0 critic:0F2 critic:0I0 actor:1W0 actor:1F1 "
        "critic:0W0 actor:1B1 critic:0B1 actor:1F2 actor:1B2 critic:0B2"
    )
    return Schedule(problem(2), rows)


def stage_module(pipeline: str, pp_stage: int, num_stages: int) -> nn.Sequential:
    """Six blocks a model, whatever the number of stages."""
    torch.manual_seed(len(pipeline))
    blocks = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(4)]
    share = len(blocks) // num_stages
    return nn.Sequential(*blocks[share * pp_stage : share * (pp_stage + 1)])


def inputs(pipeline: str, microbatch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(microbatch + 10 * len(pipeline))
    return torch.randn(ROWS[microbatch], WIDTH, generator=generator)


def stage_compute(module: nn.Module, pipeline: str, last: bool) -> Compute:
    def compute(microbatch: int, received: torch.Tensor | None) -> torch.Tensor:
        out: torch.Tensor = module(inputs(pipeline, microbatch) if received is None else received)
        return out.square().mean() if last else out

    return compute


def gradients_of(module: nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in module.parameters() if p.grad is not None]


def run_on(
    rank: int, schedules: list[Schedule], *, local: bool = True
) -> tuple[list[Gradients], list[Span]]:
    """Gradients after each schedule, of this rank's stages in stage order."""
    pipelines = schedules[0].problem.pipelines
    channels = Channels(
        rank,
        {pipe.name: pipe.stages for pipe in pipelines},
        device=CPU,
        dtype=torch.float32,
        timeout=timedelta(seconds=20),
        local=local,
    )
    modules, runners = {}, {}
    for pipe in pipelines:
        for stage in [s for s, r in enumerate(pipe.stages) if r == rank]:
            module = stage_module(pipe.name, stage, pipe.num_stages)
            store = WeightStore(GradientSums(module.parameters()))
            split_linears(module, store)
            compute = stage_compute(module, pipe.name, stage == pipe.num_stages - 1)
            modules[pipe.name, stage] = module
            runners[pipe.name, stage] = AutogradRunner(
                compute, last=stage == pipe.num_stages - 1, weights=store
            )
    executor = Executor(rank, channels, runners, HostClock(), _get_default_store())
    found, spans = [], list[Span]()
    for schedule in schedules:
        shapes = {p.name: [(ROWS[m], WIDTH) for m in range(p.num_microbatches)] for p in pipelines}
        executor.run(schedule, shapes, spans)
        found.append({f"{n}:{s}": gradients_of(m) for (n, s), m in modules.items()})
        for module in modules.values():
            module.zero_grad()
    channels.close()
    return found, spans


def plain_gradients(pipeline: str) -> list[torch.Tensor]:
    module = stage_module(pipeline, 0, 1)
    for microbatch in range(3):
        module(inputs(pipeline, microbatch)).square().mean().backward()
    return gradients_of(module)


def joined(results: list[tuple[list[Gradients], list[Span]]], run: int, pipeline: str) -> Gradients:
    found = {k: v for result in results for k, v in result[0][run].items()}
    return {pipeline: [g for key in sorted(found) if key.startswith(pipeline) for g in found[key]]}


def test_any_profile_of_a_run_is_labelled_by_task() -> None:
    """PyTorch's profiler sees each task once, with the computation inside it."""

    def run(rank: int) -> list[tuple[str, int]]:
        if rank:
            run_on(rank, [fused_by_hand()])
            return []
        with torch.autograd.profiler.profile() as profile:
            run_on(rank, [fused_by_hand()])
        found = profile.function_events or ()
        return [(e.name, len(e.cpu_children)) for e in found if e.name.startswith("PP:")]

    labelled = run_ranks(2, run)[0]
    row = fused_by_hand().rows[0]
    assert sorted(name for name, _ in labelled) == sorted(f"PP:{task}" for task in row)
    assert all(inside for _, inside in labelled)


def test_two_ranks_any_schedule_gives_the_gradients_of_a_plain_loop() -> None:
    schedules = [one_f_one_b(problem(2)), fused_by_hand(), gpipe(problem(2))]
    for schedule in schedules:
        schedule.validate()
        check_channels(schedule)
    results = run_ranks(2, lambda rank: run_on(rank, schedules))
    for pipeline in ("actor", "critic"):
        expected = plain_gradients(pipeline)
        for run in range(len(schedules)):
            actual = joined(results, run, pipeline)[pipeline]
            assert len(actual) == len(expected) == 8
            assert all(map(torch.equal, actual, expected)), f"{run=} {pipeline=}"
    spans = [span for result in results for span in result[1] if span.kind is not Kind.WAIT]
    assert [s.name for s in spans if s.lane == "rank0"] == [
        str(task) for schedule in schedules for task in schedule.rows[0]
    ]
    moved = [
        sum(int(s.args["bytes"]) for s in spans if s.lane == lane) for lane in ("rank0", "rank1")
    ]
    # Every message has two ends: of each model and schedule one per flow and micro-batch.
    assert moved == [len(schedules) * 2 * 2 * sum(ROWS) * WIDTH * 4] * 2
    waits = [s for result in results for s in result[1] if s.kind is Kind.WAIT]
    assert all((s.lane, s.args["peer"]) in {("rank0", "rank1"), ("rank1", "rank0")} for s in waits)
    assert any(s.args["what"] == "receive activation" for s in waits)


def test_several_stages_of_a_model_on_one_rank() -> None:
    folded = Pipeline.make("actor", (0, 1, 1, 0), 3, 1, 2, interleaved=True)
    schedule = gpipe(Problem(2, (folded,)))
    check_channels(schedule)
    results = run_ranks(2, lambda rank: run_on(rank, [schedule]))
    actual = joined(results, 0, "actor")["actor"]
    assert all(map(torch.equal, actual, plain_gradients("actor")))


class Failing(AutogradRunner):
    """Raises, hangs or dies at one task."""

    hang_s = 0.0

    def backward(self, microbatch: int, gradient: torch.Tensor | None) -> torch.Tensor | None:
        time.sleep(max(0.0, self.hang_s))
        if self.hang_s < 0:
            os._exit(1)
        raise ValueError("the model broke")


def fail_on(
    rank: int, hang_s: float, timeout_s: float, *, catch: bool = True, local: bool = True
) -> tuple[str, float]:
    schedule = gpipe(problem(4))
    channels = Channels(
        rank,
        {pipe.name: pipe.stages for pipe in schedule.problem.pipelines},
        device=CPU,
        dtype=torch.float32,
        timeout=timedelta(seconds=timeout_s),
        local=local,
    )
    runners = {}
    for pipe in schedule.problem.pipelines:
        stage = pipe.stages.index(rank)
        compute = stage_compute(stage_module(pipe.name, stage, 4), pipe.name, stage == 3)
        kind = Failing if (pipe.name, stage) == ("actor", 2) else AutogradRunner
        runners[pipe.name, stage] = kind(compute, last=stage == 3)
    Failing.hang_s = hang_s
    executor = Executor(rank, channels, runners, HostClock(), _get_default_store())
    shapes = {p.name: [(ROWS[m], WIDTH) for m in range(3)] for p in schedule.problem.pipelines}
    start = time.monotonic()
    try:
        executor.run(schedule, shapes, [])
    except StepFailed as error:
        if not catch:
            raise
        return str(error), time.monotonic() - start
    return "", 0.0


@pytest.mark.parametrize("local", [False, True])
def test_a_rank_that_raises_ends_all_ranks_at_once_and_all_name_the_task(local: bool) -> None:
    results = run_ranks(4, lambda rank: fail_on(rank, 0.0, 15.0, local=local))
    for rank, (message, seconds) in enumerate(results):
        assert "rank 2 failed at actor:2B0: ValueError: the model broke" in message
        assert "<-- ERROR HERE" in message
        assert seconds < 5.0
        if rank != 2:
            assert message.startswith(f"rank {rank} stopped at ")


@pytest.mark.slow
@pytest.mark.parametrize("local", [False, True])
def test_a_rank_that_hangs_ends_the_others_at_the_time_limit_and_all_name_it(local: bool) -> None:
    """Also those that wait for a rank that waits itself."""
    results = run_ranks(4, lambda rank: fail_on(rank, 5.0, 2.0, local=local))
    for rank in (0, 1, 3):
        message, seconds = results[rank]
        assert message.startswith(f"rank {rank} stopped at ")
        assert "because rank 2 hangs at actor:2B0, found by rank " in message
        assert "<-- ERROR HERE" in message
        assert 1.0 < seconds < 4.5


@pytest.mark.parametrize("local", [False, True])
def test_a_rank_that_dies_ends_the_others_at_once(local: bool) -> None:
    start = time.monotonic()
    with pytest.raises(RuntimeError) as caught:
        run_ranks(4, lambda rank: fail_on(rank, -1.0, 30.0, catch=False, local=local))
    assert time.monotonic() - start < 10.0
    message = str(caught.value)
    assert "rank 2: died" in message
    assert "(rank 2 to rank 1): " in message  # what rank 1 waited for
    assert all(f"rank {rank}: Traceback" in message for rank in (0, 1, 3))


def test_operations_of_the_hand_made_schedule_include_all_four() -> None:
    assert {task.op for row in fused_by_hand().rows for task in row} == set(Op)


def test_four_ranks_over_process_groups() -> None:
    schedules = [one_f_one_b(problem(4))]
    results = run_ranks(4, lambda rank: run_on(rank, schedules, local=False))
    for pipeline in ("actor", "critic"):
        actual = joined(results, 0, pipeline)[pipeline]
        assert all(map(torch.equal, actual, plain_gradients(pipeline)))
