"""The controller's books of its workers: which process is which worker, and how it fares. Pure."""

from dataclasses import dataclass, field

import msgspec

from rlhfuse.messages import Pulse, Role
from rlhfuse.placement import WorkerSpec


class WorkerFailed(RuntimeError):
    """The run cannot go on. `user_error`: because of what the user gave."""

    def __init__(self, text: str, *, user_error: bool = False) -> None:
        super().__init__(text)
        self.user_error = user_error


class TrainingLost(WorkerFailed):
    """Training workers are gone, and the step with them; others can take their place."""


class TooFew(WorkerFailed):
    """No rollout worker is left."""


Weights = tuple[int, str]  # version and digest


@dataclass(slots=True)
class Member:
    """A worker, and the process that is this worker now.

    `endpoint` is empty until the process has said hello. `held` are the versions of the weights
    that have arrived, `asked` those that have been sent for. `begun` is the step that it works
    on. `given_up` says why there will be no further process.
    """

    spec: WorkerSpec
    started_s: float
    endpoint: str = ""
    pid: int = 0
    detail: str = ""
    given_up: str = ""
    restarts: int = 0  # since the last finished step
    heard: bool = False
    silent_s: float = 0.0
    told_s: float = 0.0  # when it last said anything but that it lives
    pulse: Pulse | None = None
    asked: dict[Role, Weights] = field(default_factory=dict)
    held: dict[Role, Weights] = field(default_factory=dict)
    begun: tuple[int, int, int] | None = None
    resetting: bool = False

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def up(self) -> bool:
        """Can be told what to do."""
        return bool(self.endpoint) and not self.given_up

    def replace(self, now_s: float, store: tuple[str, int] | None = None) -> None:
        """The process is gone: another one will be this worker. It meets the other training
        workers at `store`."""
        self.spec = msgspec.structs.replace(
            self.spec, incarnation=self.spec.incarnation + 1, store=store or self.spec.store
        )
        self.started_s = now_s
        self.endpoint, self.pid, self.pulse = "", 0, None
        self.heard, self.silent_s, self.resetting = False, 0.0, False
        self.asked, self.held, self.begun = {}, {}, None

    def trouble(self, now_s: float, silence_limit_s: float, wait_limit_s: float) -> str:
        """Why the process counts as hung, or an empty text."""
        if self.heard and self.silent_s > silence_limit_s:
            return (
                f"no sign of life for {self.silent_s:.0f} s (trainer.heartbeat_timeout_s), "
                f"stopped or hung; last seen {self.at()}"
            )
        busy_s = 0.0 if self.pulse is None else self.pulse.busy_s
        if min(busy_s, now_s - self.told_s) > wait_limit_s:
            return f"hung {self.at()} (trainer.wait_timeout_s)"
        if not self.endpoint and now_s - self.started_s > wait_limit_s:
            return f"did not start within {wait_limit_s:g} s (trainer.wait_timeout_s)"
        return ""

    def at(self) -> str:
        """What it is doing, for people."""
        if not self.endpoint:
            return "at its start"
        if self.pulse is None or not self.pulse.busy_s:
            return "idle"
        return f"{self.pulse.busy_s:.0f} s in {self.pulse.doing}"
