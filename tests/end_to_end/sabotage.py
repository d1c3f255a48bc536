"""Processes killed, or stopped, at chosen moments: when the controller says a certain thing."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rlhfuse import messages as m
from rlhfuse.fleet import Fleet
from rlhfuse.session import Session
from rlhfuse.trainer import Trainer


@dataclass(frozen=True)
class Fault:
    """In `step`, `delay_s` after the controller has sent a command of `kind` to a worker whose
    name begins so, that worker gets `signal_number`; or the ``other`` of its kind, or a
    rollout worker that is the ``holder`` of what was made in this step."""

    step: int
    kind: type[m.Message]
    to: str
    signal_number: signal.Signals = signal.SIGKILL
    delay_s: float = 0.0
    victim: str = ""

    def victim_of(self, worker: str, fleet: Fleet) -> str:
        if self.victim == "other":
            return worker[:-1] + str(1 - int(worker[-1]))
        if self.victim == "holder":
            holders = [fleet.rollout[instance] for instance in fleet.serving()]
            return [*holders, *(name for name in fleet.rollout if name in fleet.pids)][0]
        return worker


class Saboteur:
    """Watches what the controller sends, and strikes at the moments it was told. Steps in
    `together` begin when all rollout workers are there."""

    def __init__(self, session: Session, faults: list[Fault], together: set[int]) -> None:
        self._session = session
        self._together = together
        self._send = session.fleet.send
        self._begin_step = session.fleet.begin_step
        self.left = list(faults)
        self.struck: list[tuple[Fault, float]] = []

    def begin_step(self, step: int, policy_version: int) -> None:
        fleet = self._session.fleet
        self._begin_step(step, policy_version)
        deadline = time.monotonic() + 60.0
        while step in self._together and len(fleet.serving()) < len(fleet.rollout):
            assert time.monotonic() < deadline, "a worker did not come back"
            fleet.receive()

    def send(self, worker: str, command: m.Command) -> None:
        self._send(worker, command)
        step = self._session.state.step + 1
        for fault in self.left:
            fits = isinstance(command, fault.kind) and worker.startswith(fault.to)
            if fault.step == step and fits:
                self.left.remove(fault)
                pid = self._session.fleet.pids[fault.victim_of(worker, self._session.fleet)]
                if fault.delay_s:
                    threading.Timer(fault.delay_s, self._strike, (fault, pid)).start()
                else:
                    self._strike(fault, pid)
                return

    def _strike(self, fault: Fault, pid: int) -> None:
        os.kill(pid, fault.signal_number)
        self.struck.append((fault, time.monotonic()))


@contextmanager
def sabotage(
    session: Session, faults: list[Fault], together: set[int] | None = None
) -> Iterator[Saboteur]:
    """While it lasts, `faults` come to pass."""
    fleet = session.fleet
    saboteur = Saboteur(session, faults, together or set())
    send, begin_step = fleet.send, fleet.begin_step
    fleet.send = saboteur.send  # type: ignore[method-assign]
    fleet.begin_step = saboteur.begin_step  # type: ignore[method-assign]
    yield saboteur
    fleet.send = send  # type: ignore[method-assign]
    fleet.begin_step = begin_step  # type: ignore[method-assign]


def start_over(session: Session, start: Path) -> None:
    """Back to the start, with no later state to go on from."""
    session.load(start)
    shutil.rmtree(session.folder.restart, ignore_errors=True)
    Trainer(session).save()
