"""Generation plus inference on two vLLM instances, measured: serial, reward-only overlap (what
verl, slime and ROLL do), early inference, the paper's policy, ours, and the clairvoyant policy:
the best that the simulator finds for these very lengths, run live like the others.

    python -m bench.bench_rollout_vllm [--repetitions 5] [--samples 128] [--add]

`--add` goes on from the repetitions of earlier calls. A run beside which somebody else took more
than `MOST_OTHERS` of the processors is run again; of `TRIES`, the least disturbed counts.

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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast, get_args

import msgspec
import numpy as np

from bench.processor_time import used
from bench.record import Row, print_table, spread, write_result
from bench.repetitions import first_free, keep, kept
from rlhfuse import messages as m
from rlhfuse.batches import sample_seed
from rlhfuse.config_file import load
from rlhfuse.cost import CostModel
from rlhfuse.learned_cost import LearnedCost
from rlhfuse.resolve import resolve
from rlhfuse.rollout.bounds import lower_bound_s
from rlhfuse.rollout.clairvoyant import Best, KnownLengths, clairvoyant
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
CLAIRVOYANT, BOUND = "clairvoyant", "lower bound (simulated)"
TEACHERS = ("early", "ours")  # run once before anything counts: they show what things cost
MOST_OTHERS, TRIES = 0.05, 3
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
        early = ("reward",) if name == "reward-only" else tuple(roles)
        lengths = LengthModel(self.sampling.max_tokens, self.history)
        seconds = self.roll(records, early, self.policy(name), lengths)
        late = [role for role in roles if role not in early]
        if late:
            seconds += self.score(records, late)
        self.learned.learn(Timeline(tuple(self.session.fleet.take_spans())))
        return seconds

    def run_best(self, records: Sequence[Record], best: Best, lengths: Sequence[int]) -> float:
        """Seconds of the order that a search with the true lengths has found."""
        limit = self.sampling.max_tokens
        known = KnownLengths(limit, lengths) if best.known else LengthModel(limit, self.history)
        seconds = self.roll(records, ROLES, best.policy, known)
        self.learned.learn(Timeline(tuple(self.session.fleet.take_spans())))
        return seconds

    def roll(
        self,
        records: Sequence[Record],
        early: tuple[str, ...],
        policy: Policy,
        lengths: LengthModel,
    ) -> float:
        """One rollout by the live loop."""
        session, fleet = self.session, self.session.fleet
        fleet.begin_step(1, 0)
        scheduler = RolloutScheduler(2, early, self.learned.model, policy, lengths=lengths)
        loop = RolloutLoop(
            fleet, scheduler, None, session.progress, session.run.decode, timeout_s=120, show=False
        )
        loop.run(records, self.sampling, 0, len(records) * len(early))
        return loop.result().done_s

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
                    m.Score(role=_role(role), samples=samples, sampling=self.sampling),
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


def measure(bench: Bench, samples: int, repetitions: int, earlier: list[Row]) -> None:
    """Results are written after every repetition."""
    stop = choose_stop(bench)
    bench.sampling = msgspec.structs.replace(
        bench.sampling, stop_token_ids=stop, max_tokens=LONGEST
    )
    candidates = make_candidates(bench, CANDIDATES * samples)
    name = f"rollout_{bench.session.run.config.rollout.engine}"
    first = first_free(earlier)
    rows = list(earlier)
    for repetition in (-1, *range(first, first + repetitions)):  # the first teaches the costs
        chosen = pick(candidates, samples, repetition + 100)
        runs, simulated = repeat(bench, chosen, repetition)
        bench.history = [*bench.history, *(len(record.response) // 4 for record in chosen)][-512:]
        if repetition >= 0:
            longest = max(len(record.response) // 4 for record in chosen)
            rows += [
                {
                    "repetition": repetition,
                    "policy": policy,
                    "seconds": runs[policy].seconds if policy in runs else 0.0,
                    "others": runs[policy].others if policy in runs else 0.0,
                    "simulated_seconds": simulated.get(policy, 0.0),
                    "samples": samples,
                    "longest": longest,
                }
                for policy in (*POLICIES, CLAIRVOYANT, BOUND)
            ]
            keep(name, rows)
            table = list(summary(rows))
            write_result(name, table)
            print_table(table)


@dataclass(frozen=True)
class Run:
    """One policy's rollout. `others`: part of the processors' time that was somebody else's."""

    seconds: float
    others: float
    digest: str


