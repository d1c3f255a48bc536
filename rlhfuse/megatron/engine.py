"""Runs one rank's row of a schedule over one or two Megatron models."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from rlhfuse.megatron.call import Call
from rlhfuse.megatron.channels import FlowGroups
from rlhfuse.megatron.context import ModelContext, Turns
from rlhfuse.megatron.groups import Groups
from rlhfuse.megatron.model_run import ModelRun
from rlhfuse.megatron.orders import most_in_flight
from rlhfuse.megatron.timers import quiet_timers
from rlhfuse.schedules.ir import Op, Schedule, Task
from rlhfuse.timeline import Kind, Span
from rlhfuse.training.carrier import GroupCarrier
from rlhfuse.training.clock import Clock, Mark, clock_of
from rlhfuse.training.exchange import Exchange, Links
from rlhfuse.training.executor import task_label
from rlhfuse.training.failure import Lookout, Position, StepFailed, tell_failure
from rlhfuse.training.form import Form
from rlhfuse.training.links import RowPlan, Step, plan_row

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Model:
    """A model that takes part in a run: its call, groups, and (fused) its own global state."""

    call: Call
    groups: Groups
    context: ModelContext | None = None


@dataclass(frozen=True, slots=True)
class Placed:
    """A schedule with the global rank of each row, seen from one of them."""

    schedule: Schedule
    ranks: tuple[int, ...]
    row: int
    plan: RowPlan

    @classmethod
    def at(cls, schedule: Schedule, ranks: tuple[int, ...]) -> "Placed":
        row = ranks.index(dist.get_rank())
        return cls(schedule, ranks, row, plan_row(schedule, row))


@dataclass(slots=True)
class Recorder:
    """Collects a span per task, marked in the device's own order (CUDA events on a GPU)."""

    clock: Clock
    marks: list[tuple[Task, Mark, Mark]] = field(default_factory=list)

    def spans(self, lane: str) -> Iterator[Span]:
        """What was measured; waits for the device."""
        for task, start, end in self.marks:
            yield Span(
                lane,
                self.clock.seconds(start),
                self.clock.seconds(end),
                Kind(task.op.value),
                str(task),
                {
                    "pipeline": task.pipeline,
                    "pp_stage": task.pp_stage,
                    "microbatch": task.microbatch,
                },
            )


class Engine:
    """Keeps the process groups of pipelines from call to call, and runs schedules."""

    def __init__(self) -> None:
        self._flows: dict[tuple[object, ...], FlowGroups] = {}

    def run(
        self,
        placed: Placed,
        models: Mapping[str, Model],
        recorder: Recorder | None = None,
    ) -> dict[str, list[Any]]:
        """Run this rank's row; each model's results, as Megatron's schedule would return them.

        Raises:
            StepFailed: a task failed, or a peer did: all ranks name the same first failure.
                Nothing more can be run.
        """
        device = next(iter(models.values())).call.device
        with quiet_timers([model.call.config for model in models.values()], device):
            return self._run(placed, models, recorder)

    def _run(
        self, placed: Placed, models: Mapping[str, Model], recorder: Recorder | None
    ) -> dict[str, list[Any]]:
        runs = {name: _model_run(placed, name, model) for name, model in models.items()}
        turns = _turns(models)
        position = Position(dist.get_rank(), placed.row, placed.ranks.__getitem__)
        store = _get_default_store()
        lookout = Lookout(store, position)
        with lookout:
            try:
                exchange = self._exchange(placed, models)
                for name, run in runs.items():
                    turns.to(name)
                    run.begin()
                if recorder is not None:
                    recorder.clock.start()
                for step in placed.plan.steps:
                    turns.to(step.task.pipeline)
                    _run_step(step, runs[step.task.pipeline], exchange, recorder, lookout)
                exchange.drain()
                lookout.step = None
                return {name: _end(turns, name, run) for name, run in runs.items()}
            except Exception as error:
                why = f"{type(error).__name__}: {error}"
                schedule, at = placed.schedule, lookout.step
                text = tell_failure(store, schedule, position, at, error, why)
                self.close()
                raise StepFailed(text) from error
            finally:
                for run in runs.values():
                    run.close()
                turns.end()

    def close(self) -> None:
        """Leave all process groups."""
        while self._flows:
            self._flows.popitem()[1].close()

    def _exchange(self, placed: Placed, models: Mapping[str, Model]) -> Exchange:
        groups, forms = {}, {}
        for name, model in models.items():
            forms[name] = _form(model)
            shapes = forms[name].shape is None
            key = (name, model.groups.pp_ranks, model.call.device, shapes, _world())
            if key not in self._flows:
                ranks, device = model.groups.pp_ranks, model.call.device
                self._flows[key] = FlowGroups(ranks, device, shapes=shapes)
            groups[name] = self._flows[key]
        peer = placed.ranks.__getitem__
        links = Links(
            next(iter(models.values())).call.device,
            GroupCarrier(peer, lambda way: groups[way.pipeline].of(way.flow)),
            lambda message: forms[message.channel.pipeline],
            GroupCarrier(peer, lambda way: groups[way.pipeline].shapes_of(way.flow)),
        )
        return Exchange(links, placed.plan.expected)


def _turns(models: Mapping[str, Model]) -> Turns:
    """Two models never see each other's state; one alone keeps the process's, unless it has its
    own."""
    if len(models) == 1:
        return Turns({name: m.context for name, m in models.items()})
    return Turns({name: m.context or ModelContext.current() for name, m in models.items()})


def _end(turns: Turns, name: str, run: ModelRun) -> list[Any]:
    turns.to(name)
    return run.end()


def _run_step(
    step: Step, run: ModelRun, exchange: Exchange, recorder: Recorder | None, lookout: Lookout
) -> None:
    lookout.step, lookout.awaits = step, step.receives
    received = None if step.receives is None else exchange.receive(step.receives)
    lookout.awaits = None
    start = None if recorder is None else recorder.clock.mark()
    with task_label(step.task):
        result = run.compute(step.task, received)
    if recorder is not None and start is not None:
        recorder.marks.append((step.task, start, recorder.clock.mark()))
    if step.sends is not None:
        if result is None:
            raise ValueError(f"{step.task} made nothing to send: does its output need a gradient?")
        lookout.awaits = step.sends
        exchange.send(step.sends, result)
        run.sent(step.task)
    exchange.refill()


def recorder_for(device: torch.device) -> Recorder:
    """A recorder with the device's clock."""
    return Recorder(clock_of(device))


def _model_run(placed: Placed, name: str, model: Model) -> ModelRun:
    row = placed.schedule.rows[placed.row]
    split = frozenset(t.microbatch for t in row if t.pipeline == name and t.op is Op.W)
    return ModelRun(model.call, model.groups, split=split, in_flight=most_in_flight(row, name))


def _form(model: Model) -> Form:
    """What the model's messages look like, by Megatron's rule."""
    call, config, groups = model.call, model.call.config, model.groups
    if config.pipeline_dtype is None:
        raise ValueError("pipeline_dtype is None in the model's config; set it for pipelines")
    if config.variable_seq_lengths or getattr(config, "mtp_standalone", False):
        return Form(None, config.pipeline_dtype)
    asked = call.decoder_seq_length if call.decoder_seq_length is not None else call.seq_length
    length = asked // groups.cp_size
    if config.sequence_parallel:
        length //= groups.tp_size
    return Form(
        (length, call.micro_batch_size, config.hidden_size),
        config.pipeline_dtype,
        "set variable_seq_lengths in the config if lengths differ",
    )


def _world() -> int:
    """Tells one initialization of torch.distributed from the next."""
    return id(_get_default_store())
