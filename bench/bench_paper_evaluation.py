"""The evaluation of the RLHFuse paper (arXiv 2409.13221), simulated: what our planner predicts for
its clusters, models and batches, beside the ranges that the paper reports.

    python -m bench.bench_paper_evaluation

256 Hopper GPUs (32 nodes of 8, NVLink, 200 Gb/s a GPU), LLaMA 13B, 33B and 65B in four
actor/critic pairs, PPO with four models (reference as large as the actor, reward model as the
critic), responses up to 512, 1024 and 2048 tokens, global batch 512, mini-batch 64. The base is
our own serial step, with every layout searched; fused ratios are against it. Nothing is measured
and nothing was fitted to the paper; the assumptions are in `rlhfuse/hardware.py`, and those about
lengths are here. DeepSpeed-Chat and ReaLHF are other programs and are not simulated.
"""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path

from matplotlib.figure import Figure

from bench.record import Row, print_table, write_result
from bench.results_page import RESULTS
from rlhfuse.config import (
    ActorConfig,
    Config,
    CriticConfig,
    DataConfig,
    PlanConfig,
    RewardConfig,
    RolloutConfig,
)
from rlhfuse.hardware import Cluster, Efficiency
from rlhfuse.planner import rollout as ro
from rlhfuse.planner.evaluate import Evaluated, evaluate
from rlhfuse.planner.plan import cluster_of
from rlhfuse.planner.workload import workload_of
from rlhfuse.rollout.events import Command
from rlhfuse.rollout.lengths import LengthModel
from rlhfuse.rollout.policy import Migration, Policy
from rlhfuse.rollout.scheduler import RolloutScheduler
from rlhfuse.rollout.simulator import Simulator, samples_of

PAIRS = (("13b", "33b"), ("33b", "13b"), ("33b", "65b"), ("65b", "33b"))
LIMITS = (512, 1024, 2048)
# Lengths are ours: the paper says that the 99.9th percentile of LMSYS-Chat-1M is more than ten
# times the median, which is sigma 0.745 of a lognormal; the median is a guess.
MEDIAN, SIGMA, PROMPT = 200, 0.75, 128
THRESHOLDS = (0.02, 0.05, 0.08, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6)
PAPER = {
    "step": "1.2-1.4",
    "generation+inference": "1.2-1.6",
    "training": "1.2-1.3",
    "other": "< 3 %",
    "best threshold": "about 20 %",
}


@dataclass(frozen=True)
class Variant:
    """One set of assumptions. `proportional`: the median is a sixth of the limit."""

    name: str
    efficiency: Efficiency = field(default_factory=Efficiency)
    proportional: bool = False
    prompt: int = PROMPT


VARIANTS = (
    Variant("as assumed"),
    Variant("inference at 25 % of peak", replace(Efficiency(), infer=0.25)),
    Variant("training at 30 % of peak", replace(Efficiency(), train=0.3)),
    Variant("no gradient exchange hidden", replace(Efficiency(), sync_overlap=0.0)),
    Variant("all gradient exchange hidden", replace(Efficiency(), sync_overlap=1.0)),
    Variant("median a sixth of the limit", proportional=True),
    Variant("prompts of 512 tokens", prompt=512),
)


def config_of(actor: str, critic: str, limit: int, variant: Variant) -> Config:
    return Config(
        actor=ActorConfig(path=f"llama-{actor}", ppo_mini_batch_size=64),
        critic=CriticConfig(path=f"llama-{critic}", ppo_mini_batch_size=64),
        reward=RewardConfig(path=f"llama-{critic}"),
        rollout=RolloutConfig(
            response_length=limit,
            max_num_seqs=256,
            old_log_probs="engine",
            score_token_budget=8192,
        ),
        data=DataConfig(train_batch_size=512, max_prompt_length=2 * variant.prompt),
        plan=PlanConfig(
            hardware="h100",
            num_nodes=32,
            network_gbps=200,
            response_median=0 if variant.proportional else MEDIAN,
            response_sigma=SIGMA,
            prompt_mean=variant.prompt,
        ),
    )


def found_for(actor: str, critic: str, limit: int, variant: Variant) -> Evaluated:
    config = config_of(actor, critic, limit, variant)
    cluster = cluster_of(config)
    device = replace(cluster.device, efficiency=variant.efficiency)
    cluster = Cluster(device, cluster.num_devices, cluster.devices_per_node)
    return evaluate(config, workload_of(config), cluster)


class _NothingBefore(RolloutScheduler):
    """The paper's system, as we read it: until the tail moves, nothing is scored."""

    def quiet(self) -> tuple[int, float]:
        return 0, inf

    def _advance(self, out: list[Command]) -> None:
        threshold = self.policy.paper_threshold * len(self._samples)
        self._fused = self._num_generating <= threshold
        super()._advance(out)


def curve(found: Evaluated, *, early: bool) -> list[tuple[float, float]]:
    """(threshold, generation plus inference against serial) of one fixed threshold. `early`: on
    top of our early scoring, where instances that run dry by themselves score too."""
    policy = ro.policy_of(found.config, found.rollout.layout)
    serial_s = found.rollout.serial.end_s
    points = []
    for threshold in THRESHOLDS:
        chosen = replace(policy, migration=Migration.PAPER, paper_threshold=threshold)
        end_s = _end(found, chosen, RolloutScheduler if early else _NothingBefore)
        points.append((threshold, serial_s / end_s))
    return points


def _end(found: Evaluated, policy: Policy, kind: type[RolloutScheduler]) -> float:
    workload, layout, cost = found.workload, found.rollout.layout, found.rollout.cost
    lengths = LengthModel(policy.max_response_tokens, workload.history)
    scheduler = kind(layout.instances, workload.scored, cost, policy, lengths=lengths)
    samples = samples_of(workload.prompts)
    world = Simulator(scheduler, cost, workload.lengths, samples, layout.instances, record=False)
    return world.run()[1].end_s


