"""What ``rlhfuse plan`` answers: the field names are a contract."""

from dataclasses import dataclass

import msgspec

from rlhfuse.planner.step import StageSeconds
from rlhfuse.timeline import Timeline


class Pair(msgspec.Struct, frozen=True):
    """Serial and fused seconds."""

    serial: float
    fused: float


class StagePair(msgspec.Struct, frozen=True):
    serial_s: float
    fused_s: float


class Memory(msgspec.Struct, frozen=True):
    """Bytes of one device. `weights`: trained models with their gradient sums, and the generation
    engine's copy; `total` counts the larger of activations and keys and values, which are never
    there together; `offloaded`: optimizer and training weights in host memory while generating."""

    weights: float
    optimizer: float
    activations: float
    kv: float
    total: float
    capacity: float
    offloaded: bool


class Worth(msgspec.Struct, frozen=True):
    """Whether a fusion pays, by how much of the serial step, and why (not)."""

    worthwhile: bool
    saving_fraction: float
    reason: str


class Worthwhile(msgspec.Struct, frozen=True):
    inter_stage: Worth
    intra_stage: Worth


class WhatIfRow(msgspec.Struct, frozen=True):
    """The same plan under one other condition; throughput in samples per second, fused."""

    name: str
    devices: int
    response_length: int
    train_batch_size: int
    serial_s: float
    fused_s: float
    speedup: float
    samples_per_s: float


class PlanSummary(msgspec.Struct, frozen=True, kw_only=True):
    """`bubble` and `bubble_serial`: parts of all device time in which nothing is computed, by
    cause; they belong to the fused and the serial step. `limits`: what the fused step consists
    of; `next_steps`: what would help most, best first."""

    hardware: str
    num_devices: int
    step_s: Pair
    stages: dict[str, StagePair]
    bubble: dict[str, float]
    bubble_serial: dict[str, float]
    memory_per_device: Memory
    fits: bool
    recommended: dict[str, int | float | str | bool]
    worthwhile: Worthwhile
    limits: list[str]
    next_steps: list[str]
    what_if: list[WhatIfRow]
    assumed: list[str]
    warnings: list[str]
    seconds: float

    @property
    def speedup(self) -> float:
        return self.step_s.serial / self.step_s.fused


@dataclass(frozen=True, slots=True)
class Plan:
    """The summary, and the timelines behind it."""

    summary: PlanSummary
    serial: Timeline
    fused: Timeline


def stage_pairs(serial: StageSeconds, fused: StageSeconds) -> dict[str, StagePair]:
    """By the contract's names."""
    return {
        name: StagePair(getattr(serial, name), getattr(fused, name))
        for name in ("generation", "inference", "training", "other")
    }
