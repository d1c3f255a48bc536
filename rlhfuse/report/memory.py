"""The report's section on memory: what each training rank took at most, beside its plan."""

import re

from rlhfuse.report import markup
from rlhfuse.report.sources import RunFolder

_PEAK = re.compile(r"memory/rank(\d+)/peak_gb")


def memory_section(run: RunFolder) -> str:
    """A row for each rank; nothing where no step says what was taken."""
    peaks: dict[int, float] = {}
    plans: dict[int, float] = {}
    for step in run.steps:
        for name, value in step.values.items():
            found = _PEAK.fullmatch(name)
            if found is None:
                continue
            rank = int(found[1])
            plan = step.values.get(f"memory/rank{rank}/planned_gb", 0.0)
            peaks[rank] = max(peaks.get(rank, 0.0), value)
            plans[rank] = max(plans.get(rank, 0.0), plan)
    if not peaks:
        return ""
    rows = [
        [
            f"rank {rank}",
            f"{peak:.3g} GiB",
            f"{plans[rank]:.3g} GiB",
            f"{peak / plans[rank]:.2f}" if plans[rank] else "",
        ]
        for rank, peak in sorted(peaks.items())
    ]
    return markup.section(
        "Memory of training, against plan",
        "The most that each training worker has taken (on a GPU its tensors, on a CPU its "
        "process), and what was planned: weights, gradients and optimizer states of its stages, "
        "and the activations that its schedules hold at one time, by an estimate of what a layer "
        "keeps.",
        markup.table(["", "measured", "planned", "measured / planned"], rows, numeric_from=1),
    )
