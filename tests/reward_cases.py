"""What the tests of reward functions and services ask, and how they collect what comes."""

import time
from typing import Any

import msgspec

from rlhfuse.config import RewardConfig
from rlhfuse.reward_desk import RewardInput, RewardResult
from rlhfuse.rewards import RewardSource


def config(**changes: Any) -> RewardConfig:
    return msgspec.structs.replace(RewardConfig(timeout_s=1.5, on_error="score"), **changes)


def inputs(*solutions: str) -> list[RewardInput]:
    return [
        RewardInput(number, "math", solution, "right", {"bonus": number})
        for number, solution in enumerate(solutions)
    ]


def collect(source: RewardSource, count: int, limit_s: float = 30) -> dict[int, RewardResult]:
    results: list[RewardResult] = []
    end = time.monotonic() + limit_s
    while len(results) < count and time.monotonic() < end:
        results += source.poll(0.2)
    assert len(results) == count
    assert len({result.sample_id for result in results}) == count
    assert source.outstanding == 0
    assert source.poll(5) == []  # nothing is outstanding: does not wait
    return {result.sample_id: result for result in results}
