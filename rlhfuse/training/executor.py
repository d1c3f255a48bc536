"""The executor: one rank runs its row of a schedule, task by task.

It knows nothing of models: a `StageRunner` computes, `Channels` carry. Every task and every wait
becomes a span on the lane of the rank.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch.autograd import profiler as autograd_profiler
from torch.autograd.profiler import record_function
from torch.distributed.distributed_c10d import Store

from rlhfuse.schedules.ir import Op, Schedule, Task
from rlhfuse.timeline import ArgValue, Kind, Span
from rlhfuse.training.channels import Channels, Ports, Shapes
from rlhfuse.training.clock import Clock, Mark
from rlhfuse.training.failure import Lookout, Position, StepFailed, tell_failure
from rlhfuse.training.links import Message, RowPlan, Step, plan_row

_KINDS = {op: Kind(op.value) for op in Op}
SHORTEST_WAIT_S = 20e-6
"""Shorter waits are the cost of asking, and get no span."""


Compute = Callable[[torch.Tensor | None], torch.Tensor | None]
"""One task: what it received to what it sends."""


class StageRunner(Protocol):
    """Computes the tasks of one pipeline stage. Tensors in and out are message-shaped."""

    def forward(self, microbatch: int, received: torch.Tensor | None) -> torch.Tensor | None:
        """`received`: the previous stage's output, None on the first. Returns this stage's
        output, None on the last."""

    def backward(self, microbatch: int, gradient: torch.Tensor | None) -> torch.Tensor | None:
        """`gradient`: of this stage's output, None on the last. Adds to the parameters' gradients
        and returns the gradient of the received input, None on the first stage."""

    def input_gradient(self, microbatch: int, gradient: torch.Tensor | None) -> torch.Tensor | None:
        """As `backward`, but leaves gradients of weights to `weight_gradient`."""

    def weight_gradient(self, microbatch: int) -> None:
        """Add what `input_gradient` left to the parameters' gradients."""


def task_label(task: Task) -> AbstractContextManager[object]:
    """The task's label in PyTorch's profiler, where one is at work. Only there: on a core that
    has just waited, a label costs a quarter of a millisecond, profiler or not."""
    profiled = autograd_profiler._is_profiler_enabled
    return record_function(f"PP:{task}") if profiled else nullcontext()


