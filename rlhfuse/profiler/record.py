"""Labels any PyTorch pipeline loop, so that the profiler knows what ran when.

    with record(Path("trace"), rank=rank, stage=stage) as recorder:
        for step in range(steps):
            with recorder.step(step):
                with recorder.task("F", microbatch):
                    ...

Every rank writes ``step_N.rank_R.json``; ``rlhfuse profile trace`` reads them together. While
PyTorch's own profiler runs, its trace carries the same labels. On a GPU, times are those of the
current stream, by events: nothing is synchronised before a step ends.

Megatron's own pipeline loops are labelled from outside, micro-batch by micro-batch, without its
synchronising timers:

    from megatron.core.pipeline_parallel import schedules
    with record(folder, rank=rank, stage=pp_rank) as r, r.megatron(schedules, num_ranks=pp_size):
        with r.step(iteration): train_step(...)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.profiler import record_function

from rlhfuse.schedules.ir import Op, Task
from rlhfuse.timeline import Kind, Span, Timeline, save_chrome
from rlhfuse.training.clock import Mark, clock_of


class MegatronSchedules(Protocol):
    """Megatron's module ``megatron.core.pipeline_parallel.schedules``, as far as it is hooked."""

    forward_step: Callable[..., Any]
    backward_step: Callable[..., Any]


class Recorder:
    """Collects one rank's tasks; made by `record`."""

    def __init__(self, folder: Path, rank: int, stage: int, device: torch.device) -> None:
        self._folder = folder
        self._rank = rank
        self._stage = stage
        self._clock = clock_of(device)
        self._marks: list[tuple[Kind, str, Mark, Mark]] = []
        self._on_step: list[Callable[[], None]] = []

    @contextmanager
    def task(self, op: str, microbatch: int, *, pipeline: str = "model") -> Iterator[None]:
        """One operation (``F``, ``B``, ``I``, ``W``) of this rank's stage on a micro-batch."""
        name = str(Task(pipeline, Op(op), self._stage, microbatch))
        with self.span(Kind(op), name):
            yield

    @contextmanager
    def span(self, kind: Kind, name: str) -> Iterator[None]:
        """Anything else: ``Kind.OPTIMIZER``, ``Kind.TRANSFER``, ..."""
        with record_function(name):
            begin = self._clock.mark()
            yield
            self._marks.append((kind, name, begin, self._clock.mark()))

    @contextmanager
    def megatron(
        self, schedules: MegatronSchedules, *, num_ranks: int, pipeline: str = "model"
    ) -> Iterator[None]:
        """Label what Megatron's pipeline loops compute, while this lasts.

        A backward pass is told by the output it starts from, so that interleaved chunks are told
        apart; nothing is kept alive.

        Args:
            schedules: the module whose `forward_step` and `backward_step` the loops call.
            num_ranks: of the pipeline; chunk c of this rank is stage ``c * num_ranks + stage``.
            pipeline: its name; data-parallel replicas need a name each.
        """
        forward, backward = schedules.forward_step, schedules.backward_step
        seen: dict[int, int] = {}  # forward passes so far, by stage
        task_of: dict[int, tuple[int, int]] = {}  # id of an output -> stage and micro-batch

        def labelled_forward(*args: Any, **kwargs: Any) -> Any:
            stage = self._stage + num_ranks * int(kwargs.get("vp_stage") or 0)
            microbatch = kwargs.get("current_microbatch")
            if not isinstance(microbatch, int):
                microbatch = seen.get(stage, 0)
            seen[stage] = microbatch + 1
            with self.span(Kind.F, str(Task(pipeline, Op.F, stage, microbatch))):
                result = forward(*args, **kwargs)
            task_of[id(_output(result))] = (stage, microbatch)
            return result

        def labelled_backward(*args: Any, **kwargs: Any) -> Any:
            output = args[1] if len(args) > 1 else kwargs.get("output_tensor")
            stage, microbatch = task_of.pop(id(_single(output)), (self._stage, -1))
            if microbatch < 0:
                with self.span(Kind.B, "backward"):
                    return backward(*args, **kwargs)
            with self.span(Kind.B, str(Task(pipeline, Op.B, stage, microbatch))):
                return backward(*args, **kwargs)

        schedules.forward_step, schedules.backward_step = labelled_forward, labelled_backward
        self._on_step.append(seen.clear)
        self._on_step.append(task_of.clear)
        try:
            yield
        finally:
            schedules.forward_step, schedules.backward_step = forward, backward
            self._on_step.clear()

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """One step; its file is written when it ends."""
        self._marks.clear()
        for forget in self._on_step:
            forget()
        self._clock.start()
        yield
        lane, seconds = f"rank{self._rank}", self._clock.seconds
        spans = tuple(
            Span(lane, seconds(begin), seconds(end), kind, name)
            for kind, name, begin, end in self._marks
        )
        self._folder.mkdir(parents=True, exist_ok=True)
        save_chrome(Timeline(spans), self._folder / f"step_{number}.rank_{self._rank}.json")


def _output(result: object) -> object:
    """The output tensor in what Megatron's `forward_step` returns: (output, number of tokens)."""
    return _single(result[0] if isinstance(result, tuple) else result)


def _single(output: object) -> object:
    return output[0] if isinstance(output, list) and len(output) == 1 else output


@contextmanager
def record(
    folder: Path, *, rank: int, stage: int, device: torch.device | None = None
) -> Iterator[Recorder]:
    """Record this rank's pipeline tasks into `folder`.

    Args:
        rank: this device's rank, the lane in the timeline.
        stage: the pipeline stage it runs.
        device: by default the GPU, where there is one.
    """
    usual = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    yield Recorder(folder, rank, stage, device or usual)
