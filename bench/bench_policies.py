"""Simulated rollouts under several policies, against a clairvoyant search and a proven bound.

    python -m bench.bench_policies [--seeds 3] [--only TEXT] [--sensitivity] [--keep FOLDER]

Ours must be within 10 % of the clairvoyant end on average and no worse than the paper's policy.
`--sensitivity`: ours against never moving, with wrong length predictions, slower migration and
stragglers. Simulation, not measurement: costs as in `bench/rollout_settings.py`.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bench.record import Row, write_result
from bench.rollout_settings import Setting, settings
from rlhfuse.cost import CostModel
from rlhfuse.rollout.bounds import lower_bound_s
from rlhfuse.rollout.clairvoyant import clairvoyant
from rlhfuse.rollout.forecast import warm_up
from rlhfuse.rollout.policy import InterStage, Migration, Policy
from rlhfuse.rollout.simulator import Stats, simulate


def run(
    setting: Setting,
    policy: Policy,
    lengths: Sequence[int],
    history: Sequence[int],
    *,
    cost: CostModel | None = None,
    slowdown: Sequence[float] = (),
) -> Stats:
    """One iteration; `cost`: the truth, where the scheduler believes the setting's."""
    _, stats = simulate(
        cost or setting.cost,
        policy,
        lengths,
        setting.prompts,
        setting.instances,
        setting.roles,
        groups=setting.groups,
        history=history,
        believed=setting.cost,
        slowdown=slowdown,
        reward_s=setting.reward_s,
        train=setting.train,
        record=False,
    )
    return stats


def policies(setting: Setting) -> dict[str, Policy]:
    base = setting.policy
    return {
        "serial": replace(base, inter_stage=InterStage.OFF, migration=Migration.OFF),
        "off": replace(base, inter_stage=InterStage.ON, migration=Migration.OFF),
        "paper": replace(base, inter_stage=InterStage.ON, migration=Migration.PAPER),
        "ours": replace(base, inter_stage=InterStage.ON, migration=Migration.AUTO),
    }


def one(setting: Setting, seed: int) -> Row:
    """Ends of every policy on one draw of lengths."""
    lengths, history = setting.lengths(seed), setting.lengths(seed + 1000)[:4096]
    ends = {name: run(setting, p, lengths, history) for name, p in policies(setting).items()}
    best = clairvoyant(
        setting.cost, setting.policy, lengths, setting.prompts, setting.instances, setting.roles,
        groups=setting.groups, history=history, train=setting.train, reward_s=setting.reward_s,
    )  # fmt: skip
    bound = lower_bound_s(
        setting.cost, setting.policy, lengths, setting.prompts, setting.instances, setting.roles,
        train=setting.train, reward_s=setting.reward_s or 0.0,
    )  # fmt: skip
    assert bound <= best.end_s * (1 + 1e-9), "the bound is no bound"
    # What our own run found, knowing less, is open to a policy that knows the lengths too.
    best_s = min(best.end_s, *(stats.end_s for stats in ends.values()))
    return {
        "setting": setting.name,
        "seed": seed,
        **{f"{name}_s": round(stats.end_s, 4) for name, stats in ends.items()},
        "clairvoyant_s": round(best_s, 4),
        "bound_s": round(bound, 4),
        "moves": len(ends["ours"].decisions),
        "moved": ends["ours"].num_moved,
        "generation_s": round(ends["serial"].generation_s, 4),
        "clairvoyant_how": best.how,
        "tried": best.tried,
    }


def compare(name: str, found: Sequence[Row]) -> Row:
    """Means over seeds, and the worst seed of each ratio."""

    def ratios(above: str, below: str) -> list[float]:
        return [float(row[f"{above}_s"]) / float(row[f"{below}_s"]) for row in found]

    row: dict[str, float | int | str] = {"setting": name, "seeds": len(found)}
    for column in ("serial", "off", "paper", "ours", "clairvoyant", "bound"):
        row[f"{column}_s"] = round(statistics.fmean(float(r[f"{column}_s"]) for r in found), 3)
    for below in ("clairvoyant", "bound", "paper", "off", "serial"):
        values = ratios("ours", below)
        row[f"ours_over_{below}"] = round(statistics.fmean(values), 4)
        row[f"worst_ours_over_{below}"] = round(max(values), 4)
    row["moves"] = round(statistics.fmean(float(r["moves"]) for r in found), 1)
    row["moved"] = round(statistics.fmean(float(r["moved"]) for r in found), 1)
    return row


def sensitivity(setting: Setting, seeds: int) -> list[Row]:
    """Ours over never moving, when something is not as believed."""
    cost, num = setting.cost, setting.instances
    slower = replace(
        cost,
        migrate_token_s=1.2 * cost.migrate_token_s,
        migrate_call_s=1.2 * cost.migrate_call_s,
        prefill_token_s=1.2 * cost.prefill_token_s,
    )
    one = tuple(1.5 if i == 0 else 1.0 for i in range(num))
    some = tuple(1.3 if i % 8 == 3 else 1.0 for i in range(num))
    wrong: dict[str, tuple[float, CostModel, tuple[float, ...]]] = {
        "as believed": (1.0, cost, ()),
        "lengths expected 4 times too short": (0.25, cost, ()),
        "lengths expected 2 times too short": (0.5, cost, ()),
        "lengths expected 2 times too long": (2.0, cost, ()),
        "no history": (0.0, cost, ()),
        "migration 20 % slower": (1.0, slower, ()),
        "one instance 1.5 times slower": (1.0, cost, one),
        "every eighth instance 1.3 times slower": (1.0, cost, some),
    }
    rows: list[Row] = []
    for name, (factor, truth, slowdown) in wrong.items():
        ratios = []
        limit = setting.policy.max_response_tokens
        for seed in range(seeds):
            history = [
                min(limit, int(factor * n) + 1)
                for n in setting.lengths(seed + 1000)[:4096]
                if factor
            ]
            lengths = setting.lengths(seed)
            both = policies(setting)
            ours, off = (
                run(setting, both[p], lengths, history, cost=truth, slowdown=slowdown).end_s
                for p in ("ours", "off")
            )
            ratios.append(ours / off)
        rows.append(
            {
                "setting": setting.name,
                "wrong": name,
                "seeds": seeds,
                "ours_over_off": round(statistics.fmean(ratios), 4),
                "worst_ours_over_off": round(max(ratios), 4),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="")
    parser.add_argument("--sensitivity", action="store_true")
    parser.add_argument("--keep", type=Path, help="folder of finished parts, to go on from")
    asked = parser.parse_args()
    warm_up()
    rows: list[Row] = []
    for setting in settings():
        if asked.only not in setting.name:
            continue
        if asked.sensitivity:
            new = sensitivity(setting, asked.seeds)
        else:
            found = [kept(asked.keep, setting, seed) for seed in range(asked.seeds)]
            new = [compare(setting.name, found)]
        for row in new:
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        rows += new
    if not asked.only:
        write_result("policies_sensitivity" if asked.sensitivity else "policies_simulated", rows)


def kept(folder: Path | None, setting: Setting, seed: int) -> Row:
    """`one`, or what an earlier call has written of it."""
    if folder is None:
        return one(setting, seed)
    name = "".join(c if c.isalnum() else "_" for c in f"{setting.name} {seed}")
    path = folder / f"{name}.json"
    if not path.exists():
        path.write_text(json.dumps(dict(one(setting, seed))))
    row: Row = json.loads(path.read_text())
    return row


if __name__ == "__main__":
    main()