class Executor:
    """Runs schedules on one rank."""

    def __init__(
        self,
        rank: int,
        channels: Channels,
        runners: Mapping[tuple[str, int], StageRunner],
        clock: Clock,
        store: Store,
        explain: Callable[[Exception], str] = lambda error: f"{type(error).__name__}: {error}",
        tp: int = 1,
    ) -> None:
        """`runners`: by (pipeline, pp_stage), those of this rank. `store`: where a rank that fails
        leaves word for the others. `explain`: says what went wrong, in one line. `tp`: ranks that
        share a row of schedules."""
        self._rank = rank
        self._row, column = divmod(rank, tp)
        self._position = Position(rank, self._row, lambda row: row * tp + column)
        self._lookout = Lookout(
            store, self._position, min(1.0, channels.timeout.total_seconds() / 4)
        )
        self._channels = channels
        self._runners = runners
        self._clock = clock
        self._store = store
        self._explain = explain
        self._planned: tuple[Schedule, RowPlan] | None = None
        self._round = 0

    def run(
        self,
        schedule: Schedule,
        shapes: Shapes,
        spans: list[Span],
        done: Callable[[Task], None] | None = None,
    ) -> None:
        """Run this rank's row and append what was measured to `spans`; `done` hears of every
        task that is complete (on a GPU: queued).

        Raises:
            StepFailed: a task failed, or a peer did. The channels are closed: nothing more can be
                run.
        """
        plan = self._plan(schedule)
        self._round += 1
        measured: list[_Measured] = []
        self._clock.start()
        with self._lookout:
            try:
                ports = self._channels.open(plan, shapes)
                ready = [self._ready(step, ports) for step in plan.steps]
                self._run_row(ready, ports.refill, done, measured)
                ports.drain()
            except Exception as error:
                raise self._failed(schedule, self._lookout.step, error) from error
        spans.extend(self._spans(measured, shapes))

    def _plan(self, schedule: Schedule) -> RowPlan:
        """This rank's part; made once where a schedule, which never changes, runs again."""
        if self._planned is None or self._planned[0] is not schedule:
            self._planned = schedule, plan_row(schedule, self._row)
        return self._planned[1]

    def _ready(self, step: Step, ports: Ports) -> "_Ready":
        """All that can be looked up before the first task."""
        return _Ready(
            step,
            None if step.receives is None else ports.receiver(step.receives),
            self._computes(step.task),
            None if step.sends is None else ports.sender(step.sends),
        )

    def _computes(self, task: Task) -> Compute:
        runner = self._runners[task.pipeline, task.pp_stage]
        if task.op is Op.F:
            return partial(runner.forward, task.microbatch)
        if task.op is Op.B:
            return partial(runner.backward, task.microbatch)
        if task.op is Op.I:
            return partial(runner.input_gradient, task.microbatch)
        return lambda _: runner.weight_gradient(task.microbatch)

    def _run_row(
        self,
        ready: Sequence["_Ready"],
        refill: Callable[[], None] | None,
        done: Callable[[Task], None] | None,
        measured: list["_Measured"],
    ) -> None:
        """Receive, compute, send; the books are kept afterwards. Whoever runs here has just slept:
        every line between two tasks is cold, and other ranks wait for its end."""
        mark, thread_time, lookout = self._clock.mark, time.thread_time, self._lookout
        before_s = thread_time()
        for step, receive, compute, send in ready:
            start = arrived = mark()
            lookout.step, lookout.awaits = step, step.receives
            received = None
            if receive is not None:
                received = receive()
                arrived = mark()
                lookout.awaits = None
            if autograd_profiler._is_profiler_enabled:
                with task_label(step.task):
                    result = compute(received)
            else:
                result = compute(received)
            end = sent = mark()
            if send is not None:
                assert result is not None, f"{step.task} made nothing to send"
                lookout.awaits = step.sends
                send(result)
                sent = mark()
            if refill is not None:
                refill()
            now_s = thread_time()
            measured.append((step, start, arrived, end, sent, now_s - before_s))
            before_s = now_s
            if done is not None:
                done(step.task)

    def _spans(self, measured: list["_Measured"], shapes: Shapes) -> Iterator[Span]:
        lane, seconds = f"rank{self._rank}", self._clock.seconds
        for step, started, arrived, ended, was_sent, cpu_s in measured:
            task, receives, sends = step.task, step.receives, step.sends
            name, start, end = str(task), seconds(arrived), seconds(ended)
            args: dict[str, ArgValue] = {
                "pipeline": task.pipeline,
                "pp_stage": task.pp_stage,
                "microbatch": task.microbatch,
                "rows": shapes[task.pipeline][task.microbatch][0],
                "round": self._round,
            }
            if receives is not None:
                began = seconds(started)
                if start - began >= SHORTEST_WAIT_S and not receives.local:
                    yield Span(lane, began, start, Kind.WAIT, name, args | self._wait(receives))
            moved = sum(self._channels.size(m) for m in (receives, sends) if m is not None)
            own: dict[str, ArgValue] = {"bytes": moved, "cpu_s": round(cpu_s, 6)}
            yield Span(lane, start, end, _KINDS[task.op], name, args | own)
            if sends is not None:
                sent = seconds(was_sent)
                if sent - end >= SHORTEST_WAIT_S and not sends.local:
                    yield Span(lane, end, sent, Kind.WAIT, name, args | self._wait(sends))

    def _wait(self, message: Message) -> dict[str, ArgValue]:
        """What a span of waiting for a message, or for its channel, says of it."""
        way = message.channel
        incoming = way.target == self._row
        return {
            "bytes": self._channels.size(message),
            "peer": f"rank{way.source if incoming else way.target}",
            "what": f"{'receive' if incoming else 'send'} {way.flow.value}",
        }

    def _failed(self, schedule: Schedule, at: Step | None, error: Exception) -> StepFailed:
        """What to raise, once others can know of it."""
        why = self._explain(error)
        text = tell_failure(self._store, schedule, self._position, at, error, why)
        self._channels.close()
        return StepFailed(text)


class _Ready(NamedTuple):
    """A step and what does it."""

    step: Step
    receive: Callable[[], torch.Tensor] | None
    compute: Compute
    send: Callable[[torch.Tensor], None] | None


_Measured = tuple[Step, Mark, Mark, Mark, Mark, float]
"""A step: when it began to wait for its message, had it, was computed, and had sent; processor time
of all that: where a task on a CPU took much longer, others used the core."""
