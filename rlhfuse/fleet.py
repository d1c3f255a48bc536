"""The controller's view of its workers: who they are, what they say, whether they live.

Every wait has a name and a time limit, and says what it is waiting for.
"""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from rlhfuse import messages as m
from rlhfuse.cluster import Cluster
from rlhfuse.placement import WorkerSpec
from rlhfuse.timeline import Span
from rlhfuse.transport import Hub

logger = logging.getLogger(__name__)

_POLL_S = 0.25
_CHECK_ALIVE_S = 2.0
EventT = TypeVar("EventT", bound=m.Message)


class WorkerFailed(RuntimeError):
    """A worker cannot go on. `user_error`: because of what the user gave."""

    def __init__(self, text: str, *, user_error: bool = False) -> None:
        super().__init__(text)
        self.user_error = user_error


class Fleet:
    """All workers of a run, by name."""

    def __init__(self, hub: Hub, cluster: Cluster, timeout_s: float) -> None:
        self._hub = hub
        self._cluster = cluster
        self._timeout_s = timeout_s
        self._endpoints: dict[str, str] = {}
        self._spans: list[Span] = []
        self._checked_s = 0.0
        self.pids: dict[str, int] = {}
        self.rollout: tuple[str, ...] = ()
        self.training: tuple[str, ...] = ()

    def start(self, specs: Sequence[WorkerSpec]) -> None:
        """Start the workers and wait until each has said hello."""
        self._cluster.start(specs)
        self.rollout = tuple(spec.name for spec in specs if spec.kind == "rollout")
        self.training = tuple(spec.name for spec in specs if spec.kind == "training")
        for worker, hello in self.gather(m.Hello, [s.name for s in specs], "workers to start"):
            if hello.protocol != m.PROTOCOL_VERSION:
                raise WorkerFailed(
                    f"{worker} speaks protocol {hello.protocol}, not {m.PROTOCOL_VERSION}: "
                    "the cluster runs another rlhfuse"
                )
            self._endpoints[worker] = hello.endpoint
            self.pids[worker] = hello.pid

    def endpoint(self, worker: str) -> str:
        """Where a worker's payloads can be fetched."""
        return self._endpoints[worker]

    def send(self, worker: str, command: m.Command) -> None:
        """Queue a command. Raises WorkerFailed where the worker is gone."""
        try:
            self._hub.send(worker, command)
        except ConnectionError as error:
            raise WorkerFailed(str(error)) from error

    def broadcast(self, workers: Iterable[str], command: m.Command) -> None:
        for worker in workers:
            self.send(worker, command)

    def receive(self, timeout_s: float = _POLL_S) -> list[tuple[str, m.Event]]:
        """Events at hand but spans, which are kept for `take_spans`.

        Raises:
            WorkerFailed: a worker reported a failure, or its process ended.
        """
        passed: list[tuple[str, m.Event]] = []
        for worker, event in self._hub.receive(timeout_s):
            if isinstance(event, m.Spans):
                self._spans.extend(event.spans)
            elif isinstance(event, m.Failed):
                self._fail(event)
            else:
                passed.append((worker, event))
        if not passed:
            self._check_alive()
        return passed

    def gather(
        self,
        kind: type[EventT],
        workers: Sequence[str],
        what: str,
        progress: Callable[[int], None] | None = None,
        meanwhile: Callable[[str, m.Event], None] | None = None,
    ) -> list[tuple[str, EventT]]:
        """One event of `kind` from each worker, in the order of `workers`. `progress` hears how
        many there are; events of other kinds go to `meanwhile`.

        Raises:
            WorkerFailed: one failed, or nothing came within the time limit.
        """
        missing = set(workers)
        found: dict[str, EventT] = {}
        deadline = time.monotonic() + self._timeout_s
        while missing:
            for worker, event in self.receive():
                deadline = time.monotonic() + self._timeout_s
                if not isinstance(event, kind):
                    assert meanwhile is not None, (
                        f"{worker} said {type(event).__name__} while waiting for {what}"
                    )
                    meanwhile(worker, event)
                    continue
                assert worker in missing, f"{worker} answered twice while waiting for {what}"
                found[worker] = event
                missing.discard(worker)
                if progress is not None:
                    progress(len(found))
            if missing and time.monotonic() > deadline:
                raise WorkerFailed(
                    f"waited {self._timeout_s:g} s for {what}: nothing from "
                    f"{', '.join(sorted(missing))} (trainer.wait_timeout_s)"
                )
        return [(worker, found[worker]) for worker in workers]

    def take_spans(self) -> list[Span]:
        """Spans reported since the last call."""
        spans, self._spans = self._spans, []
        return spans

    def shutdown(self) -> None:
        """Ask every worker to end, and give them a moment to."""
        for worker in (*self.rollout, *self.training):
            try:
                self._hub.send(worker, m.Shutdown())
            except ConnectionError:
                logger.debug("%s is gone already", worker)
        deadline = time.monotonic() + 5.0
        names = {*self.rollout, *self.training}
        while names - set(self._cluster.dead()) and time.monotonic() < deadline:
            time.sleep(0.05)

    def _check_alive(self) -> None:
        if time.monotonic() - self._checked_s < _CHECK_ALIVE_S:
            return
        self._checked_s = time.monotonic()
        dead = self._cluster.dead()
        if not dead:
            return
        # A dying worker's own words are better than Ray's: they may be on their way.
        for _worker, event in self._hub.receive(0.5):
            if isinstance(event, m.Failed):
                self._fail(event)
        name, reason = next(iter(dead.items()))
        raise WorkerFailed(f"{name} is dead: {reason}")

    def _fail(self, event: m.Failed) -> None:
        if not event.user_error:
            logger.error("%s", event.traceback)
        raise WorkerFailed(f"{event.worker}: {event.error}", user_error=event.user_error)
