"""Scores from a user's function or from a service, one small interface for both.

`submit` samples, `poll` results as they come, `close` at the end.
"""

from collections.abc import Sequence
from typing import Protocol

from rlhfuse.config import RewardConfig
from rlhfuse.reward_desk import RewardInput, RewardResult
from rlhfuse.reward_pool import RewardPool
from rlhfuse.reward_service import RewardService


class RewardSource(Protocol):
    """A reward function or service in use."""

    @property
    def outstanding(self) -> int:
        """Samples submitted and not yet returned by `poll`."""

    def submit(self, samples: Sequence[RewardInput]) -> None:
        """Ask for scores; returns at once."""

    def poll(self, timeout_s: float) -> list[RewardResult]:
        """The results that are there; waits up to `timeout_s` for the first.

        Raises:
            RewardFailed: a sample could not be scored and `reward.on_error` is ``fail``.
        """

    def close(self) -> None:
        """End all processes and requests; what is outstanding is lost."""


def open_rewards(config: RewardConfig) -> RewardSource | None:
    """The function or service of `config`; None where a reward model scores.

    Raises:
        ValueError: the function does not load, or the service's token is not set.
    """
    if config.function is not None:
        return RewardPool(config.function, config)
    return RewardService(config) if config.url else None
