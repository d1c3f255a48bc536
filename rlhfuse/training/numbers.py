"""What all ranks must know of a mini-batch before anyone steps: gradient norms and losses."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from rlhfuse.training.control import Control
from rlhfuse.training.trained_stage import TrainedStage


@dataclass(frozen=True, slots=True)
class Numbers:
    """Of one role: the global norm of its gradient, and its loss."""

    norm: float
    loss: float


def exchange(
    stages: Sequence[TrainedStage],
    num_stages: Mapping[str, int],
    control: Control,
) -> dict[str, Numbers]:
    """The numbers of every role in `num_stages`, from this rank's `stages` and those of all ranks.
    Collective.

    Squares are summed in float64, in stage order: the same on every rank and for every schedule.
    Replicas hold the same summed gradients, so the first one counts; losses add up.
    """
    slots: dict[tuple[str, int], int] = {}
    for role in sorted(num_stages):
        for s in range(num_stages[role] + 1):
            slots[role, s] = len(slots)
    numbers = torch.zeros(len(slots), dtype=torch.float64)
    for stage in stages:
        copied = stage.stage.tied_parameter if stage.stage.last else None
        if stage.replica == 0:
            numbers[slots[stage.role, stage.pp_stage]] = stage.optimizer.square_sum(copied)
        if stage.stage.last:
            numbers[slots[stage.role, stage.pp_stage + 1]] = stage.loss()
    control.sum_up(numbers)
    found = {}
    for role in sorted(num_stages):
        *squares, loss = [float(numbers[at]) for (r, _), at in slots.items() if r == role]
        found[role] = Numbers(math.sqrt(sum(squares)), loss)
    return found
