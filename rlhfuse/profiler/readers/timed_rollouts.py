"""Step metrics and rollout dumps of one run: seconds from the one, the tail from the other.

Alone, metrics bound the tail loosely (mean and longest response), and dumps know no clock.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from rlhfuse.profiler.arrays import Floats
from rlhfuse.profiler.readers.rollouts import hidden_s, lengths_by_step, tail_with_error
from rlhfuse.profiler.readers.step_metrics import BOUNDED, TAIL_SHARE
from rlhfuse.profiler.summary import WhatIf
from rlhfuse.profiler.table import SpanTable
from rlhfuse.profiler.trace import Loaded, Trace
from rlhfuse.timeline import Kind, Span, Timeline


def open_timed_rollouts(timed: Trace, dumps: list[Path]) -> Trace:
    """The steps that have both, their generation cut where the long tail begins.

    Raises:
        ValueError: the dumps hold no response, or none of a step that the metrics know.
    """
    lengths, guessed = lengths_by_step(dumps)
    steps = tuple(sorted(set(lengths) & set(timed.steps)))
    if not steps:
        raise ValueError(
            f"{dumps[0]}: rollouts of steps {_some(lengths)}, metrics of steps "
            f"{_some(timed.steps)}: give files of the same steps"
        )

    def load(step: int | None) -> Loaded:
        chosen = steps[-1] if step is None else step
        return _with_tail(timed.load(chosen), np.sort(np.array(lengths[chosen])), guessed)

    return Trace(f"{timed.format} and rollout dump", steps, load)


def _some(steps: Mapping[int, object] | Sequence[int]) -> str:
    ordered = sorted(steps)
    return ", ".join(map(str, ordered[:3])) + (f" ... {ordered[-1]}" if len(ordered) > 3 else "")


def _with_tail(found: Loaded, ordered: Floats, guessed: bool) -> Loaded:
    share, low, high = tail_with_error(ordered)
    table = SpanTable.of(found.timeline)
    spans: list[Span] = []
    seconds = dict.fromkeys((Kind.GENERATE, Kind.SCORE, Kind.REWARD), 0.0)
    for span in table.timeline().spans:
        if span.kind in seconds:
            seconds[span.kind] += span.duration_s
        if span.kind is not Kind.GENERATE:
            spans.append(span)
            continue
        begin_s = span.end_s - share * span.duration_s
        spans.append(Span(span.lane, span.start_s, begin_s, span.kind, span.name, span.args))
        spans.append(Span(span.lane, begin_s, span.end_s, Kind.WAIT, "tail", {"what": "long_tail"}))
    scoring_s = seconds[Kind.SCORE] + seconds[Kind.REWARD]
    told = [text for text in found.warnings if BOUNDED not in text]
    told.append(
        f"long tail (under {TAIL_SHARE:.0%} of {len(ordered)} samples running): {share:.0%} of "
        f"generation ({low:.0%} to {high:.0%})"
    )
    if guessed:
        told.append("lengths are guessed from characters, four a token")
    saved = hidden_s(ordered, seconds[Kind.GENERATE], scoring_s)
    what = tuple(
        WhatIf(f"scoring hidden in the long tail ({bound})", table.wall_s - s, s / table.wall_s)
        for bound, s in zip(("at least", "at most"), saved, strict=True)
    )
    timeline = Timeline(tuple(spans))
    return replace(
        found, timeline=timeline, warnings=tuple(told), what_if=what if scoring_s else ()
    )
