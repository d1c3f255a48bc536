"""Runs from start to end: train, verify, eval. What the command line calls."""

import logging
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from rlhfuse.config import Config
from rlhfuse.config_file import load
from rlhfuse.fleet import WorkerFailed
from rlhfuse.report.page import write_report
from rlhfuse.resolve import Resolved, resolve
from rlhfuse.reward_desk import RewardFailed
from rlhfuse.run_folder import check_manifest, latest_name, load_state
from rlhfuse.session import Session, open_session
from rlhfuse.trainer import Fusions, StepResult, Trainer

logger = logging.getLogger(__name__)


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """How a run ended."""

    run: str
    steps: int
    seconds: float
    start_s: float  # until the first step began
    score_before: float | None
    score_after: float | None
    best_metric: str
    best_step: int
    idle_fraction: float | None
    measured_speedup: float | None
    rebuilding_gain: float | None
    exactness_share: float | None  # of generation; None: near ties were not decided
    report: str

    def text(self) -> str:
        """A few lines for a terminal."""
        lines = [f"{self.steps} steps in {self.seconds:.0f} s: {self.run}"]
        if self.score_before is not None and self.score_after is not None:
            lines.append(
                f"  {self.best_metric}: {self.score_before:.3f} before, "
                f"{self.score_after:.3f} after"
            )
        if self.measured_speedup is not None:
            lines.append(f"  fused steps ran {self.measured_speedup:.2f} times as fast as serial")
        if self.rebuilding_gain is not None:
            lines.append(
                "  schedules rebuilt for measured costs: predicted "
                f"{self.rebuilding_gain:.3f} times as fast as those for the first guess"
            )
        if self.exactness_share is not None:
            lines.append(
                f"  deciding near ties: {self.exactness_share:.1%} of generation "
                "(rollout.exactness: token)"
            )
        if self.idle_fraction is not None:
            idle = f"{self.idle_fraction:.0%}, median over fused steps"
            lines.append(f"  devices idle (nothing computed, nothing moved): {idle}")
        if self.report:
            lines.append(f"  report: {self.report}")
        return "\n".join(lines)


class Verification(msgspec.Struct, frozen=True, kw_only=True):
    """Fused against serial, step by step, on the same configuration and machine."""

    steps: int
    tokens_equal: bool
    rewards_equal: bool
    weights_equal: bool
    first_difference: str | None
    serial_s: float
    fused_s: float
    speedup: float

    @property
    def equal(self) -> bool:
        return self.tokens_equal and self.rewards_equal and self.weights_equal


def train_run(run: Resolved, *, resume: bool) -> Summary:
    """Train to the end and write the report."""
    started = time.monotonic()
    with open_session(run, resume=resume) as session:
        trainer = Trainer(session)
        start_s = time.monotonic() - started
        try:
            trainer.fit()
        except WorkerFailed as error:
            raise WorkerFailed(
                _with_way_out(error, trainer), user_error=error.user_error
            ) from error
        except RewardFailed as error:
            raise RewardFailed(_with_way_out(error, trainer)) from error
        state = session.state
        history = trainer.history
        values = [v[state.best_metric] for v in trainer.validations if state.best_metric in v]
        folder = session.folder.path
    report = str(write_report(folder)) if run.config.trainer.report else ""
    steps = [h.metrics for h in history]
    # An audited step is serial: it says nothing of how idle the run's devices are.
    idle = [m["perf/idle_fraction"] for m in steps if "fusion/measured_speedup" not in m]
    decided = [m["rollout/exactness_share"] for m in steps if m["rollout/near_ties"]]
    speedups = [m["fusion/measured_speedup"] for m in steps if "fusion/measured_speedup" in m]
    gains = [m["fusion/rebuilding_gain"] for m in steps if "fusion/rebuilding_gain" in m]
    return Summary(
        run=str(folder),
        steps=state.step,
        seconds=time.monotonic() - started,
        start_s=start_s,
        score_before=values[0] if values else None,
        score_after=values[-1] if values else None,
        best_metric=state.best_metric,
        best_step=state.best_step,
        idle_fraction=statistics.median(idle) if idle else None,
        measured_speedup=statistics.median(speedups) if speedups else None,
        rebuilding_gain=statistics.median(gains) if gains else None,
        exactness_share=statistics.median(decided) if decided else None,
        report=report,
    )


