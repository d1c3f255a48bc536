"""Step metrics that RL frameworks log anyway: stage times from JSONL or console logs.

verl (JSONL of its ``file`` logger, and console lines ``step:3 - timing_s/gen:12.3 - ...``), ours,
and others with the same names; NeMo-RL's and slime's names are mapped to them. There is no device
in such numbers, so the whole job is one lane, and the tail is bounded by the response lengths.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from rlhfuse.profiler.summary import WhatIf
from rlhfuse.profiler.trace import Loaded, Trace
from rlhfuse.timeline import Kind, Span, Timeline

# In the order in which stages run: names that frameworks give a stage, its kind.
_STAGES: tuple[tuple[tuple[str, ...], Kind], ...] = (
    (("timing_s/gen", "timing/train/generation", "perf/rollout_time"), Kind.GENERATE),
    (("timing_s/reward", "timing/train/reward_calculation"), Kind.REWARD),
    (("timing_s/score",), Kind.SCORE),
    (
        (
            "timing_s/old_log_prob",
            "timing_s/old_log_probs",
            "timing/train/policy_and_reference_logprobs",
            "perf/log_probs_time",
        ),
        Kind.SCORE,
    ),
    (("timing_s/ref", "perf/ref_log_probs_time"), Kind.SCORE),
    (("timing_s/values", "perf/values_time"), Kind.SCORE),
    (("timing_s/adv", "timing/train/advantage_calculation"), Kind.ADVANTAGE),
    (("timing_s/update_critic", "perf/critic_train_time"), Kind.COMPUTE),
    (
        ("timing_s/update_actor", "timing/train/policy_training", "perf/actor_train_time"),
        Kind.COMPUTE,
    ),
    (("timing_s/update",), Kind.COMPUTE),
    (
        (
            "timing_s/update_weights",
            "timing_s/reshard",
            "timing/train/prepare_for_generation/total",
            "perf/update_weights_time",
        ),
        Kind.WEIGHTS,
    ),
    (("timing_s/save_checkpoint", "timing/train/checkpointing"), Kind.CHECKPOINT),
)
_WHOLE = ("timing_s/step", "timing/train/total_step_time", "perf/step_time", "perf/time_per_step")
_PAIR = re.compile(
    r"([A-Za-z_][\w./@-]*)\s*[:=]\s*(?:np\.float\d+\()?(-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)"
)
_STEP = re.compile(r"\bstep\s*[:=]\s*(\d+)")
BOUNDED = "from the response lengths alone"  # what a note says of a tail that dumps tell better
TAIL_SHARE = 0.2  # the tail: fewer than this share of the samples still run


def holds_step_metrics(head: bytes) -> bool:
    """Whether a file's beginning looks like step metrics."""
    names = {name.encode() for stage, _ in _STAGES for name in stage}
    return any(name in head for name in names)


def open_step_metrics(paths: list[Path]) -> Trace:
    """The steps of one run, from one or more files; a later row replaces an earlier one.

    Raises:
        ValueError: no row has the time of a stage.
    """
    rows: dict[int, Mapping[str, float]] = {}
    for path in paths:
        for step, values in _rows(path):
            rows[step] = values
    return trace_of_rows("step metrics", rows, str(paths[0]))


def trace_of_rows(name: str, rows: Mapping[int, Mapping[str, float]], place: str) -> Trace:
    """The trace of steps whose metrics are known; those without a stage's time are left out.

    Raises:
        ValueError: no row has the time of a stage.
    """
    timed = {
        step: values
        for step, values in rows.items()
        if any(stage in values for stages, _ in _STAGES for stage in stages)
    }
    if not timed:
        raise ValueError(f"{place}: no step with stage times (timing_s/gen, ...) in it")
    steps = tuple(sorted(timed))

    def load(step: int | None) -> Loaded:
        return _load(timed[steps[-1] if step is None else step])

    return Trace(name, steps, load)


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, float]]]:
    number = 0
    for line in path.read_bytes().splitlines():
        text = line.decode(errors="replace").strip()
        step, values = _json_row(text) if text.startswith("{") else _console_row(text)
        if any(name in values for stage, _ in _STAGES for name in stage):
            number = number + 1 if step is None else step
            yield number, values


