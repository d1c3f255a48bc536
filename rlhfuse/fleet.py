"""The controller's view of its workers: who they are, what they say, whether they live.

A rollout worker that dies or hangs is replaced while the others go on; it takes part again when it
has the current weights. A training worker takes the step with it. Every wait has a name and a time
limit, and says what it is waiting for.
"""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from rlhfuse import messages as m
from rlhfuse.cluster import Cluster
from rlhfuse.config import TrainerConfig
from rlhfuse.members import Member, TooFew, TrainingLost, WorkerFailed
from rlhfuse.placement import WorkerSpec
from rlhfuse.roster import Roster
from rlhfuse.timeline import Span
from rlhfuse.transport import Hub

__all__ = ["Fleet", "TooFew", "TrainingLost", "WorkerFailed"]

logger = logging.getLogger(__name__)

_POLL_S = 0.25
_QUIET_S = 5.0  # then a wait says what it waits for
_END_LIMIT_S = 5.0
# Another process may do better after these: somebody else died, or a device or a network failed.
_TRANSIENT = (
    "PeerLost",
    "DistBackendError",
    "DistNetworkError",
    "AcceleratorError",
    "TCPStore",
    # gloo's own words, where nobody has put others in their place
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
)
EventT = TypeVar("EventT", bound=m.Message)


