"""Recovery: seconds from a kill to full speed, tokens done again, results equal.

python -m bench.bench_recovery [--engine vllm] [--repetitions 5] [--add]

Two devices, a Llama of 4 layers, 256 wide, as actor, critic, reference and reward; PPO steps of 64
samples with a long tail, which moves to one instance when 16 are left. In each repetition, in turn:
an undisturbed step, and one for each fault: a rollout worker killed in the middle of generation,
while it sends samples away, while it scores, while it fetches weights; one that is stopped (hangs);
and a training worker killed in the update. `--add` goes on from the repetitions of earlier calls.
"""

import argparse
import dataclasses
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec

from bench.record import Row, print_table, spread, write_result
from bench.repetitions import first_free, keep, kept
from rlhfuse import messages as m
from rlhfuse.config import Config
from rlhfuse.fleet import TrainingLost
from rlhfuse.recovery import Recovery
from rlhfuse.resolve import resolve
from rlhfuse.rollout import stage
from rlhfuse.rollout.policy import Migration, Policy
from rlhfuse.session import Session, open_session
from rlhfuse.trainer import StepResult, Trainer
from tests.end_to_end.sabotage import Fault, sabotage, start_over
from tests.end_to_end.tiny_run import make_assets, tiny_config

HEARTBEAT_TIMEOUT_S = 5.0
NUM_SAMPLES = 64
REPORT_EVERY = 8  # engine steps: what is not reported is generated again
MOVES_AT = 16  # samples that remain
BACK_WITHIN_S = 90.0
FAULTS = {
    "none": None,
    "killed in generation": Fault(1, m.Generate, "rollout-1", delay_s=0.4),
    "killed in migration": Fault(1, m.Export, "rollout"),
    "killed in scoring": Fault(1, m.Score, "rollout"),
    # The step's own weights are those of the next policy version.
    "killed in weight update": Fault(2, m.PullWeights, "rollout-1", delay_s=0.002),
    "stopped in generation": Fault(1, m.Generate, "rollout-1", signal.SIGSTOP, delay_s=0.4),
    "training worker killed": Fault(1, m.Train, "training-1", delay_s=0.3),
}
EngineName = Literal["torch", "vllm"]


@dataclass
class Measured:
    """One step. Seconds from the signal; `back_s`: until work was taken again."""

    result: StepResult
    wall_s: float
    noticed_s: float = 0.0
    back_s: float = 0.0


@dataclass
class Told:
    """When which line was shown to the user."""

    lines: list[tuple[float, str]] = field(default_factory=list)

    def note(self, text: str) -> None:
        self.lines.append((time.monotonic(), text))

    def at(self, part: str) -> float | None:
        return next((at_s for at_s, text in self.lines if part in text), None)


def config_of(assets: Path, runs: Path, engine: EngineName) -> Config:
    """64 samples of up to 384 tokens."""
    replace = msgspec.structs.replace
    config = tiny_config(assets, runs, num_devices=2)
    return replace(
        config,
        actor=replace(config.actor, ppo_mini_batch_size=32),
        critic=replace(config.critic, ppo_mini_batch_size=32),
        data=replace(config.data, train_batch_size=NUM_SAMPLES),
        rollout=replace(config.rollout, engine=engine, response_length=384, max_num_seqs=32),
        trainer=replace(
            config.trainer,
            total_training_steps=100,
            heartbeat_timeout_s=HEARTBEAT_TIMEOUT_S,
            val_before_train=False,
        ),
    )


@contextmanager
def moving_tails() -> Iterator[None]:
    """Whether a move pays is the cost model's to say; here one is to happen in every step."""
    usual = stage.rollout_policy

    def forced(config: Config, sampling: m.Sampling, *, overlap: bool) -> Policy:
        policy = usual(config, sampling, overlap=overlap)
        return dataclasses.replace(policy, migration=Migration.FORCED, forced=((MOVES_AT, 1),))

    stage.rollout_policy = forced
    try:
        yield
    finally:
        stage.rollout_policy = usual


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
            told.note(f"training is lost: {lost}")  # by whichever rank tells first
            recovery.restart(lost)
            trainer.sync_weights()
            told.note("training is back")
            result = trainer.step()
        measured = Measured(result, time.monotonic() - began_s)
        if fault is not None:
            back_s = _until_back(session, told)
            assert saboteur.struck, f"never came to pass: {fault}"
            struck_s = saboteur.struck[0][1]
            noticed_s = told.at("is lost")
            assert noticed_s is not None
            measured.noticed_s = noticed_s - struck_s
            measured.back_s = back_s - struck_s
    # Each fault is the first of its run: else a worker that dies too often is not replaced.
    session.fleet.finished_step()
    return measured


