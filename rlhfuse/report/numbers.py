"""The report's figures, drawn from a run's metrics. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from rlhfuse.profiler.causes import Cause
from rlhfuse.report.sources import RunFolder, SampleRow, StepValues

STAGES = (
    ("timing_s/step", "whole step"),
    ("timing_s/rollout", "generation and scoring"),
    ("timing_s/gen", "generation"),
    ("timing_s/score", "scoring after it"),
    ("timing_s/update", "training"),
)


TOKENS = "perf/total_num_tokens"


@dataclass(frozen=True, slots=True)
class Change:
    """A value before and after, and what it is."""

    before: float
    after: float
    what: str


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Median seconds of a stage, over serial and over fused steps."""

    label: str
    serial_s: float
    fused_s: float

    @property
    def speedup(self) -> float:
        return self.serial_s / self.fused_s if self.fused_s > 0 else float("nan")


def validation_series(run: RunFolder) -> dict[str, list[tuple[float, float]]]:
    """Mean rewards of held-out prompts by set: ``val-core/<set>/reward/mean@n``."""
    names = {name for row in run.steps for name in row.values}
    kept = sorted(n for n in names if n.startswith("val-core/") and "/mean@" in n)
    return {name.removeprefix("val-core/"): run.series(name) for name in kept}


def reward_change(run: RunFolder) -> Change | None:
    """Held-out reward at the first and last validation; without one, training rewards."""
    for name, points in validation_series(run).items():
        if len(points) > 1:
            return Change(points[0][1], points[-1][1], f"held-out prompts, {name}")
    points = run.series("critic/rewards/mean") or run.series("critic/score/mean")
    if len(points) < 2:
        return None
    few = max(1, len(points) // 10)
    first, last = points[:few], points[-few:]
    return Change(
        sum(y for _, y in first) / few,
        sum(y for _, y in last) / few,
        f"training prompts, first and last {few} steps",
    )


def measured_speedup(run: RunFolder) -> tuple[float, str] | None:
    """Fused against serial, and how it was measured."""
    audits = [value for _, value in run.series("fusion/measured_speedup")]
    if audits:
        return median(audits), f"median of {len(audits)} audited steps"
    if run.verification is not None:
        return run.verification.speedup, f"rlhfuse verify, {run.verification.steps} steps"
    return None


def stage_times(run: RunFolder) -> list[StageTimes]:
    """Serial and fused medians of every stage that both sorts of steps have, each step's times
    scaled to the run's median number of tokens: serial and fused steps are different steps."""
    counts = [row.values[TOKENS] for row in run.steps if row.values.get(TOKENS)]
    typical = median(counts) if counts else 0.0
    serial = [row for row in run.steps if row.serial]
    fused = [row for row in run.steps if not row.serial]
    found = []
    for name, label in STAGES:
        pair = _scaled(serial, name, typical), _scaled(fused, name, typical)
        if all(pair):
            found.append(StageTimes(label, median(pair[0]), median(pair[1])))
    return found


def _scaled(rows: Sequence[StepValues], name: str, tokens: float) -> list[float]:
    return [
        row.values[name] * (tokens / row.values[TOKENS] if row.values.get(TOKENS) else 1.0)
        for row in rows
        if name in row.values
    ]


def cause_shares(rows: Sequence[StepValues]) -> dict[Cause, list[float]]:
    """Per cause, its share of all device time in each step (per cent)."""
    shares: dict[Cause, list[float]] = {}
    for cause in Cause:
        found = [_share(row, cause) for row in rows]
        if any(found):
            shares[cause] = found
    return shares


def _share(row: StepValues, cause: Cause) -> float:
    total = sum(row.values.get(f"bubble/{c.value}", 0.0) for c in Cause)
    return 100 * row.values.get(f"bubble/{cause.value}", 0.0) / total if total > 0 else 0.0


def has_causes(row: StepValues) -> bool:
    """Whether a step's idle time was explained."""
    return any(name.startswith("bubble/") for name in row.values)


def sample_pairs(samples: Sequence[SampleRow]) -> list[tuple[SampleRow, SampleRow]]:
    """Responses to the same prompt at the first and the last validation, in file order."""
    if not samples:
        return []
    first, last = min(s.step for s in samples), max(s.step for s in samples)
    if first == last:
        return []
    before: dict[tuple[str, str], SampleRow] = {}
    for sample in samples:
        if sample.step == first:
            before.setdefault((sample.set, sample.prompt), sample)
    pairs = []
    for sample in samples:
        if sample.step == last:
            earlier = before.pop((sample.set, sample.prompt), None)
            if earlier is not None:
                pairs.append((earlier, sample))
    return pairs