class Fleet:
    """All workers of a run, by name."""

    def __init__(
        self,
        hub: Hub,
        cluster: Cluster,
        limits: TrainerConfig,
        *,
        note: Callable[[str], None],
        changed: Callable[[dict[str, int]], None],
    ) -> None:
        """`note` shows a line to the user; `changed` gets all process ids when one is new."""
        self._hub = hub
        self._roster = Roster(cluster, limits, note)
        self._limits = limits
        self._note = note
        self._changed = changed
        self._members = self._roster.by_name
        self._offers: dict[m.Role, m.PullWeights] = {}
        # Under way: how many before it, step, policy version.
        self._step: tuple[int, int, int] | None = None
        self._begun = 0
        self._passed: list[tuple[str, m.Event]] = []
        self._spans: list[Span] = []
        self._written: dict[str, m.Written] = {}  # a training worker's last
        self._told: set[str] = set()  # failures since the last finished step
        self._moved_s = time.monotonic()
        self.rollout: tuple[str, ...] = ()
        self.training: tuple[str, ...] = ()

    # --- who they are ----------------------------------------------------------------------

    def start(self, specs: Sequence[WorkerSpec]) -> None:
        """Start the workers and wait until each has said hello."""
        self.rollout = tuple(spec.name for spec in specs if spec.kind == "rollout")
        self.training = tuple(spec.name for spec in specs if spec.kind == "training")
        for spec in specs:
            self._roster.enlist(spec)
        self._await(
            lambda: [w for w in self._members.values() if not w.endpoint and not w.given_up],
            "workers to start",
        )

    @property
    def num_lost(self) -> int:
        """Rollout workers that were lost since the start."""
        return self._roster.num_lost

    @property
    def pids(self) -> dict[str, int]:
        return {name: member.pid for name, member in self._members.items() if member.pid}

    def endpoint(self, worker: str) -> str:
        """Where a worker's payloads can be fetched."""
        return self._members[worker].endpoint

    def detail(self, worker: str) -> str:
        """Device and number type, as the worker said."""
        return self._members[worker].detail

    def serving(self) -> dict[int, str]:
        """The instances that take part in the step under way, and the process that each is."""
        return {
            instance: self._members[name].spec.identity
            for instance, name in enumerate(self.rollout)
            if self._members[name].up
            and self._step is not None
            and self._members[name].begun == self._step
        }

    # --- what they are told ----------------------------------------------------------------

    def send(self, worker: str, command: m.Command) -> None:
        """Queue a command. What a lost rollout worker is told goes nowhere."""
        member = self._members[worker]
        try:
            self._hub.send(member.spec.identity, command)
        except ConnectionError as error:
            if member.spec.kind == "training":
                raise TrainingLost(str(error)) from error
            logger.info("%s", error)

    def broadcast(self, workers: Iterable[str], command: m.Command) -> None:
        for worker in workers:
            self.send(worker, command)

    def begin_step(self, step: int, policy_version: int) -> None:
        """Rollout workers that have this version of all weights take part; others as soon as they
        have it."""
        self._begun += 1
        self._step = (self._begun, step, policy_version)
        for member in self._roster.of("rollout"):
            self._let_begin(member)

    def offer(self, pull: m.PullWeights) -> None:
        """Every rollout worker gets these weights, also one that starts later."""
        self._offers[pull.role] = pull
        for member in self._roster.of("rollout"):
            self._ask_to_pull(member)

    def withdraw(self) -> None:
        """The weights are about to change: nobody may fetch them any more."""
        self._offers.clear()
        self._step = None

    def await_weights(self, what: str) -> None:
        """Until every rollout worker that is up has what is offered, and at least one is."""
        self._await(self._without_weights, what)

    def _without_weights(self) -> list[Member]:
        up = [member for member in self._roster.of("rollout") if member.up]
        if not up:
            return [member for member in self._roster.of("rollout") if not member.given_up]
        return [member for member in up if not self._holds_all(member)]

    def _holds_all(self, member: Member) -> bool:
        return all(
            member.held.get(role) == (pull.version, pull.digest)
            for role, pull in self._offers.items()
        )

    def _ask_to_pull(self, member: Member) -> None:
        for role, pull in self._offers.items():
            wanted = (pull.version, pull.digest)
            if member.up and not member.resetting and member.asked.get(role) != wanted:
                member.asked[role] = wanted
                self.send(member.name, pull)

    def _let_begin(self, member: Member) -> None:
        """An instance that is not up to date never gets as far as this."""
        if not member.up or self._step is None or member.begun == self._step:
            return
        _, step, version = self._step
        current = self._offers and all(p.version == version for p in self._offers.values())
        if current and self._holds_all(member):
            if member.spec.incarnation and member.begun is None:
                self._note(f"{member.name} is back, with the weights of version {version}")
            member.begun = self._step
            self.send(member.name, m.BeginStep(step=step, policy_version=version))

    # --- what they say ---------------------------------------------------------------------

    def receive(self, timeout_s: float = _POLL_S) -> list[tuple[str, m.Event]]:
        """Events at hand but those that only the fleet needs; spans are kept for `take_spans`.

        Raises:
            TrainingLost: a training worker is gone, or hangs.
            TooFew: the last rollout worker is gone, or hangs.
            WorkerFailed: a worker reported what another process would do no better.
        """
        self._listen(timeout_s)
        if self._roster.check(lambda: self._listen(0.05)):
            for member in self._roster.of("rollout"):
                self._ask_to_pull(member)
        passed, self._passed = self._passed, []
        return passed

    def gather(
        self,
        kind: type[EventT],
        workers: Sequence[str],
        what: str,
        progress: Callable[[int], None] | None = None,
        meanwhile: Callable[[str, m.Event], None] | None = None,
    ) -> list[tuple[str, EventT]]:
        """One event of `kind` from each training worker in `workers`, in their order. `progress`
        hears how many there are; events of other kinds go to `meanwhile`.

        Raises:
            WorkerFailed: as `receive`, or nothing came within the time limit.
        """
        found: dict[str, EventT] = {}

        def missing() -> list[Member]:
            for worker, event in self.receive():
                if worker not in workers:
                    continue  # a rollout worker's, of a step that is over
                self._moved_s = time.monotonic()
                if not isinstance(event, kind):
                    assert meanwhile is not None, (
                        f"{worker} said {type(event).__name__} while waiting for {what}"
                    )
                    meanwhile(worker, event)
                    continue
                assert worker not in found, f"{worker} answered twice while waiting for {what}"
                found[worker] = event
                if progress is not None:
                    progress(len(found))
            return [self._members[worker] for worker in workers if worker not in found]

        self._await(missing, what, listens=True)
        return [(worker, found[worker]) for worker in workers]

    def take_spans(self) -> list[Span]:
        """Spans reported since the last call."""
        spans, self._spans = self._spans, []
        return spans

    def written(self, ticket: int) -> dict[str, m.Written]:
        """Which training workers have written their part of the checkpoint with this ticket."""
        return {name: told for name, told in self._written.items() if told.ticket == ticket}

    def finished_step(self) -> None:
        """Whoever was restarted has proved itself: restarts are counted anew."""
        self._told.clear()
        for member in self._members.values():
            member.restarts = 0

    def _await(
        self, missing: Callable[[], list[Member]], what: str, *, listens: bool = False
    ) -> None:
        """Until nobody is `missing`, which `listens` by itself, or events are left to others."""
        self._moved_s = time.monotonic()
        say_after_s = _QUIET_S
        before = -1
        while late := missing():
            now = time.monotonic()
            if len(late) != before:
                before, self._moved_s, say_after_s = len(late), now, _QUIET_S
            names = ", ".join(f"{member.name} ({member.at()})" for member in late)
            if now - self._moved_s > self._limits.wait_timeout_s:
                raise WorkerFailed(
                    f"waited {self._limits.wait_timeout_s:g} s for {what}: nothing from {names} "
                    "(trainer.wait_timeout_s)"
                )
            if now - self._moved_s > say_after_s:
                say_after_s *= 2
                self._note(f"waiting for {what}: {names}")
            if not listens:
                self._passed = self.receive()

    def _listen(self, timeout_s: float) -> None:
        for identity, event in self._hub.receive(timeout_s):
            self._take(identity, event)

    def _take(self, identity: str, event: m.Event) -> None:
        member = self._roster.by_identity.get(identity)
        if member is None:
            logger.debug("dropped %s from %s, which is no worker (any more)", event, identity)
            return
        member.heard, member.silent_s = True, 0.0
        if isinstance(event, m.Pulse):
            member.pulse = event
            return
        member.told_s = time.monotonic()
        match event:
            case m.Spans():
                self._spans.extend(event.spans)
            case m.Written():
                self._written[member.name] = event
            case m.Failed():
                self._failed(member, event)
            case m.Hello():
                self._welcome(member, event)
            case m.WeightsReady():
                self._arrived(member, event)
            case m.Ack(command="Reset"):
                member.resetting = False
                self._ask_to_pull(member)
            case _ if not member.resetting:
                self._passed.append((member.name, event))

    def _welcome(self, member: Member, hello: m.Hello) -> None:
        member.endpoint, member.pid, member.detail = hello.endpoint, hello.pid, hello.detail
        self._changed(self.pids)
        if member.spec.kind == "rollout":
            self._ask_to_pull(member)

    def _arrived(self, member: Member, ready: m.WeightsReady) -> None:
        if ready.error:
            logger.warning("%s: %s", member.name, ready.error)
            member.asked.pop(ready.role, None)  # asked again at the next check
            return
        member.held[ready.role] = (ready.version, ready.digest)
        self._let_begin(member)

    def _failed(self, member: Member, event: m.Failed) -> None:
        """A worker's last words."""
        again = event.error in self._told
        self._told.add(event.error)
        if member.spec.kind == "training" and any(t in event.error for t in _TRANSIENT):
            logger.info("%s", event.traceback)
            raise TrainingLost(self._roster.culprit() or f"{member.name}: {event.error}")
        if event.user_error or again or member.spec.kind == "training":
            if not event.user_error:
                logger.error("%s", event.traceback)
            raise WorkerFailed(f"{member.name}: {event.error}", user_error=event.user_error)
        logger.warning("%s", event.traceback)
        self._roster.lost(member, f"{event.where}: {event.error}")

    # --- begin again, and end --------------------------------------------------------------

    def restart_training(self, store: tuple[str, int]) -> None:
        """End all training workers and start new ones, which hold nothing yet and meet at `store`;
        rollout workers forget the step under way."""
        self.withdraw()
        self._passed.clear()
        self._written.clear()
        rollouts = self._roster.of("rollout")
        for member in rollouts:
            member.asked.clear()
            member.held.clear()
            if member.up:
                member.resetting = True
                self.send(member.name, m.Reset())
        trained = self._roster.replace_training(store)
        self._await(
            lambda: (
                [w for w in trained if not w.endpoint]
                + [w for w in rollouts if w.resetting and w.up]
            ),
            "restart of the training workers",
        )
        self._passed.clear()

    def shutdown(self) -> None:
        """Ask every worker to end, and give them a moment to."""
        alive = set(self._roster.by_identity)
        for member in self._roster.by_identity.values():
            try:
                self._hub.send(member.spec.identity, m.Shutdown())
            except ConnectionError:
                logger.debug("%s is gone already", member.name)
        deadline = time.monotonic() + _END_LIMIT_S
        while alive and time.monotonic() < deadline:
            alive -= set(self._roster.ended())
            time.sleep(0.05)
