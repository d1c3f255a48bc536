"""Communication kernels matched between ranks: how much of each is waiting, and for whom.

A kernel that sends, receives or reduces lasts from its own start, however early, until the last of
its partners has come and the bytes are through: wait, then transfer. Kernels of one message or one
collective are matched by their sequence numbers, else by their order where all ranks have equally
many; where that does not hold, nothing is split, and a note says so.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rlhfuse.profiler.causes import CODE, Cause
from rlhfuse.profiler.table import KIND_CODE, SpanTable, stacked
from rlhfuse.timeline import Kind


@dataclass(frozen=True, slots=True)
class Comm:
    """One communication kernel: a row of a table, on a rank.

    `peers` are the ranks it sends to (True) or receives from (False); a collective has none and
    names its `group` and `what` instead. `sequence` is the sender's or the group's own number.
    """

    row: int
    rank: int
    peers: tuple[tuple[int, bool], ...] = ()
    group: str = ""
    what: str = ""
    sequence: int | None = None


@dataclass(frozen=True, slots=True)
class Meeting:
    """Kernels of several ranks that belong together: a message, or a collective."""

    comms: tuple[Comm, ...]
    message: bool


def meetings(comms: Sequence[Comm]) -> tuple[list[Meeting], list[str]]:
    """Messages and collectives that can be matched, and why others cannot."""
    streams: dict[tuple[str, str], dict[int, list[Comm]]] = defaultdict(lambda: defaultdict(list))
    for comm in comms:
        for peer, sends in comm.peers:
            source, target = (comm.rank, peer) if sends else (peer, comm.rank)
            streams[f"messages {source} to {target}", comm.group][comm.rank].append(comm)
        if not comm.peers and comm.group:
            streams[comm.what, comm.group][comm.rank].append(comm)
    found: list[Meeting] = []
    unmatched: list[str] = []
    for (what, group), of_rank in streams.items():
        message = what.startswith("messages ")
        rows = _matched(list(of_rank.values()))
        if rows is None:
            counts = ", ".join(f"{len(own)} on rank {rank}" for rank, own in of_rank.items())
            unmatched.append(f"{what}{f' ({group})' if group else ''}: {counts}")
        elif len(of_rank) > 1:
            found += [Meeting(row, message) for row in rows]
    if not unmatched:
        return found, []
    more = f" and {len(unmatched) - 3} more" if len(unmatched) > 3 else ""
    return found, [
        f"transfers not matched between ranks, so not split into wait and transfer: "
        f"{'; '.join(unmatched[:3])}{more}"
    ]


def _matched(lists: Sequence[Sequence[Comm]]) -> list[tuple[Comm, ...]] | None:
    if all(comm.sequence is not None for own in lists for comm in own):
        by_number = [{comm.sequence: comm for comm in own} for own in lists]
        if all(len(numbers) == len(own) for numbers, own in zip(by_number, lists, strict=True)):
            common = set.intersection(*(set(numbers) for numbers in by_number))
            ordered = sorted(number for number in common if number is not None)
            return [tuple(numbers[n] for numbers in by_number) for n in ordered]
    if len({len(own) for own in lists}) > 1:
        return None
    return list(zip(*lists, strict=True))


def named_collectives(table: SpanTable) -> list[Comm]:
    """Transfers of ours that say which collective they are: ``args["collective"]``."""
    if not table.source:
        return []
    found = []
    for row in np.flatnonzero(table.is_kind((Kind.TRANSFER,))).tolist():
        name = table.source[row].args.get("collective")
        if name is not None:
            found.append(Comm(row, int(table.lane[row]), (), str(name), "collective"))
    return found


def split(table: SpanTable, found: Sequence[Meeting]) -> SpanTable:
    """Each matched kernel as a wait for its last partner, and a transfer."""
    latest: dict[Comm, tuple[float, int, bool]] = {}
    for meeting in found:
        for comm in meeting.comms:
            began, last = max(
                (float(table.start_s[other.row]), other.rank)
                for other in meeting.comms
                if other is not comm
            )
            if began > latest.get(comm, (-np.inf, 0, False))[0]:
                latest[comm] = (began, last, meeting.message)
    if not latest:
        return table
    rows = np.array([comm.row for comm in latest])
    until = np.clip(
        np.array([began for began, _, _ in latest.values()]),
        table.start_s[rows],
        table.end_s[rows],
    )
    causes = _causes(latest)
    wait = table.where(np.isin(np.arange(len(table)), rows))
    order = np.argsort(rows)
    wait = replace(
        wait,
        end_s=until[order],
        kind=np.full(len(rows), KIND_CODE[Kind.WAIT], dtype=np.int8),
        cause=np.array(causes, dtype=np.int8)[order],
        rank=np.zeros(len(rows), dtype=np.int8),
    )
    start_s = table.start_s.copy()
    start_s[rows] = until
    return stacked([replace(table, start_s=start_s), wait.where(wait.end_s > wait.start_s)])


def _causes(latest: Mapping[Comm, tuple[float, int, bool]]) -> list[int]:
    ranks = sorted({comm.rank for comm in latest} | {last for _, last, _ in latest.values()})
    place = {rank: index for index, rank in enumerate(ranks)}
    causes = []
    for comm, (_, last, message) in latest.items():
        ahead = place[last] < place[comm.rank]
        # Interleaved stages: from the last rank back to the first, the direction is the same.
        if len(ranks) > 2 and abs(place[last] - place[comm.rank]) == len(ranks) - 1:
            ahead = not ahead
        pipe = Cause.UPSTREAM if ahead else Cause.DOWNSTREAM
        causes.append(CODE[pipe if message else Cause.STRAGGLER])
    return causes
