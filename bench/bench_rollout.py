"""Simulated generation plus scoring of the quick-start shape: serial, early scoring, the paper's
threshold, ours, what a clairvoyant search finds, and what is proven to be impossible.

    python -m bench.bench_rollout [--seeds 20]

64 samples on 2 workers, prompt 16, long-tailed lengths, four scoring roles, the CPU decode table.
Simulation, not measurement: costs are `CostModel.default()` with the scoring rate varied.
"""

import argparse
import statistics
import time
from dataclasses import replace

import msgspec
import numpy as np

from bench.record import write_result
from rlhfuse.cost import CostModel
from rlhfuse.rollout.bounds import lower_bound_s
from rlhfuse.rollout.clairvoyant import clairvoyant
from rlhfuse.rollout.forecast import warm_up
from rlhfuse.rollout.policy import InterStage, Migration, Policy
from rlhfuse.rollout.simulator import simulate

ROLES = ("actor", "critic", "reference", "reward")
NUM_SAMPLES, PROMPT, INSTANCES = 64, 16, 2


class Row(msgspec.Struct, frozen=True):
    """Speed-ups over serial: medians over seeds, and the least ones."""

    score_ms_per_token: float
    max_response_tokens: int
    serial_s: float
    generation_share: float
    early: float
    paper: float
    ours: float
    ours_first_iteration: float
    clairvoyant: float
    bound: float
    least_ours: float
    least_ours_over_clairvoyant: float
    moves: float
    host_s: float


def lengths(seed: int, num: int, limit: int) -> list[int]:
    """Lognormal, median 50, 99th percentile 5.7 times the median."""
    rng = np.random.default_rng(seed)
    drawn = np.clip(rng.lognormal(np.log(50), 0.75, num), 2, limit).astype(int)
    return [int(n) for n in drawn]


def measure(score_ms: float, limit: int, seeds: int) -> Row:
    """One row: every policy on the same samples, seed by seed."""
    cost = replace(CostModel.default(), score_token_s=dict.fromkeys(ROLES, score_ms * 1e-3))
    base = Policy(max_response_tokens=limit, max_running=NUM_SAMPLES)
    columns: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        columns.setdefault(name, []).append(value)

    for seed in range(seeds):
        true, before = lengths(seed, NUM_SAMPLES, limit), lengths(seed + 1000, 256, limit)
        prompts = [PROMPT] * NUM_SAMPLES

        def end_s(policy: Policy, history: list[int], true: list[int] = true) -> float:
            _, stats = simulate(
                cost, policy, true, [PROMPT] * NUM_SAMPLES, INSTANCES, ROLES, history=history
            )
            note("moves", len(stats.decisions))
            note("generation", stats.generation_s)
            return stats.end_s

        serial = end_s(replace(base, inter_stage=InterStage.OFF), before)
        note("serial", serial)
        note("share", columns["generation"][-1] / serial)
        note("early", serial / end_s(replace(base, migration=Migration.OFF), before))
        note("paper", serial / end_s(replace(base, migration=Migration.PAPER), before))
        note("first", serial / end_s(base, []))
        start_s = time.perf_counter()
        note("ours", serial / end_s(base, before))
        note("host", time.perf_counter() - start_s)
        note("ours_moves", columns["moves"][-1])
        best = clairvoyant(cost, base, true, prompts, INSTANCES, ROLES, history=before)
        bound_s = lower_bound_s(cost, base, true, prompts, INSTANCES, ROLES)
        note("clairvoyant", serial / best.end_s)
        note("bound", serial / bound_s)
        note("ratio", columns["ours"][-1] / columns["clairvoyant"][-1])
    middle = {name: round(statistics.median(values), 4) for name, values in columns.items()}
    return Row(
        score_ms_per_token=score_ms,
        max_response_tokens=limit,
        serial_s=middle["serial"],
        generation_share=middle["share"],
        early=middle["early"],
        paper=middle["paper"],
        ours=middle["ours"],
        ours_first_iteration=middle["first"],
        clairvoyant=middle["clairvoyant"],
        bound=middle["bound"],
        least_ours=round(min(columns["ours"]), 4),
        least_ours_over_clairvoyant=round(min(columns["ratio"]), 4),
        moves=middle["ours_moves"],
        host_s=middle["host"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    asked = parser.parse_args()
    warm_up()
    rows = [measure(ms, limit, asked.seeds) for limit in (256, 512) for ms in (0.1, 0.15, 0.2)]
    write_result("rollout_simulated", [msgspec.structs.asdict(row) for row in rows])
    for row in rows:
        print(
            f"limit {row.max_response_tokens}, {row.score_ms_per_token} ms/token: serial "
            f"{row.serial_s:.2f} s; early {row.early:.3f}, paper {row.paper:.3f}, ours "
            f"{row.ours:.3f} (first iteration {row.ours_first_iteration:.3f}, least "
            f"{row.least_ours:.3f}), clairvoyant {row.clairvoyant:.3f}, bound "
            f"{row.bound:.3f}; {row.host_s:.3f} s host"
        )


if __name__ == "__main__":
    main()