def repeat(
    bench: Bench, chosen: Sequence[Record], repetition: int
) -> tuple[dict[str, Run], dict[str, float]]:
    """Each policy on the same samples, in turn; and simulated seconds, at the costs so far."""
    lengths = [len(record.response) // 4 for record in chosen]
    teaches = repetition < 0
    best, simulated = simulations(bench, chosen, lengths)
    names = list(TEACHERS if teaches else (*POLICIES, CLAIRVOYANT))
    start = repetition % len(names)
    runs: dict[str, Run] = {}
    for name in names[start:] + names[:start]:
        for _ in range(TRIES):
            run = run_once(bench, name, chosen, best, lengths)
            if name not in runs or run.others < runs[name].others:
                runs[name] = run
            if teaches or run.others <= MOST_OTHERS:
                break
    assert len({run.digest for run in runs.values()}) == 1, "a policy changed the samples"
    if not teaches:
        print(f"clairvoyant: {best.how}")
    return runs, simulated


def run_once(
    bench: Bench, name: str, chosen: Sequence[Record], best: Best, lengths: Sequence[int]
) -> Run:
    records = fresh(chosen)
    before = used()
    if name == CLAIRVOYANT:
        seconds = bench.run_best(records, best, lengths)
    else:
        seconds = bench.run(name, records, ROLES)
    others = used().others_share(before)
    text = b"".join(bytes(record.response) for record in records)
    return Run(seconds, others, hashlib.sha256(text).hexdigest())


def simulations(
    bench: Bench, chosen: Sequence[Record], lengths: Sequence[int]
) -> tuple[Best, dict[str, float]]:
    """The best order that the simulator knows for these samples, and how long it and the others
    take there. A reward-only overlap it does not know."""
    prompts = [len(record.prompt) for record in chosen]
    cost, ours = bench.learned.model, bench.policy("ours")
    ends = {}
    for name in ("serial", "early", "paper", "ours"):
        policy = bench.policy(name)
        _, stats = simulate(cost, policy, lengths, prompts, 2, ROLES, history=bench.history)
        ends[name] = stats.end_s
    best = clairvoyant(cost, ours, lengths, prompts, 2, ROLES, history=bench.history, second=False)
    ends[CLAIRVOYANT] = best.end_s
    ends[BOUND] = lower_bound_s(cost, ours, lengths, prompts, 2, ROLES)
    return best, ends


def summary(rows: Sequence[Row]) -> Iterator[Row]:
    """Medians over the repetitions, of times and of ratios within a repetition."""

    def column(policy: str, key: str) -> list[float]:
        return [float(row[key]) for row in rows if row["policy"] == policy]

    for policy in (*POLICIES, CLAIRVOYANT, BOUND):
        key = "simulated_seconds" if policy == BOUND else "seconds"
        times = column(policy, key)
        middle, least, most = spread(times)
        faster = spread([a / b for a, b in zip(column("serial", key), times, strict=True)])
        best = column(CLAIRVOYANT, key)
        yield {
            "policy": policy,
            "seconds": middle,
            "least": least,
            "most": most,
            "speedup": faster[0],
            "speedup_least": faster[1],
            "speedup_most": faster[2],
            "over_clairvoyant": spread([a / b for a, b in zip(times, best, strict=True)])[0],
            "simulated_seconds": spread(column(policy, "simulated_seconds"))[0],
            "others_most": max(column(policy, "others")),
            "samples": int(rows[0]["samples"]),
            "longest": int(spread(column(policy, "longest"))[0]),
            "repetitions": len(times),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--engine", choices=["vllm", "torch"], default="vllm")
    parser.add_argument("--add", action="store_true", help="to the repetitions kept so far")
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
            earlier = kept(f"rollout_{asked.engine}") if asked.add else []
            measure(Bench(session, sampling), asked.samples, asked.repetitions, earlier)


if __name__ == "__main__":
    main()
