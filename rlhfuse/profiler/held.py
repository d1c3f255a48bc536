"""How many micro-batches' activations each rank held, moment by moment, from its named tasks."""

from collections.abc import Sequence

from rlhfuse.profiler.rounds import TRAINING_KINDS, find_rounds, parse_task
from rlhfuse.profiler.table import SpanTable
from rlhfuse.schedules.ir import Op
from rlhfuse.timeline import Kind, Span

Curve = list[tuple[float, int]]  # (moment in s, micro-batches held from then on)


def held_microbatches(table: SpanTable) -> dict[str, Curve]:
    """Per lane with named training tasks: held from the start of F to the end of B, or of W where
    the weight gradient is split off."""
    changes: dict[str, list[tuple[float, int]]] = {}
    for training in find_rounds(table.spans(table.is_kind((*TRAINING_KINDS, Kind.OPTIMIZER)))):
        for lane, spans in training.spans.items():
            changes.setdefault(lane, []).extend(_changes(spans))
    curves = {}
    for lane, moments in changes.items():
        held, curve = 0, Curve()
        for moment, change in sorted(moments):
            held += change
            if curve and curve[-1][0] == moment:
                curve[-1] = (moment, held)
            else:
                curve.append((moment, held))
        curves[lane] = curve
    return curves


def _changes(spans: Sequence[Span]) -> list[tuple[float, int]]:
    tasks = [(parse_task(span.name), span) for span in spans]
    split = {(t.pipeline, t.pp_stage) for t, _ in tasks if t is not None and t.op is Op.W}
    found = []
    for task, span in tasks:
        if task is None:
            continue
        if task.op is Op.F:
            found.append((span.start_s, 1))
        elif task.op is Op.W or (task.op is Op.B and (task.pipeline, task.pp_stage) not in split):
            found.append((span.end_s, -1))
    return found
