"""Checkpoints while training goes on: a copy is made at the step's boundary, and written aside.

Training workers copy their state to host memory, and write it on threads of their own while the
next steps run. When all have, the checkpoint is put in place; until then it does not exist.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path

from rlhfuse import messages as m
from rlhfuse.fleet import WorkerFailed
from rlhfuse.run_folder import Unfinished
from rlhfuse.session import Session
from rlhfuse.training.checkpoint import complete_export
from rlhfuse.training.trained_stage import model_config

_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class _Pending:
    unfinished: Unfinished
    ticket: int
    paused_s: float = 0.0


class Saver:
    """At most one checkpoint is on its way to the disk."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._pending: _Pending | None = None
        self._metrics: dict[str, float] = {}

    @property
    def busy(self) -> bool:
        """A checkpoint has been begun, and is not yet in place."""
        return self._pending is not None

    def start(self, *, aside: bool) -> None:
        """Begin a checkpoint of the state as it is; with `aside`, returns as soon as workers have
        their copies. One that is still being written is waited for.

        Raises:
            WorkerFailed: as `wait`, of the one before.
        """
        self.wait()
        session = self._session
        fleet, state = session.fleet, session.state
        start_s = time.monotonic()
        unfinished = session.folder.begin(state)
        self._pending = _Pending(unfinished, time.monotonic_ns())
        command = m.SaveCheckpoint(
            folder=str(unfinished.folder.resolve()),
            step=state.step,
            ticket=self._pending.ticket,
            aside=aside,
        )
        fleet.broadcast(fleet.training, command)
        if aside:
            fleet.gather(m.Ack, fleet.training, f"the checkpoint of step {state.step} to be copied")
        self._pending = replace(self._pending, paused_s=time.monotonic() - start_s)

    def look(self) -> Path | None:
        """Put the checkpoint in place if all of it is written.

        Raises:
            WorkerFailed: it could not be written; older ones are whole.
        """
        if self._pending is None:
            return None
        unfinished = self._pending.unfinished
        step = unfinished.state.step
        told = self._session.fleet.written(self._pending.ticket)
        if len(told) < len(self._session.fleet.training):
            return None
        errors = [f"{name}: writing a checkpoint: {w.error}" for name, w in told.items() if w.error]
        if errors:
            self.abandon()
            raise WorkerFailed(
                f"{errors[0]}; there is no checkpoint of step {step}, older ones are whole"
            )
        self._metrics = {
            "timing_s/save_pause": self._pending.paused_s,
            "timing_s/save_write": max(w.seconds for w in told.values()),
        }
        self._pending = None
        return self._put_in_place(unfinished)

    def wait(self) -> Path | None:
        """Until the checkpoint that was begun last is in place; None where none was.

        Raises:
            WorkerFailed: as `look`, or it took longer than the time limit.
        """
        if self._pending is None:
            return None
        limit_s = self._session.run.config.trainer.wait_timeout_s
        step = self._pending.unfinished.state.step
        deadline = time.monotonic() + limit_s
        while (path := self.look()) is None:
            if time.monotonic() > deadline:
                self.abandon()
                raise WorkerFailed(
                    f"the checkpoint of step {step} was not written within {limit_s:g} s "
                    "(trainer.wait_timeout_s)"
                )
            self._session.fleet.receive(_POLL_S)
        return path

    def abandon(self) -> None:
        """Those who were writing are gone, or one of them could not."""
        if self._pending is not None:
            self._pending.unfinished.discard()
            self._pending = None

    def take_metrics(self) -> dict[str, float]:
        """Seconds that the last finished checkpoint held training up, and took to be written;
        empty once told."""
        metrics, self._metrics = self._metrics, {}
        return metrics

    def _put_in_place(self, unfinished: Unfinished) -> Path:
        session = self._session
        try:
            for role in session.roles:
                source = model_config(session.run.config, role).path
                complete_export(unfinished.folder / role / "huggingface", source)
            return session.folder.finish(unfinished)
        except OSError as error:
            unfinished.discard()
            raise WorkerFailed(
                f"writing a checkpoint: {error}; there is none of step {unfinished.state.step}, "
                "older ones are whole"
            ) from error