def row_of(actor: str, critic: str, limit: int, found: Evaluated) -> Row:
    serial, fused = found.serial, found.fused
    rollout, training = found.rollout, found.training
    best, at = max((gain, threshold) for threshold, gain in curve(found, early=False))
    inter_s = rollout.serial.end_s - rollout.fused.end_s
    intra_s = serial.training - fused.training
    split_s = found.workload.num_minibatches * min(
        training.fused_s,
        training.split_schedule_s + sum(t.exchange_s for t in training.fused),
    )
    return {
        "actor": actor,
        "critic": critic,
        "limit": limit,
        "serial_s": serial.step,
        "fused_s": fused.step,
        "step": serial.step / fused.step,
        "inter_only": serial.step / (serial.step - inter_s),
        "intra_only": serial.step / (serial.step - intra_s),
        "rollout": rollout.serial.end_s / rollout.fused.end_s,
        "rollout_bound": rollout.serial.end_s / rollout.serial.generation_s,
        "training": training.serial_s / min(training.fused_s, training.serial_s),
        "training_split": serial.training / split_s,
        "step_split": serial.step / (fused.step - fused.training + split_s),
        "rollout_share": rollout.serial.end_s / serial.step,
        "other_share": fused.other / fused.step,
        "moves": rollout.fused.num_moved,
        "paper_rollout": best,
        "paper_threshold": at,
        "layouts": "; ".join(
            [f"rollout tp {rollout.layout.tp}"]
            + [f"{t.role} {t.parallel.text()} m {t.num_microbatches}" for t in training.fused]
        ),
    }


def summary_of(name: str, rows: Sequence[Row]) -> Row:
    """Least, median and greatest ratio over settings."""
    told: dict[str, float | int | str] = {"variant": name}
    for key in ("step", "inter_only", "intra_only", "rollout", "training", "training_split"):
        values = [float(row[key]) for row in rows]
        told[key] = f"{min(values):.2f} / {statistics.median(values):.2f} / {max(values):.2f}"
    return told


Key = tuple[str, str, int]
Curves = dict[Key, list[tuple[float, float]]]


def draw(curves: Curves, early: Curves, ours: dict[Key, float], path: Path) -> None:
    """One panel per response limit: the paper's policy, ours with a threshold, ours."""
    figure = Figure(figsize=(13, 4.6))
    axes = figure.subplots(1, len(LIMITS), sharey=True, squeeze=False)[0]
    colors = ("#0072b2", "#d55e00", "#009e73", "#a8457f")
    for axis, limit in zip(axes, LIMITS, strict=True):
        axis.axvspan(0.17, 0.23, color="#e8e8e8", zorder=0)
        axis.axhline(1.0, color="#666", lw=0.8)
        for (actor, critic), color in zip(PAIRS, colors, strict=True):
            key = (actor, critic, limit)
            name = f"{actor.upper()}/{critic.upper()}"
            axis.plot(*zip(*curves[key], strict=True), "o-", ms=3, color=color, label=name)
            axis.plot(*zip(*early[key], strict=True), "--", lw=1, color=color)
            axis.axhline(ours[key], color=color, ls=":", lw=1.2)
        axis.set_title(f"responses up to {limit}", fontsize=10)
        axis.set_xlabel("part of the batch that remains when the tail moves", fontsize=9)
    axes[0].set_ylabel("generation + inference, times as fast as serial", fontsize=9)
    axes[0].legend(title="actor/critic", fontsize=8)
    figure.suptitle(
        "Simulated. Solid: one threshold, nothing scored before it (the paper's system). Dashed: "
        "with early scoring.\nDotted: our policy. Grey: the threshold that the paper found best.",
        fontsize=10,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--name", default="paper_evaluation")
    args = parser.parse_args()
    rows: list[Row] = []
    curves: dict[Key, list[tuple[float, float]]] = {}
    early: dict[Key, list[tuple[float, float]]] = {}
    ours: dict[Key, float] = {}
    for actor, critic in PAIRS:
        for limit in LIMITS:
            found = found_for(actor, critic, limit, VARIANTS[0])
            rows.append(row_of(actor, critic, limit, found))
            curves[actor, critic, limit] = curve(found, early=False)
            early[actor, critic, limit] = curve(found, early=True)
            ours[actor, critic, limit] = float(rows[-1]["rollout"])
    print_table([{k: v for k, v in row.items() if k != "layouts"} for row in rows])
    for row in rows:
        print(row["actor"], row["critic"], row["limit"], row["layouts"])
    variants = [summary_of("as assumed, all 12 settings", rows)]
    middle = [row for row in rows if row["limit"] == 1024]
    variants.append(summary_of("as assumed, responses up to 1024", middle))
    for variant in VARIANTS[1:]:
        some = [row_of(a, c, 1024, found_for(a, c, 1024, variant)) for a, c in PAIRS]
        variants.append(summary_of(variant.name, some))
    print("\nleast / median / greatest; the paper reports", PAPER)
    print_table(variants)
    draw(curves, early, ours, RESULTS / f"{args.name}.png")
    points: list[Row] = [
        {"actor": a, "critic": c, "limit": limit, "threshold": t, "rollout": gain, "policy": name}
        for name, found_curves in (("paper", curves), ("early scoring", early))
        for (a, c, limit), line in found_curves.items()
        for t, gain in line
    ]
    print(write_result(args.name, [dict(PAPER), *rows, *variants, *points]))


if __name__ == "__main__":
    main()
