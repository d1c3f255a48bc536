"""How many samples a core-second does rlhfuse train beside TRL's PPOTrainer, same work?

The same models, prompts, length distribution, batch and mini-batches on both, side by side in one
run: TRL on one core, rlhfuse packed but serial on one core, serial on two, and fused on two. Core-
seconds are wall time times cores held. TRL (trl 1.12.0) lives in an environment of its own:

    python -m venv trl_venv && trl_venv/bin/pip install torch trl==1.12.0
    python -m bench.bench_trl_ppo --trl-python trl_venv/bin/python --rounds 3
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import rlhfuse.config as c
from bench import trl_workload as work
from bench.bench_step import FUSED, SERIAL
from bench.record import Row, print_table, write_result
from rlhfuse.config import Config
from rlhfuse.resolve import resolve
from rlhfuse.session import open_session
from rlhfuse.trainer import Fusions, Trainer

Step = dict[str, float]
TRL_MICRO_BATCHES = (16, 32)


def ours(
    folder: Path, num_devices: int, fusions: Fusions, steps: int, microbatches: int
) -> list[Step]:
    """The steps after the first, which teaches the cost model (and warms caches)."""
    config = _config(folder, num_devices, steps, microbatches)
    with open_session(resolve(config), resume=False) as session:
        trainer = Trainer(session, fusions)
        trainer.sync_weights()
        results = [trainer.step() for _ in range(steps)]
    return [
        {
            "step": r.seconds,
            "generation": r.metrics["timing_s/gen"],
            "scoring": r.metrics["timing_s/rollout"] - r.metrics["timing_s/gen"],
            "tokens": r.metrics["response_length/mean"] * work.BATCH,
        }
        for r in results[1:]
    ]


def trl(python: str, folder: Path, steps: int, micro_batch: int) -> list[Step]:
    """The same of TRL, on the cores this process may use."""
    out = folder / "trl_steps.json"
    script = Path(__file__).with_name("trl_steps.py")
    command = [python, str(script), str(folder), "--steps", str(steps), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*command, "--micro-batch", str(micro_batch)],
        check=True,
        env=environment,
        capture_output=True,
    )
    found: list[Step] = json.loads(out.read_text())
    return found[1:]


def row_of(name: str, cores: int, steps: list[Step]) -> Row:
    """Medians over steps. Shares are of the step; what is neither generation nor scoring is
    training (and, with us, sending weights)."""
    seconds = statistics.median(s["step"] for s in steps)
    generation = statistics.median(s["generation"] / s["step"] for s in steps)
    scoring = statistics.median(s["scoring"] / s["step"] for s in steps)
    return {
        "system": name,
        "cores": cores,
        "step_s": seconds,
        "least_s": min(s["step"] for s in steps),
        "greatest_s": max(s["step"] for s in steps),
        "mean_length": statistics.mean(s["tokens"] for s in steps) / work.BATCH,
        "samples_per_core_s": statistics.median(work.BATCH / s["step"] / cores for s in steps),
        "tokens_per_core_s": statistics.median(s["tokens"] / s["step"] / cores for s in steps),
        "generation": generation,
        "scoring": scoring,
        "training": 1 - generation - scoring,
    }


def compare(asked: argparse.Namespace, folder: Path) -> list[Row]:
    """All systems in turn, `rounds` times."""
    work.make_workload(folder, work.BATCH * (asked.steps + 1))
    steps: dict[tuple[str, int], list[Step]] = {}
    for _ in range(asked.rounds):
        with _one_core():
            for size in TRL_MICRO_BATCHES:
                found = trl(asked.trl_python, folder, asked.steps, size)
                steps.setdefault((f"TRL, micro-batches of {size}", 1), []).extend(found)
            for count in (1, 2):
                found = ours(folder, 1, SERIAL, asked.steps, count)
                name = f"rlhfuse, 1 rank, serial, {count} micro-batches"
                steps.setdefault((name, 1), []).extend(found)
        for name, fusions in (("serial", SERIAL), ("fused", FUSED)):
            found = ours(folder, 2, fusions, asked.steps, 2)
            steps.setdefault((f"rlhfuse, 2 ranks, {name}", 2), []).extend(found)
    rows = [row_of(name, cores, found) for (name, cores), found in steps.items()]
    best = max(float(r["samples_per_core_s"]) for r in rows if str(r["system"]).startswith("TRL"))
    return [{**r, "times_trl": float(r["samples_per_core_s"]) / best} for r in rows]


@contextlib.contextmanager
def _one_core() -> Iterator[None]:
    """This process and what it starts meanwhile run on one core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _config(folder: Path, num_devices: int, steps: int, microbatches: int) -> Config:
    optim = c.OptimConfig(lr=1e-6)
    return Config(
        actor=c.ActorConfig(
            path=str(folder / "policy"),
            optim=optim,
            ppo_mini_batch_size=work.MINI_BATCH,
            num_microbatches=microbatches,
        ),
        critic=c.CriticConfig(
            path=str(folder / "reward"),
            optim=optim,
            ppo_mini_batch_size=work.MINI_BATCH,
            num_microbatches=microbatches,
        ),
        reward=c.RewardConfig(path=str(folder / "reward")),
        rollout=c.RolloutConfig(
            engine="torch", response_length=work.RESPONSE_TOKENS, max_num_seqs=work.BATCH
        ),
        data=c.DataConfig(
            train_files=(str(folder / "prompts.jsonl"),),
            max_prompt_length=work.PROMPT_TOKENS,
            train_batch_size=work.BATCH,
        ),
        trainer=c.TrainerConfig(
            default_local_dir=str(folder / "runs"),
            experiment_name=f"{num_devices}_{microbatches}",
            total_training_steps=steps,
            logger=("jsonl",),
            report=False,
        ),
        placement=c.PlacementConfig(device="cpu", num_devices=num_devices),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trl-python", required=True, help="a Python that holds trl 1.12.0")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--steps", type=int, default=4, help="a system's steps in a round; the first does not count"
    )
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = compare(asked, Path(folder))
    print_table(rows)
    print(write_result("bench_trl_ppo", rows))


if __name__ == "__main__":
    main()