def _with_way_out(error: Exception, trainer: Trainer) -> str:
    """What ended the run, and how to go on; saves what the training workers still have."""
    session = trainer.session
    try:
        trainer.saver.wait()
    except WorkerFailed as trouble:
        logger.warning("%s", trouble)
    newest = session.folder.newest()
    saved_step = load_state(newest).step if newest is not None else 0
    if session.settled and session.state.step > saved_step:
        try:
            newest = trainer.save()
        except (WorkerFailed, OSError) as trouble:
            logger.warning("step %d could not be saved: %s", session.state.step, trouble)
    if newest is None:
        return f"{error}; no step was finished, start again"
    return f"{error}; {newest} is whole: go on with --resume"


def verify_run(config: Config, steps: int, folder: Path) -> Verification:
    """Run the same steps serially and fused from the same start, on the same workers, and compare
    all that they made. Writes a run below `folder`."""
    replace = msgspec.structs.replace
    trainer = replace(
        config.trainer,
        default_local_dir=str(folder),
        total_training_steps=steps,
        logger=("jsonl",),
    )
    config = replace(config, trainer=trainer, fusion=replace(config.fusion, audit_every=0))
    with open_session(resolve(config), resume=False) as session:
        start = Trainer(session).save()
        serial = _steps(session, Fusions(inter_stage=False, intra_stage=False), steps)
        session.load(start)
        fused = _steps(session, Fusions(inter_stage=True, intra_stage=True), steps)
    return _compared(serial, fused)


def _steps(session: Session, fusions: Fusions, steps: int) -> list[StepResult]:
    trainer = Trainer(session, fusions)
    trainer.sync_weights()
    return [trainer.step() for _ in range(steps)]


def _compared(serial: Sequence[StepResult], fused: Sequence[StepResult]) -> Verification:
    pairs = list(zip(serial, fused, strict=True))
    first = next(
        (
            f"step {a.step}: {what} differ"
            for a, b in pairs
            for what in ("tokens", "rewards", "weights")
            if getattr(a, what) != getattr(b, what)
        ),
        None,
    )
    serial_s, fused_s = sum(a.seconds for a in serial), sum(b.seconds for b in fused)
    return Verification(
        steps=len(pairs),
        tokens_equal=all(a.tokens == b.tokens for a, b in pairs),
        rewards_equal=all(a.rewards == b.rewards for a, b in pairs),
        weights_equal=all(a.weights == b.weights for a, b in pairs),
        first_difference=first,
        serial_s=serial_s,
        fused_s=fused_s,
        speedup=serial_s / fused_s,
    )


def evaluate_checkpoint(
    checkpoint: Path, overrides: Sequence[str], folder: Path
) -> dict[str, float]:
    """The validation metrics of a checkpoint's actor; writes its own run below `folder`.

    Raises:
        ValueError: `checkpoint` is neither a run's folder nor one of its checkpoints.
    """
    if (checkpoint / "checkpoints").is_dir():
        name = latest_name(checkpoint / "checkpoints")
        checkpoint = checkpoint / "checkpoints" / name
    check_manifest(checkpoint)
    run = checkpoint.parents[1]
    config = load(run / "config.yaml", overrides)
    replace = msgspec.structs.replace
    trainer = replace(config.trainer, default_local_dir=str(folder), logger=("jsonl",))
    actor = replace(config.actor, path=str(checkpoint / "actor" / "huggingface"))
    critic = config.critic
    if config.uses_critic:
        critic = replace(critic, path=str(checkpoint / "critic" / "huggingface"))
    config = replace(config, trainer=trainer, actor=actor, critic=critic)
    with open_session(resolve(config), resume=False) as session:
        evaluator = Trainer(session)
        evaluator.sync_weights()
        evaluator.validate()
        return evaluator.validations[-1]
