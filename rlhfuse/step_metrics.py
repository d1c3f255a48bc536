"""The metrics of one step that the controller knows: lengths, times, idle time, digests. Pure."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from rlhfuse.config import Config
from rlhfuse.profiler.attribution import attribute
from rlhfuse.rollout.records import Record, RolloutResult
from rlhfuse.timeline import Kind, Timeline
from rlhfuse.update_plan import UpdatePlan


@dataclass(slots=True)
class StepTimes:
    """Marks on the controller's clock, seconds."""

    start_s: float
    start_cpu_s: float = 0.0  # processor time of the controller
    end_cpu_s: float = 0.0
    rollout_done_s: float = 0.0
    update_done_s: float = 0.0
    end_s: float = 0.0


def step_metrics(
    config: Config,
    rollout: RolloutResult,
    plan: UpdatePlan,
    timeline: Timeline,
    times: StepTimes,
    *,
    kl_coef: float,
) -> dict[str, float]:
    """Named as the field names them; ours are under ``bubble/*`` and ``fusion/*``.

    With fusion, stages overlap: ``timing_s/gen`` is until the last response was there,
    ``timing_s/score`` is what scoring added after that; ``bubble/*`` are exclusive device-seconds
    that add up to the step's time on all devices.
    """
    tokens = sum(len(r.prompt) + len(r.response_ids) for r in rollout.records)
    step_s = times.end_s - times.start_s
    metrics = {
        "timing_s/step": step_s,
        "timing_s/gen": rollout.generated_s,
        "timing_s/score": rollout.done_s - rollout.generated_s,
        "timing_s/rollout": rollout.done_s,
        "timing_s/update": times.update_done_s - times.rollout_done_s,
        "timing_s/update_weights": times.end_s - times.update_done_s,
        "perf/controller_share": (times.end_cpu_s - times.start_cpu_s) / step_s,
        "perf/total_num_tokens": float(tokens),
        "perf/throughput": tokens / step_s / config.placement.num_devices,
        "perf/samples_per_device_s": len(rollout.records) / step_s / config.placement.num_devices,
        "actor/kl_coef": kl_coef,
        "fusion/moved_samples": float(rollout.moved),
        "fusion/groups_trained_ahead": float(rollout.trained_ahead),
        "fusion/predicted_update_s": plan.predicted_s,
        "fusion/predicted_serial_update_s": plan.serial_s,
    }
    metrics.update(length_metrics(config, rollout.records))
    metrics.update(exactness_metrics(timeline))
    metrics.update(score_metrics(rollout.records))
    # All devices, from the step's start to its end: what nobody recorded is the controller's.
    lanes = [f"rank{rank}" for rank in range(config.placement.num_devices)]
    window = (times.start_s, times.end_s)
    metrics.update(attribute(timeline, lanes=lanes, window=window).metrics())
    metrics["perf/task_s"] = sum(
        span.duration_s for span in timeline.spans if span.kind in (Kind.F, Kind.B, Kind.I, Kind.W)
    )
    return metrics


def exactness_metrics(timeline: Timeline) -> dict[str, float]:
    """What canonical near ties cost: how many there were, and their share of generation."""
    spans = [span for span in timeline.spans if span.kind is Kind.GENERATE]
    near_ties, exact_s = (
        sum(float(span.args.get(name, 0)) for span in spans) for name in ("near_ties", "exact_s")
    )
    generated_s = sum(span.duration_s for span in spans)
    return {
        "rollout/near_ties": near_ties,
        "rollout/exactness_share": exact_s / generated_s if generated_s else 0.0,
    }


def length_metrics(config: Config, records: Sequence[Record]) -> dict[str, float]:
    """Prompt and response lengths in tokens."""
    responses = np.array([len(r.response_ids) for r in records], dtype=np.float64)
    prompts = np.array([len(r.prompt) for r in records], dtype=np.float64)
    return {
        "response_length/mean": float(responses.mean()),
        "response_length/median": float(np.median(responses)),
        "response_length/p99": float(np.percentile(responses, 99)),
        "response_length/max": float(responses.max()),
        "response_length/min": float(responses.min()),
        "response_length/clip_ratio": float(
            np.mean([r.finish_reason == "length" for r in records])
        ),
        "prompt_length/mean": float(prompts.mean()),
        "prompt_length/max": float(prompts.max()),
    }


def score_metrics(records: Sequence[Record]) -> dict[str, float]:
    """Outcome scores, and the mean of whatever else the reward function reported."""
    scores = np.array([r.score for r in records], dtype=np.float64)
    metrics = {
        "critic/score/mean": float(scores.mean()),
        "critic/score/max": float(scores.max()),
        "critic/score/min": float(scores.min()),
    }
    names = sorted({name for r in records for name in r.reward_metrics})
    for name in names:
        found = [r.reward_metrics[name] for r in records if name in r.reward_metrics]
        metrics[f"reward/{name}/mean"] = float(np.mean(found))
    return metrics


def digest_of(parts: Iterable[bytes | str]) -> str:
    """One sha256 over parts in order, each with its length."""
    whole = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        whole.update(len(data).to_bytes(8, "little") + data)
    return whole.hexdigest()
