"""Recovery: seconds from a kill to full speed, tokens done again, results equal.

python -m bench.bench_recovery [--repetitions 5]

Two devices, a Llama of 4 layers, 256 wide, as actor, critic, reference and reward; PPO steps of 64
samples with a long tail. In each repetition, side by side: an undisturbed step, one in which a
rollout worker is killed in the middle of generation, one in which it is stopped (hangs), and one in
which a training worker is killed in the update.
"""

import argparse
import signal
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from bench.record import print_table, spread, write_result
from rlhfuse import messages as m
from rlhfuse.config import Config
from rlhfuse.fleet import TrainingLost
from rlhfuse.recovery import Recovery
from rlhfuse.resolve import resolve
from rlhfuse.session import Session, open_session
from rlhfuse.trainer import StepResult, Trainer
from tests.end_to_end.sabotage import Fault, sabotage, start_over
from tests.end_to_end.tiny_run import make_assets, tiny_config

HEARTBEAT_TIMEOUT_S = 5.0
NUM_SAMPLES = 64
REPORT_EVERY = 8  # engine steps: what is not reported is generated again
FAULTS = {
    "none": None,
    "rollout worker killed": Fault(1, m.Generate, "rollout-1", delay_s=0.8),
    "rollout worker stopped": Fault(1, m.Generate, "rollout-1", signal.SIGSTOP, delay_s=0.8),
    "training worker killed": Fault(1, m.Train, "training-1", delay_s=0.3),
}


@dataclass
class Measured:
    """One disturbed step. Seconds from the signal; `back_s`: until work was taken again."""

    result: StepResult
    wall_s: float
    lost_s: float = 0.0
    back_s: float = 0.0


@dataclass
class Told:
    """When which line was shown to the user."""

    lines: list[tuple[float, str]] = field(default_factory=list)

    def note(self, text: str) -> None:
        self.lines.append((time.monotonic(), text))

    def at(self, part: str) -> float:
        return next((at_s for at_s, text in self.lines if part in text), float("nan"))


def config_of(assets: Path, runs: Path) -> Config:
    """64 samples of up to 384 tokens."""
    replace = msgspec.structs.replace
    config = tiny_config(assets, runs, num_devices=2)
    return replace(
        config,
        actor=replace(config.actor, ppo_mini_batch_size=32),
        critic=replace(config.critic, ppo_mini_batch_size=32),
        data=replace(config.data, train_batch_size=NUM_SAMPLES),
        rollout=replace(config.rollout, response_length=384, max_num_seqs=32),
        trainer=replace(
            config.trainer,
            total_training_steps=100,
            heartbeat_timeout_s=HEARTBEAT_TIMEOUT_S,
            val_before_train=False,
        ),
    )


def run_step(session: Session, start: Path, fault: Fault | None) -> Measured:
    """The first step after `start`, disturbed by `fault`, until all workers are back."""
    start_over(session, start)
    trainer = Trainer(session)
    recovery = Recovery(session)
    trainer.sync_weights()
    told = Told()
    session.fleet._note = told.note
    session.fleet._roster._note = told.note
    session.progress.note = told.note  # type: ignore[method-assign]
    began_s = time.monotonic()
    with sabotage(session, [fault] if fault else []) as saboteur:
        try:
            result = trainer.step()
        except TrainingLost as lost:
            recovery.restart(lost)
            trainer.sync_weights()
            told.note("training is back")
            result = trainer.step()
    measured = Measured(result, time.monotonic() - began_s)
    if fault is not None:
        _until_back(session, told)
        struck_s = saboteur.struck[0][1]
        measured.lost_s = told.at("is lost") - struck_s
        measured.back_s = told.at("is back") - struck_s
    return measured


def _until_back(session: Session, told: Told) -> None:
    """A worker that is not back by the end of its step joins in the next one."""
    deadline = time.monotonic() + 60.0
    while told.at("is back") != told.at("is back") and time.monotonic() < deadline:
        version = session.state.step
        session.fleet.begin_step(version + 1, version)
        session.fleet.receive()


def row_of(name: str, steps: list[Measured], calm: list[Measured]) -> dict[str, float | int | str]:
    """Medians over the repetitions, the least and the greatest beside."""
    back = spread([s.back_s for s in steps])
    metrics = [s.result.metrics for s in steps]
    rescued = [int(row["fault/samples_rescued"]) for row in metrics]
    equal = all(
        (s.result.tokens, s.result.rewards, s.result.weights)
        == (c.result.tokens, c.result.rewards, c.result.weights)
        for s, c in zip(steps, calm, strict=True)
    )
    return {
        "fault": name,
        "step_s": spread([s.wall_s for s in steps])[0],
        "noticed_s": spread([s.lost_s for s in steps])[0],
        "back_s": back[0],
        "back_least_s": back[1],
        "back_most_s": back[2],
        "samples_rescued": sorted(rescued)[len(rescued) // 2],
        "tokens_again_at_most": REPORT_EVERY * max(rescued),
        "tokens_prefilled_again": int(max(row["fault/tokens_prefilled_again"] for row in metrics)),
        "response_tokens": int(metrics[0]["response_length/mean"] * NUM_SAMPLES),
        "results_equal": str(equal),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=5)
    repetitions: int = parser.parse_args().repetitions
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_assets(folder, hidden=256)
        found: dict[str, list[Measured]] = {fault: [] for fault in FAULTS}
        with open_session(resolve(config_of(folder, folder / "runs")), resume=False) as session:
            start = Trainer(session).save()
            run_step(session, start, None)  # warm
            for _ in range(repetitions):
                for fault_name, fault in FAULTS.items():
                    found[fault_name].append(run_step(session, start, fault))
    rows = [row_of(fault, steps, found["none"]) for fault, steps in found.items()]
    print_table(rows)
    print(write_result("recovery", rows))


if __name__ == "__main__":
    main()
