"""What tasks cost on the machine at hand, from a recorded call."""

import statistics
from collections.abc import Mapping

import torch.distributed as dist

from rlhfuse.megatron.orders import Costs
from rlhfuse.timeline import Kind, Timeline

_PARTS = {Kind.F: "forward", Kind.B: "backward", Kind.I: "input", Kind.W: "weight"}


def measured_costs(timeline: Timeline) -> dict[str, Costs]:
    """Seconds per stage of each pipeline in the last recorded call. Collective over the world.

    Record with ``Scheduler(record=True)`` or ``FusedScheduler(record=True)``; medians over
    micro-batches. Where a backward was never split, a third of forward and backward counts as the
    weight's part.
    """
    mine: dict[tuple[str, int], dict[str, list[float]]] = {}
    for span in timeline.spans:
        key = (str(span.args["pipeline"]), int(span.args["pp_stage"]))
        parts = mine.setdefault(key, {})
        parts.setdefault(_PARTS[span.kind], []).append(span.duration_s)
    medians = {
        key: {part: statistics.median(times) for part, times in parts.items()}
        for key, parts in mine.items()
    }
    everywhere: list[dict[tuple[str, int], dict[str, float]] | None] = [
        None
    ] * dist.get_world_size()
    dist.all_gather_object(everywhere, medians)
    found: dict[str, dict[int, dict[str, float]]] = {}
    for one in everywhere:
        for (pipeline, stage), seconds in (one or {}).items():
            found.setdefault(pipeline, {}).setdefault(stage, seconds)
    return {pipeline: _costs(stages) for pipeline, stages in found.items()}


def _costs(stages: Mapping[int, Mapping[str, float]]) -> Costs:
    forward, backward, weight = [], [], []
    for stage in sorted(stages):
        parts = stages[stage]
        split = parts.get("input", 0.0) + parts.get("weight", 0.0)
        whole = split if "weight" in parts else parts["backward"]
        forward.append(parts["forward"])
        backward.append(whole)
        weight.append(parts.get("weight", min(whole, (parts["forward"] + whole) / 3)))
    return Costs(tuple(forward), tuple(backward), tuple(weight))
