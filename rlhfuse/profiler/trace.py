"""A trace that can be profiled: what made it, which steps it holds, and their timelines."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from rlhfuse.profiler.summary import WhatIf
from rlhfuse.profiler.table import SpanTable
from rlhfuse.timeline import Timeline


@dataclass(frozen=True, slots=True)
class Loaded:
    """One step, or all of a trace that knows no steps.

    `pipelines` says whether the spans tell pipeline work from other work: without it no bubble
    number can be given, only busy and idle time.
    """

    timeline: Timeline | SpanTable
    pipelines: bool = True
    warnings: tuple[str, ...] = ()
    what_if: tuple[WhatIf, ...] = ()  # what the reader itself can predict


@dataclass(frozen=True, slots=True)
class Trace:
    """Files of one format. `load` reads a step's timeline; None: the whole trace."""

    format: str
    steps: tuple[int, ...]
    load: Callable[[int | None], Loaded]

    def pick(self, step: int | None) -> int | None:
        """The step that is meant: the given one, else the last; None where there are none.

        Raises:
            ValueError: the trace does not hold that step.
        """
        if step is None:
            return self.steps[-1] if self.steps else None
        if step not in self.steps:
            known = _ranges(self.steps) if self.steps else "none: the trace is not cut into steps"
            raise ValueError(f"--step {step}: not in the trace (steps: {known})")
        return step


def common_steps(
    ranks: Mapping[int, Collection[int]], place: str
) -> tuple[tuple[int, ...], list[str]]:
    """The steps that every rank has, in order, and what to say of others.

    Raises:
        ValueError: each rank has some, but all have none in common.
    """
    common = set.intersection(*(set(mine) for mine in ranks.values()))
    every = set().union(*ranks.values())
    if every and not common and all(ranks.values()):
        known = "; ".join(
            f"rank {rank}: {_ranges(tuple(sorted(ranks[rank])))}" for rank in sorted(ranks)[:3]
        )
        raise ValueError(f"{place}: the ranks have no step in common ({known})")
    told = []
    if every - common:
        left = _ranges(tuple(sorted(every - common)))
        told = [f"steps {left} are not on all ranks, and left out"]
        if not common:
            told = ["some ranks are not cut into steps: the whole trace is taken as one"]
    return tuple(sorted(common)), told


def _ranges(steps: tuple[int, ...]) -> str:
    """``1-20, 30`` for steps in order."""
    parts: list[list[int]] = []
    for step in steps:
        if parts and step == parts[-1][1] + 1:
            parts[-1][1] = step
        else:
            parts.append([step, step])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
