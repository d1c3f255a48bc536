"""How a run outlives its training workers: restart states, restarts, and an orderly end.

A training worker that dies takes the step with it. New ones start from the newest state on disk (a
restart state or a checkpoint) and replay the steps since then, to the same bits.
"""

import time
from pathlib import Path

from rlhfuse import messages as m
from rlhfuse.fleet import TrainingLost, WorkerFailed
from rlhfuse.session import Session

_SHARE = 0.01  # of the time that restart states may take


class Recovery:
    """Of one run. Restarts are counted between steps that ran for the first time."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._limits = session.run.config.trainer
        self._restarts = 0
        self._furthest = session.state.step
        self._kept_at_s = time.monotonic()
        self._cost_s = 0.0

    def finished_step(self) -> None:
        """A step is done."""
        step = self._session.state.step
        if step > self._furthest:
            self._furthest = step
            self._restarts = 0
            self._session.fleet.finished_step()

    def keep(self) -> None:
        """Keep a restart state if one is due. A failure is told, and harms nothing."""
        if not self._due():
            return
        session, state = self._session, self._session.state
        start_s = time.monotonic()

        def write(folder: Path) -> None:
            fleet = session.fleet
            command = m.KeepState(folder=str(folder.resolve()), step=state.step)
            fleet.broadcast(fleet.training, command)
            what = f"the restart state of step {state.step} to be written"
            for _, kept in fleet.gather(m.Kept, fleet.training, what):
                if kept.error:
                    raise OSError(kept.error)

        try:
            session.folder.keep(state, write)
        except OSError as error:
            session.progress.note(f"no restart state of step {state.step} is kept: {error}")
        self._kept_at_s = time.monotonic()
        self._cost_s = self._kept_at_s - start_s

    def restart(self, lost: TrainingLost) -> None:
        """New training workers, at the newest state there is.

        Raises:
            WorkerFailed: restarts are used up.
            TrainingLost: another one died meanwhile.
        """
        self._restarts += 1
        limit = self._limits.max_restarts
        if self._restarts > limit:
            used_up = "" if not limit else f"; restarts are used up (trainer.max_restarts={limit})"
            raise WorkerFailed(f"{lost}{used_up}")
        session = self._session
        session.settled = False
        source = session.folder.newest()
        session.progress.note(
            f"{lost}; the training workers are started again ({self._restarts} of {limit}), from "
            f"{source or 'the start'}"
        )
        session.fleet.restart_training(session.meeting.fresh())
        session.forget_rewards()
        if source is None:
            session.start_over()
        else:
            session.load(source)
        session.rewind_logs(samples_until=session.state.step if source else -1)
        self._kept_at_s = time.monotonic()

    def _due(self) -> bool:
        if not self._limits.max_restarts:
            return False
        if self._limits.restart_freq:
            return self._session.state.step % self._limits.restart_freq == 0
        return self._cost_s <= _SHARE * (time.monotonic() - self._kept_at_s)
