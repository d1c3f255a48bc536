"""What the live loop asks of its rollout workers."""

from collections.abc import Sequence
from typing import Protocol

from rlhfuse import messages as m


class Workers(Protocol):
    """Named workers, one per instance, that carry out commands in the order in which they came.

    A worker's process may die at any time: `serving` then no longer names it, and nothing more is
    heard of it. Another process may take its place.
    """

    @property
    def rollout(self) -> Sequence[str]:
        """The worker of each instance."""

    @property
    def training(self) -> Sequence[str]:
        """The training worker of each device; used where groups are trained one by one."""

    def serving(self) -> dict[int, str]:
        """The process of each instance that takes part now."""

    def endpoint(self, worker: str) -> str:
        """Where the others fetch what the worker's present process holds; empty: there is none."""

    def send(self, worker: str, command: m.Command) -> None:
        """Queue a command."""

    def receive(self, timeout_s: float) -> Sequence[tuple[str, m.Event]]:
        """What workers said, in order; waits up to `timeout_s` seconds for the first."""
