"""Labels any PyTorch pipeline loop, so that the profiler knows what ran when.

    with record(Path("trace"), rank=rank, stage=stage) as recorder:
        for step in range(steps):
            with recorder.step(step):
                with recorder.task("F", microbatch):
                    ...

Every rank writes ``step_N.rank_R.json``; ``rlhfuse profile trace`` reads them together. While
PyTorch's own profiler runs, its trace carries the same labels. On a GPU, times are those of the
current stream, by events: nothing is synchronised before a step ends.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import record_function

from rlhfuse.schedules.ir import Op, Task
from rlhfuse.timeline import Kind, Span, Timeline, save_chrome
from rlhfuse.training.clock import Mark, clock_of


class Recorder:
    """Collects one rank's tasks; made by `record`."""

    def __init__(self, folder: Path, rank: int, stage: int, device: torch.device) -> None:
        self._folder = folder
        self._rank = rank
        self._stage = stage
        self._clock = clock_of(device)
        self._marks: list[tuple[Kind, str, Mark, Mark]] = []

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
    def step(self, number: int) -> Iterator[None]:
        """One step; its file is written when it ends."""
        self._marks.clear()
        self._clock.start()
        yield
        lane, seconds = f"rank{self._rank}", self._clock.seconds
        spans = tuple(
            Span(lane, seconds(begin), seconds(end), kind, name)
            for kind, name, begin, end in self._marks
        )
        self._folder.mkdir(parents=True, exist_ok=True)
        save_chrome(Timeline(spans), self._folder / f"step_{number}.rank_{self._rank}.json")


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
