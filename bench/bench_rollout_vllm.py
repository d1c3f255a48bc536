"""Generation plus inference on two vLLM instances, measured: serial, reward-only overlap (what
verl, slime and ROLL do), early inference, the paper's policy, ours; beside them the clairvoyant
policy from the simulator.

    python -m bench.bench_rollout_vllm [--repetitions 5] [--samples 128]

Two CPU workers of one thread each, the quick start's models (4 layers, 256 wide; `rlhfuse
prepare-quickstart`). Lengths are lognormal, median 64, longest about 900: samples are
position-keyed, so each candidate's length is known after one generation, and every repetition
picks samples whose lengths match its draw. All policies must give the same tokens.
"""

import argparse
import hashlib
import math
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast, get_args

import msgspec
import numpy as np

from bench.record import Row, print_table, spread, write_result
from rlhfuse import messages as m
from rlhfuse.batches import sample_seed
from rlhfuse.config_file import load
from rlhfuse.cost import CostModel
from rlhfuse.learned_cost import LearnedCost
from rlhfuse.resolve import resolve
from rlhfuse.rollout.bounds import lower_bound_s
from rlhfuse.rollout.clairvoyant import clairvoyant
from rlhfuse.rollout.lengths import LengthModel
from rlhfuse.rollout.loop import RolloutLoop
from rlhfuse.rollout.policy import InterStage, Migration, Policy
from rlhfuse.rollout.records import Record
from rlhfuse.rollout.scheduler import RolloutScheduler
from rlhfuse.rollout.simulator import simulate
from rlhfuse.rollout.stage import rollout_policy, training_sampling
from rlhfuse.session import Session, open_session
from rlhfuse.timeline import Timeline
from rlhfuse.trainer import Trainer

ROLES = ("critic", "reference", "reward")
MEDIAN, SIGMA, LONGEST = 64, 1.0, 960
HAZARD = 1 / 250  # of the stop token, per token
POLICIES = {
    "serial": (InterStage.OFF, Migration.OFF),
    "reward-only": (InterStage.ON, Migration.OFF),
    "early": (InterStage.ON, Migration.OFF),
    "paper": (InterStage.ON, Migration.PAPER),
    "ours": (InterStage.ON, Migration.AUTO),
}
REFERENCES = ("clairvoyant", "lower bound")
TEACHERS = ("early", "ours")  # run once before anything counts: they show what things cost
CANDIDATES = 3  # samples to choose from, for each that is run


class Bench:
    """The two workers, and what has been learned of their costs."""

    def __init__(self, session: Session, sampling: m.Sampling) -> None:
        self.session = session
        self.sampling = sampling
        self.learned = LearnedCost(CostModel.default())
        self.history: list[int] = []

    def policy(self, name: str) -> Policy:
        inter_stage, migration = POLICIES[name]
        base = rollout_policy(self.session.run.config, self.sampling, overlap=True)
        return replace(base, inter_stage=inter_stage, migration=migration)

    def run(self, name: str, records: Sequence[Record], roles: Sequence[str]) -> float:
        """Seconds until every record is generated and scored by `roles`."""
        session, fleet = self.session, self.session.fleet
        fleet.begin_step(1, 0)
        early = ("reward",) if name == "reward-only" else tuple(roles)
        limit = self.sampling.max_tokens
        scheduler = RolloutScheduler(
            2,
            early,
            self.learned.model,
            self.policy(name),
            lengths=LengthModel(limit, self.history),
        )
        loop = RolloutLoop(
            fleet, scheduler, None, session.progress, session.run.decode, timeout_s=120, show=False
        )
        loop.run(records, self.sampling, 0, len(records) * len(early))
        seconds = loop.result().done_s
        late = [role for role in roles if role not in early]
        if late:
            seconds += self.score(records, late)
        self.learned.learn(Timeline(tuple(fleet.take_spans())))
        return seconds

    def score(self, records: Sequence[Record], roles: Sequence[str]) -> float:
        """Seconds to score everything, dealt out by length."""
        fleet = self.session.fleet
        order = sorted(records, key=lambda record: -len(record.response))
        start = time.monotonic()
        for role in roles:
            for index, worker in enumerate(fleet.rollout):
                samples = tuple(record.tokens for record in order[index::2])
                fleet.send(
                    worker,
                    m.Score(role=_role(role), samples=samples, temperature=1.0),
                )
        for _role_name in roles:
            fleet.gather(m.Scored, fleet.rollout, "scores")
        return time.monotonic() - start


def _role(name: str) -> m.Role:
    assert name in get_args(m.Role)
    return cast(m.Role, name)


def fresh(candidates: Sequence[Record]) -> list[Record]:
    """The same samples, before generation."""
    return [
        Record(sample_id=i, group=i, prompt=c.prompt, seed=c.seed, row=c.row)
        for i, c in enumerate(candidates)
    ]


def make_candidates(bench: Bench, count: int) -> list[Record]:
    """Samples with prompts of the data, generated once."""
    prompts = bench.session.run.prompts
    records = [
        Record(
            sample_id=i,
            group=i,
            prompt=prompts[i % len(prompts)].tokens,
            seed=sample_seed("bench", i),
            row=prompts[i % len(prompts)].row,
        )
        for i in range(count)
    ]
    bench.run("early", records, ())
    return records