def _until_back(session: Session, told: Told) -> float:
    """A worker that is not back by the end of its step joins in the next one."""
    deadline = time.monotonic() + BACK_WITHIN_S
    while (back_s := told.at("is back")) is None:
        assert time.monotonic() < deadline, "a worker did not come back"
        version = session.state.step
        session.fleet.begin_step(version + 1, version)
        session.fleet.receive()
    return back_s


def rows_of(repetition: int, steps: dict[str, Measured]) -> list[Row]:
    """What one repetition gave."""
    calm = steps["none"].result
    return [
        {
            "repetition": repetition,
            "fault": name,
            "step_s": step.wall_s,
            "noticed_s": step.noticed_s,
            "back_s": step.back_s,
            "samples_rescued": int(step.result.metrics["fault/samples_rescued"]),
            "tokens_prefilled_again": int(step.result.metrics["fault/tokens_prefilled_again"]),
            "response_tokens": int(step.result.metrics["response_length/mean"] * NUM_SAMPLES),
            "samples_moved": int(step.result.metrics["fusion/moved_samples"]),
            "results_equal": int(
                (step.result.tokens, step.result.rewards, step.result.weights)
                == (calm.tokens, calm.rewards, calm.weights)
            ),
        }
        for name, step in steps.items()
    ]


def summary(rows: Sequence[Row], fault: str) -> Row:
    """Medians over the repetitions, the least and the greatest beside."""
    own = [row for row in rows if row["fault"] == fault]

    def column(key: str) -> list[float]:
        return [float(row[key]) for row in own]

    back = spread(column("back_s"))
    rescued = spread(column("samples_rescued"))
    return {
        "fault": fault,
        "step_s": spread(column("step_s"))[0],
        "step_least_s": spread(column("step_s"))[1],
        "step_most_s": spread(column("step_s"))[2],
        "noticed_s": spread(column("noticed_s"))[0],
        "back_s": back[0],
        "back_least_s": back[1],
        "back_most_s": back[2],
        "samples_rescued": int(rescued[0]),
        "tokens_again_at_most": REPORT_EVERY * int(rescued[2]),
        "tokens_prefilled_again": int(spread(column("tokens_prefilled_again"))[2]),
        "response_tokens": int(spread(column("response_tokens"))[0]),
        "results_equal": str(all(column("results_equal"))),
        "repetitions": len(own),
    }


def measure(session: Session, name: str, repetitions: int, rows: list[Row]) -> None:
    """Results are written after every repetition."""
    start = Trainer(session).save()
    run_step(session, start, None)  # warm
    first = first_free(rows)
    for repetition in range(first, first + repetitions):
        steps = {fault: run_step(session, start, FAULTS[fault]) for fault in FAULTS}
        rows += rows_of(repetition, steps)
        keep(name, rows)
        table = [summary(rows, fault) for fault in FAULTS]
        print_table(table)
        print(write_result(name, table), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--engine", choices=["torch", "vllm"], default="torch")
    parser.add_argument("--add", action="store_true", help="to the repetitions kept so far")
    asked = parser.parse_args()
    result = f"recovery_{asked.engine}"
    with tempfile.TemporaryDirectory() as name, moving_tails():
        folder = Path(name)
        make_assets(folder, hidden=256)
        config = config_of(folder, folder / "runs", asked.engine)
        with open_session(resolve(config), resume=False) as session:
            measure(session, result, asked.repetitions, kept(result) if asked.add else [])


if __name__ == "__main__":
    main()
