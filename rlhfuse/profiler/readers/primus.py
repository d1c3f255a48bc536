"""AMD Primus' pipeline dump: ``pp_rank_N.json``, CUDA-event milliseconds per iteration.

Each file maps an iteration to ``{total, memory, fwd_start, fwd_end, bwd_start, bwd_end}``, lists
over micro-batches, counted from the iteration's start. (AMD-AGI/Primus, tools/visualization.)
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import msgspec

from rlhfuse.profiler.trace import Loaded, Trace, common_steps
from rlhfuse.timeline import Kind, Span, Timeline

_NAME = re.compile(r".*?(\d+)\.json(\.gz)?")


class Iteration(msgspec.Struct, frozen=True):
    """One iteration of one rank; milliseconds, memory in GB."""

    total: float
    fwd_start: tuple[float, ...]
    fwd_end: tuple[float, ...]
    bwd_start: tuple[float, ...]
    bwd_end: tuple[float, ...]
    memory: float = 0.0


Rank = Mapping[int, Iteration]


def open_primus(paths: list[Path]) -> Trace:
    """All pipeline ranks of one run; the number in a file's name is its rank.

    Raises:
        ValueError: a file is broken, or ranks are missing or given twice.
    """
    ranks: dict[int, Rank] = {}
    for path in paths:
        match = _NAME.fullmatch(path.name)
        if match is None:
            raise ValueError(f"{path}: no rank in the file's name (expected pp_rank_N.json)")
        if int(match[1]) in ranks:
            raise ValueError(f"{path}: rank {match[1]} is given twice")
        ranks[int(match[1])] = _read(path)
    missing = sorted(set(range(max(ranks) + 1)) - set(ranks))
    if missing:
        raise ValueError(f"{paths[0].parent}: pp_rank files of ranks {missing} are missing")
    steps, told = common_steps(ranks, str(paths[0].parent))
    if not steps:
        raise ValueError(f"{paths[0].parent}: the ranks have no iteration in common")

    def load(step: int | None) -> Loaded:
        chosen = {rank: ranks[rank][steps[-1] if step is None else step] for rank in ranks}
        found = _load(chosen)
        return replace(found, warnings=(*told, *found.warnings))

    return Trace("primus", steps, load)


def _read(path: Path) -> Rank:
    try:
        found = msgspec.json.decode(path.read_bytes(), type=dict[int, Iteration])
    except msgspec.DecodeError as error:
        raise ValueError(f"{path}: not a Primus pp_rank file: {error}") from error
    for number, it in found.items():
        lists = (it.fwd_start, it.fwd_end, it.bwd_start, it.bwd_end)
        if len({len(entries) for entries in lists}) != 1:
            raise ValueError(f"{path}: iteration {number} has lists of unequal lengths")
    return found


def _load(ranks: Mapping[int, Iteration]) -> Loaded:
    counts = {rank: len(it.fwd_start) for rank, it in ranks.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"primus: ranks have unequal numbers of micro-batches: {counts}")
    spans = tuple(span for rank in sorted(ranks) for span in _spans(rank, ranks[rank]))
    totals = ", ".join(f"{ranks[rank].total / 1e3:.3f}" for rank in sorted(ranks))
    return Loaded(
        Timeline(spans), warnings=(f"the run's own totals per rank, in seconds: {totals}",)
    )


def _spans(rank: int, it: Iteration) -> Iterator[Span]:
    for kind, starts, ends in (
        (Kind.F, it.fwd_start, it.fwd_end),
        (Kind.B, it.bwd_start, it.bwd_end),
    ):
        for mb, (start, end) in enumerate(zip(starts, ends, strict=True)):
            if end < start:
                raise ValueError(f"primus: rank {rank}, {kind.value}{mb} ends before it starts")
            name = f"model:{rank}{kind.value}{mb}"
            yield Span(f"rank{rank}", start / 1e3, end / 1e3, kind, name)