def _json_row(text: str) -> tuple[int | None, Mapping[str, float]]:
    try:
        row = msgspec.json.decode(text, type=dict[str, object])
    except msgspec.DecodeError:
        return None, {}
    inner = row.get("data")  # verl's file logger: {"step": 3, "data": {...}}
    numbers = {**row, **inner} if isinstance(inner, dict) else row
    values = {k: float(v) for k, v in numbers.items() if isinstance(v, int | float)}
    step = values.get("step", values.get("training/global_step"))
    return (int(step) if step is not None and abs(step) < 2**53 else None), values


def _console_row(text: str) -> tuple[int | None, Mapping[str, float]]:
    values = {name: float(number) for name, number in _PAIR.findall(text)}
    step = _STEP.search(text)
    return (int(step[1]) if step else None), values


def _load(values: Mapping[str, float]) -> Loaded:
    spans, at, used = [], 0.0, dict[Kind, float]()
    for names, kind in _STAGES:
        name = next((name for name in names if name in values), None)
        if name is None or not 0 < values[name] < float("inf"):
            continue
        spans.append(Span("job", at, at + values[name], kind, name.rpartition("/")[2]))
        at += values[name]
        used[kind] = used.get(kind, 0.0) + values[name]
    if not spans:
        raise ValueError("this step has no stage that took time")
    whole = next((values[name] for name in _WHOLE if name in values), at)
    warnings = ["stage times of the whole job: no devices in them, so no bubble fraction"]
    if whole > at:
        # An empty wait makes the lane as long as the step: the rest is the controller's.
        spans.append(Span("job", at, whole, Kind.WAIT, "rest of the step"))
    elif at > 1.01 * whole:
        warnings.append("the stages overlap: their times add up to more than the step")
    tail, told = tail_bounds(values, used.get(Kind.GENERATE, 0.0))
    scoring = used.get(Kind.SCORE, 0.0) + used.get(Kind.REWARD, 0.0)
    return Loaded(
        Timeline(tuple(spans)),
        pipelines=False,
        warnings=(*warnings, *told),
        what_if=_hidden(tail, scoring, max(whole, at)),
    )


def tail_bounds(
    values: Mapping[str, float], generation_s: float
) -> tuple[tuple[float, float] | None, list[str]]:
    """Least and most seconds of generation in which under a fifth of the samples still ran.

    Decode time is taken as proportional to positions. By Markov's inequality at most mean / t of
    the samples are longer than t, which bounds the tail from below; from above it begins, at the
    earliest, at the shortest responses.
    """
    mean, longest = values.get("response_length/mean"), values.get("response_length/max")
    if not mean or not longest or longest < mean or generation_s <= 0:
        return None, ["no response_length/mean and /max: the long tail cannot be bounded"]
    low = max(0.0, 1 - mean / (TAIL_SHARE * longest))
    high = 1 - max(0.0, values.get("response_length/min", 0.0)) / longest
    p99 = values.get("response_length/p99")
    if p99:  # at most 1 % run beyond it
        low = max(low, 1 - p99 / longest)
    median = values.get("response_length/median")
    if median:  # half of the samples run until there
        high = min(high, 1 - median / longest)
    told = (
        f"long tail (under {TAIL_SHARE:.0%} of samples running): {low:.0%} to {high:.0%} of "
        f"generation, {BOUNDED}"
    )
    return (low * generation_s, high * generation_s), [told]


def _hidden(
    tail: tuple[float, float] | None, scoring_s: float, step_s: float
) -> tuple[WhatIf, ...]:
    """What hiding the scoring in the tail would save: at least and at most."""
    if tail is None or scoring_s <= 0:
        return ()
    found = []
    for bound, seconds in zip(("at least", "at most"), tail, strict=True):
        saved = min(seconds, scoring_s)
        name = f"scoring hidden in the long tail ({bound})"
        found.append(WhatIf(name, step_s - saved, saved / step_s))
    return tuple(found)
