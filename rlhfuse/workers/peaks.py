"""What a training worker takes in memory at most in a step, beside what its schedules need."""

from collections.abc import Iterable

import torch

from rlhfuse.placement import WorkerSpec
from rlhfuse.planner.training_memory import GIB, planned_peak
from rlhfuse.planner.workload import models_of
from rlhfuse.schedules.ir import Schedule
from rlhfuse.training.memory import take_peak

PEAK_METRIC = "perf/max_memory_allocated_gb"
OVER_PLAN_METRIC = "perf/max_memory_over_plan"


class Peaks:
    """Of one rank: told of the schedules of a step, asked for its metrics."""

    def __init__(self, spec: WorkerSpec, device: torch.device, dtype: torch.dtype) -> None:
        """Raises ValueError for a model folder that cannot be read."""
        self._spec = spec
        self._shapes = models_of(spec.config)
        self._device = device
        self._value_bytes = dtype.itemsize
        self._rounds: list[Schedule] = []

    def ran(self, rounds: Iterable[Schedule]) -> None:
        """These, too, belong to the step."""
        self._rounds += rounds

    def take(self) -> dict[str, float]:
        """The metrics of the step, which is over; those of all ranks are merged by maximum."""
        spec = self._spec
        planned = planned_peak(
            spec.config,
            self._shapes,
            spec.pipelines,
            self._rounds,
            spec.index,
            value_bytes=self._value_bytes,
            cuda=self._device.type == "cuda",
            reference=spec.reference,
        )
        self._rounds = []
        return memory_metrics(spec.index, take_peak(self._device), planned)


def memory_metrics(rank: int, peak: int, planned: int) -> dict[str, float]:
    """From bytes. Planned is what is counted and, for activations, estimated."""
    return {
        PEAK_METRIC: peak / GIB,
        OVER_PLAN_METRIC: peak / planned,
        f"memory/rank{rank}/peak_gb": peak / GIB,
        f"memory/rank{rank}/planned_gb": planned / GIB,
    }
