"""Forward and backward passes whose micro-batch nobody wrote down, numbered by their order.

Every stage runs each direction's micro-batches first in, first out: the k-th forward pass of a
stage is micro-batch k, if every stage has as many, and none begins before its input is made.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from rlhfuse.timeline import Kind

_EARLY = 0.05  # a pass that begins this share of its time before its input is there had another


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass of a pipeline's stage on a rank; or (kind OPTIMIZER) the end of a step on its rank,
    whatever its pipeline and stage; seconds."""

    rank: int
    pipeline: str
    stage: int
    kind: Kind
    start_s: float
    end_s: float


_Place = tuple[int, str, int]  # rank, pipeline, stage


def numbers(passes: Sequence[Pass]) -> list[tuple[str, int]]:
    """The pipeline and micro-batch of each pass, counted anew after each optimizer step of its
    rank; -1 for optimizer steps. Where several ranks run a stage, each is of a replica of its own.

    Raises:
        ValueError: order does not tell it, and why.
    """
    rows = _rows(passes)
    replica = _replicas(list(rows))
    found = [("", -1)] * len(passes)
    steps: dict[tuple[str, int], dict[int, list[int]]] = defaultdict(dict)
    for place, row in rows.items():
        for step, mine in enumerate(_cut(passes, row)):
            steps[replica[place], step][place[2]] = mine
    for (pipeline, _), stages in steps.items():
        if set(stages) != {place[2] for place, name in replica.items() if name == pipeline}:
            raise ValueError("the stages have unequal numbers of optimizer steps")
        for i, number in _numbered(passes, stages):
            found[i] = (pipeline, number)
    return found


def _rows(passes: Sequence[Pass]) -> dict[_Place, list[int]]:
    """Passes and optimizer steps in time order, by place."""
    rows: dict[_Place, list[int]] = {}
    places: dict[int, set[_Place]] = defaultdict(set)
    for one in passes:
        if one.kind is not Kind.OPTIMIZER:
            places[one.rank].add((one.rank, one.pipeline, one.stage))
    for i in sorted(range(len(passes)), key=lambda i: passes[i].start_s):
        one = passes[i]
        ends = one.kind is Kind.OPTIMIZER
        for place in places[one.rank] if ends else [(one.rank, one.pipeline, one.stage)]:
            rows.setdefault(place, []).append(i)
    return {place: rows[place] for place in sorted(rows)}


def _replicas(places: Sequence[_Place]) -> dict[_Place, str]:
    """The pipeline of each place, with a number where several ranks run one stage."""
    ranks: dict[tuple[str, int], list[int]] = defaultdict(list)
    for rank, pipeline, stage in places:
        ranks[pipeline, stage].append(rank)
    alone = {
        name: all(len(r) == 1 for (n, _), r in ranks.items() if n == name) for name, _ in ranks
    }
    return {
        (rank, name, stage): name if alone[name] else f"{name}{ranks[name, stage].index(rank)}"
        for rank, name, stage in places
    }


def _cut(passes: Sequence[Pass], row: Sequence[int]) -> list[list[int]]:
    """A stage's passes, by training step."""
    steps: list[list[int]] = [[]]
    for i in row:
        if passes[i].kind is not Kind.OPTIMIZER:
            steps[-1].append(i)
        elif steps[-1]:
            steps.append([])
    return [step for step in steps if step]


def _numbered(passes: Sequence[Pass], stages: Mapping[int, Sequence[int]]) -> list[tuple[int, int]]:
    of: dict[Kind, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for stage, row in stages.items():
        for i in row:
            of[passes[i].kind][stage].append(i)
    counts = {
        f"{kind.value} of stage {stage}": len(rows.get(stage, ()))
        for kind, rows in of.items()
        for stage in stages
    }
    if len(set(counts.values())) > 1:
        raise ValueError(f"the stages have unequal numbers of passes: {counts}")
    for kind, rows in of.items():
        ordered = sorted(stages, reverse=kind is not Kind.F)
        for before, after in pairwise(ordered) if kind is not Kind.W else ():
            for one, other in zip(rows[before], rows[after], strict=True):
                _check(passes[one], passes[other])
    return [(i, k) for rows in of.values() for row in rows.values() for k, i in enumerate(row)]


def _check(one: Pass, other: Pass) -> None:
    if other.start_s < one.end_s - _EARLY * (other.end_s - other.start_s):
        raise ValueError(
            f"in order, a {one.kind.value} of stage {other.stage} would begin before that of "
            f"stage {one.stage} is done"
        )