def pick(candidates: Sequence[Record], count: int, seed: int) -> list[Record]:
    """Samples whose lengths match lognormal quantiles with a random shift, each once."""
    rng = np.random.default_rng(seed)
    uniform = (np.arange(count) + rng.uniform(0.05, 0.95, count)) / count
    normal = np.array([_normal_quantile(u) for u in uniform])
    targets = np.clip(MEDIAN * np.exp(SIGMA * normal), 2, LONGEST)
    free = sorted(candidates, key=lambda c: len(c.response))
    chosen = []
    for target in sorted(targets, reverse=True):
        index = min(range(len(free)), key=lambda i: abs(len(free[i].response) // 4 - target))
        chosen.append(free.pop(index))
    rng.shuffle(chosen)
    return chosen


def _normal_quantile(u: float) -> float:
    """By bisection of erf: exact enough, and no further library."""
    low, high = -8.0, 8.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        if 0.5 * (1 + math.erf(middle / math.sqrt(2))) < u:
            low = middle
        else:
            high = middle
    return low


def choose_stop(bench: Bench) -> tuple[int, ...]:
    """The token whose frequency, far from the prompt, comes nearest to `HAZARD`."""
    bench.sampling = msgspec.structs.replace(bench.sampling, stop_token_ids=(), max_tokens=200)
    counts: Counter[int] = Counter()
    records = make_candidates(bench, 64)
    for record in records:
        counts.update(record.response_ids.tolist())
    total = sum(counts.values())
    token = min(counts, key=lambda t: abs(counts[t] / total - HAZARD))
    return (token,)


def measure(bench: Bench, samples: int, repetitions: int) -> None:
    """Results are written after every repetition."""
    stop = choose_stop(bench)
    bench.sampling = msgspec.structs.replace(
        bench.sampling, stop_token_ids=stop, max_tokens=LONGEST
    )
    candidates = make_candidates(bench, CANDIDATES * samples)
    seconds: dict[str, list[float]] = {name: [] for name in POLICIES}
    ratios: dict[str, list[float]] = {name: [] for name in POLICIES}
    simulated: dict[str, list[float]] = {name: [] for name in [*POLICIES, *REFERENCES]}
    longest = []
    for repetition in range(-1, repetitions):  # the first teaches the costs
        chosen = pick(candidates, samples, repetition + 100)
        lengths = [len(record.response) // 4 for record in chosen]
        seen: set[str] = set()
        names = list(POLICIES if repetition >= 0 else TEACHERS)
        start = repetition % len(names)
        took: dict[str, float] = {}
        for name in names[start:] + names[:start]:
            records = fresh(chosen)
            took[name] = bench.run(name, records, ROLES)
            text = b"".join(bytes(record.response) for record in records)
            seen.add(hashlib.sha256(text).hexdigest())
        assert len(seen) == 1, "a policy changed the samples"
        bench.history = [*bench.history, *lengths][-512:]
        if repetition < 0:
            continue
        longest.append(max(lengths))
        for name in names:
            seconds[name].append(took[name])
            ratios[name].append(took["serial"] / took[name])
        for name, end_s in simulations(bench, chosen, lengths).items():
            simulated[name].append(end_s)
        rows = _rows(seconds, ratios, simulated, samples, int(np.median(longest)))
        write_result(f"rollout_{bench.session.run.config.rollout.engine}", rows)
        print_table(rows)


def simulations(bench: Bench, chosen: Sequence[Record], lengths: Sequence[int]) -> dict[str, float]:
    """The same samples in the simulator, at the costs measured so far, and its references. A
    reward-only overlap it does not know."""
    prompts = [len(record.prompt) for record in chosen]
    ends = {"reward-only": 0.0}
    for name in ("serial", "early", "paper", "ours"):
        _, stats = simulate(
            bench.learned.model,
            bench.policy(name),
            lengths,
            prompts,
            2,
            ROLES,
            history=bench.history,
        )
        ends[name] = stats.end_s
    ours = bench.policy("ours")
    best = clairvoyant(
        bench.learned.model, ours, lengths, prompts, 2, ROLES, history=bench.history, second=False
    )
    ends["clairvoyant"] = best.end_s
    ends["lower bound"] = lower_bound_s(bench.learned.model, ours, lengths, prompts, 2, ROLES)
    return ends


def _rows(
    seconds: dict[str, list[float]],
    ratios: dict[str, list[float]],
    simulated: dict[str, list[float]],
    samples: int,
    longest: int,
) -> list[Row]:
    rows: list[Row] = []
    for name in POLICIES:
        middle, least, most = spread(seconds[name])
        ratio, low, high = spread(ratios[name])
        rows.append(
            {
                "policy": name,
                "seconds": middle,
                "least": least,
                "most": most,
                "speedup": ratio,
                "speedup_least": low,
                "speedup_most": high,
                "simulated_seconds": spread(simulated[name])[0],
                "samples": samples,
                "longest": longest,
                "repetitions": len(ratios[name]),
            }
        )
    for name in REFERENCES:  # simulated only: no measured seconds
        middle = spread(simulated[name])[0]
        best = spread([s / t for s, t in zip(simulated["serial"], simulated[name], strict=True)])
        rows.append(
            {
                **dict.fromkeys(rows[0], 0),
                "policy": f"{name} (simulated)",
                "speedup": best[0],
                "speedup_least": best[1],
                "speedup_most": best[2],
                "simulated_seconds": middle,
                "samples": samples,
                "longest": longest,
                "repetitions": len(simulated[name]),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--engine", choices=["vllm", "torch"], default="vllm")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            f"rollout.engine={asked.engine}",
            f"rollout.response_length={LONGEST}",
            "rollout.cache_tokens=32768",
            f"trainer.default_local_dir={Path(folder)}",
            "trainer.logger=[jsonl]",
        ]
        run = resolve(load("configs/quickstart_vllm.yaml", overrides))
        with open_session(run, resume=False) as session:
            Trainer(session).sync_weights()
            sampling = training_sampling(run.config, run.stop_token_ids)
            measure(Bench(session, sampling), asked.samples, asked.repetitions)


if __name__ == "__main__":
    main()
