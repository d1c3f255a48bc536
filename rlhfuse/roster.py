"""Which processes are the run's workers, whether they live, and who takes the place of the dead."""

import logging
import time
from collections.abc import Callable, Iterator

from rlhfuse.cluster import Cluster
from rlhfuse.config import TrainerConfig
from rlhfuse.members import Member, TooFew, TrainingLost
from rlhfuse.placement import WorkerSpec

logger = logging.getLogger(__name__)

_CHECK_S = 0.25
_LAST_WORDS_S = 0.3
_CULPRIT_S = 2.0


class Roster:
    """All workers of a run. A rollout worker that is lost is replaced, while restarts last."""

    def __init__(
        self, cluster: Cluster, limits: TrainerConfig, note: Callable[[str], None]
    ) -> None:
        self._cluster = cluster
        self._limits = limits
        self._note = note
        self._checked_s = time.monotonic()
        self.by_name: dict[str, Member] = {}
        self.by_identity: dict[str, Member] = {}  # those with a process
        self.num_lost = 0  # rollout workers, since the start

    def of(self, kind: str) -> list[Member]:
        """The members of a kind, by device."""
        return [member for member in self.by_name.values() if member.spec.kind == kind]

    def enlist(self, spec: WorkerSpec) -> None:
        """Start a worker."""
        self.by_name[spec.name] = Member(spec, time.monotonic())
        self._launch(self.by_name[spec.name])

    def check(self, listen: Callable[[], None]) -> bool:
        """See who has died or hangs; `listen` hears what is on its way. False: too early to look.

        Raises:
            TrainingLost: a training worker is gone, or hangs.
            TooFew: the last rollout worker is gone, or hangs.
        """
        now = time.monotonic()
        passed_s = now - self._checked_s
        if passed_s < _CHECK_S:
            return False
        self._checked_s = now
        for identity, reason in self._dead():
            self._bury(identity, reason, listen)
        for member in list(self.by_identity.values()):
            # What came while nobody listened has been heard by now; a pause of our own is not
            # theirs.
            member.silent_s += min(passed_s, 1.0)
            trouble = member.trouble(
                now, self._limits.heartbeat_timeout_s, self._limits.wait_timeout_s
            )
            if trouble:
                self.lost(member, trouble)
        return True

    def lost(self, member: Member, reason: str) -> None:
        """The process is dead, or as good as that. Raises as `check`."""
        self._cluster.kill(member.spec.identity)
        if member.spec.kind == "training":
            raise TrainingLost(f"{member.name} is lost: {reason}")
        del self.by_identity[member.spec.identity]
        self.num_lost += 1
        member.restarts += 1
        limit = self._limits.max_restarts
        if member.restarts > limit:
            self._give_up(member, reason)
            return
        self._note(
            f"{member.name} is lost: {reason}; it is started again ({member.restarts} of {limit}) "
            "while the others go on"
        )
        member.replace(time.monotonic())
        self._launch(member)

    def culprit(self) -> str:
        """Which training worker was killed: the others only say that somebody was. Empty: none
        within a short time."""
        deadline = time.monotonic() + _CULPRIT_S
        while time.monotonic() < deadline:
            for identity, reason in self._dead():
                member = self.by_identity[identity]
                if member.spec.kind == "rollout":
                    self.lost(member, reason)
                elif not reason.startswith("exit code"):
                    return f"{member.name} is lost: {reason}"
            time.sleep(0.05)
        return ""

    def replace_training(self, store: tuple[str, int]) -> list[Member]:
        """End all training workers and start others, which meet at `store`."""
        members = self.of("training")
        for member in members:
            self._cluster.kill(member.spec.identity)
            self.by_identity.pop(member.spec.identity, None)
            member.replace(time.monotonic(), store)
            self._launch(member)
        return members

    def ended(self) -> Iterator[str]:
        """Identities of processes that have ended since the last call of this or `check`."""
        yield from self._cluster.dead()

    def _launch(self, member: Member) -> None:
        self.by_identity[member.spec.identity] = member
        self._cluster.start(member.spec)

    def _give_up(self, member: Member, reason: str) -> None:
        member.given_up = reason
        why = f"{member.name} is lost: {reason}"
        if self._limits.max_restarts:
            why += f"; restarts are used up (trainer.max_restarts={self._limits.max_restarts})"
        left = [other.name for other in self.of("rollout") if not other.given_up]
        if not left:
            raise TooFew(f"no rollout worker is left: {why}")
        self._note(f"{why}; the run goes on with {', '.join(left)}")

    def _dead(self) -> list[tuple[str, str]]:
        """Current processes that have ended, training workers last: they end what is going on."""
        found = [(i, why) for i, why in self._cluster.dead().items() if i in self.by_identity]
        return sorted(found, key=lambda dead: self.by_identity[dead[0]].spec.kind == "training")

    def _bury(self, identity: str, reason: str, listen: Callable[[], None]) -> None:
        # A dying worker's own words are better than Ray's: they may be on their way.
        deadline = time.monotonic() + _LAST_WORDS_S
        while identity in self.by_identity and time.monotonic() < deadline:
            listen()
        if identity in self.by_identity:
            self.lost(self.by_identity[identity], reason)
