"""Kernels, launches and labels of a job's ranks as one timeline; shared by Kineto and nsys.

What a kernel was for is told, in this order, by: a label around it on the device; a label around
its launch on the host; its own message arguments; the send and receive calls that one launch
submitted together (PyTorch's batched P2P, whose kernels carry no arguments of their own).
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from rlhfuse.profiler.arrays import Bools, Floats, Ints
from rlhfuse.profiler.causes import CAUSE_OF_KIND, CODE, Cause
from rlhfuse.profiler.clocks import align_meetings
from rlhfuse.profiler.readers.batches import Batches, Launches, Record
from rlhfuse.profiler.readers.structure import Traffic, find_tasks, windows
from rlhfuse.profiler.table import KIND_CODE, SpanTable, stacked
from rlhfuse.profiler.trace import Loaded
from rlhfuse.profiler.transfers import Comm, meetings, split
from rlhfuse.timeline import Kind

_TASK = re.compile(r"(?:PP:)?(?:(?P<pipe>[A-Za-z_]\w*):)?(?P<stage>\d+)(?P<op>[FBIW])(?P<mb>\d+)")
_SYNCING = re.compile(r"(?i)all_?reduce|reduce_?scatter|all_?gather")
_DATA_PARALLEL = re.compile(r"(?i)data|\bdp\b|fsdp|ddp|default_pg|undefined|^$")
_NOT_DATA_PARALLEL = re.compile(r"(?i)tensor|\btp\b|context|expert|pipeline|embd")
_LARGEST_S = 1e12


@dataclass(frozen=True, slots=True)
class Label:
    """A range that names what ran in it; seconds."""

    kind: Kind
    name: str
    start_s: float
    end_s: float
    thread: int


@dataclass(slots=True)
class RankKernels:
    """One rank's device activity and what is said about it; seconds of its own clock."""

    start_s: Floats = field(default_factory=lambda: np.empty(0))
    end_s: Floats = field(default_factory=lambda: np.empty(0))
    moves: Bools = field(default_factory=lambda: np.empty(0, dtype=np.bool_))  # bytes, not computes
    name: Ints = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    names: tuple[str, ...] = ()
    correlation: Ints = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    comms: list[tuple[int, int, bool, Record]] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    notes: list[Record] = field(default_factory=list)
    launches: Launches = field(default_factory=Launches)
    steps: dict[int, tuple[float, float]] = field(default_factory=dict)
    host_labels: list[Label] = field(default_factory=list)
    device_labels: list[Label] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)
    own_numbers: set[int] = field(default_factory=set)  # the rank's, in the names of its messages
    backward_threads: set[int] = field(default_factory=set)  # that autograd runs on
    warnings: list[str] = field(default_factory=list)

    def set_kernels(
        self,
        start_s: Floats,
        length_s: Floats,
        moves: Bools,
        name: Ints,
        names: Iterable[str],
        correlation: Ints,
    ) -> None:
        """Kernels in any order; those whose times make no sense are left out."""
        with np.errstate(invalid="ignore"):
            good = (np.abs(start_s) < _LARGEST_S) & (length_s >= 0) & (length_s < _LARGEST_S)
        self.start_s, self.end_s = start_s[good], (start_s + length_s)[good]
        self.moves, self.name, self.names = moves[good], name[good], tuple(names)
        self.correlation = correlation[good]
        if not good.all():
            self.warnings.append(f"{int((~good).sum())} kernels with impossible times left out")
            place = np.cumsum(good) - 1
            self.comms = [(int(place[r]), c, p, x) for r, c, p, x in self.comms if good[r]]

    def label(self, name: str, start_s: float, length_s: float, thread: int, on_host: bool) -> None:
        """Keep a range if its name says what ran: a task, or an optimizer step."""
        if not (abs(start_s) < _LARGEST_S and 0 <= length_s < _LARGEST_S):
            return
        task = _TASK.fullmatch(name)
        if task is not None:
            kind = Kind(task["op"])
            name = f"{task['pipe'] or 'model'}:{task['stage']}{task['op']}{task['mb']}"
        elif name.startswith("Optimizer.step"):
            kind = Kind.OPTIMIZER
        else:
            return
        found = Label(kind, name, start_s, start_s + length_s, thread)
        (self.host_labels if on_host else self.device_labels).append(found)


def load_kernels(
    ranks: Mapping[int, RankKernels], step: int | None, warnings: Iterable[str], place: str
) -> Loaded:
    """One step, or everything, of all ranks, on a clock that starts at the first event.

    Raises:
        ValueError: nothing happened on any device.
    """
    on_host = not any(len(rank.start_s) for rank in ranks.values())
    if on_host and not any(rank.host_labels for rank in ranks.values()):
        raise ValueError(f"{place}: no kernels: the profiler recorded no device activity")
    windows = {
        r: rank.steps[step] if step is not None else (-np.inf, np.inf) for r, rank in ranks.items()
    }
    lanes = tuple(f"rank{r}" for r in sorted(ranks))
    rows_of = {r: _rows_within(rank, windows[r]) for r, rank in ranks.items()}
    known_of = {r: _comms(rank, r, rows_of[r]) for r, rank in ranks.items()}
    comms_of = {r: found for r, (found, _) in known_of.items()}
    unknown = sum(missed for _, missed in known_of.values())
    labels_of = {
        r: [
            label
            for label in (rank.host_labels if on_host else _labels(rank))
            if windows[r][0] <= label.start_s < windows[r][1]
        ]
        for r, rank in ranks.items()
    }
    labelled, told = any(_names_tasks(labels) for labels in labels_of.values()), ""
    if not (labelled or on_host or unknown):
        labels_of, told = _from_structure(ranks, rows_of, comms_of, labels_of)
        labelled = any(_names_tasks(labels) for labels in labels_of.values())
    tables, comms, rows = [], list[Comm](), 0
    for lane, r in enumerate(sorted(ranks)):
        table = _table(ranks[r], rows_of[r], labels_of[r], lanes, lane, on_host)
        tables.append(table)
        comms += [replace(comm, row=comm.row + rows) for comm in comms_of[r]]
        rows += len(table)
    whole = stacked(tables)
    if not len(whole):
        raise ValueError(f"{place}: step {step}: no device activity in it")
    starts = [windows[r][0] for r in ranks] if step is not None else [whole.begin_s]
    whole = whole.moved(np.full((len(whole), 2), -min(starts)))
    pairs, notes = meetings(comms)
    whole, moved = align_meetings(whole, pairs)
    whole = split(whole, pairs)
    known = any(pair.message for pair in pairs) and not unknown
    notes = [*warnings, *moved, *notes, *([told] if told else [])]
    if not (labelled or known):
        notes.append(_no_pipeline(ranks.values(), unknown))
    return Loaded(whole, pipelines=labelled or known, warnings=tuple(notes))


def _rows_within(rank: RankKernels, window: tuple[float, float]) -> Ints:
    return np.flatnonzero((rank.start_s >= window[0]) & (rank.start_s < window[1]))


def _names_tasks(labels: Iterable[Label]) -> bool:
    return any(label.kind is not Kind.OPTIMIZER for label in labels)


def _from_structure(
    ranks: Mapping[int, RankKernels],
    rows_of: Mapping[int, Ints],
    comms_of: Mapping[int, list[Comm]],
    labels_of: Mapping[int, list[Label]],
) -> tuple[dict[int, list[Label]], str]:
    """Labels for tasks that kernels and messages tell, beside those there are; and what to say."""
    if not any(comm.peers for comms in comms_of.values() for comm in comms):
        return dict(labels_of), ""
    traffic = {r: _traffic(rank, rows_of[r], comms_of[r]) for r, rank in ranks.items()}
    labels = {r: list(mine) for r, mine in labels_of.items()}
    try:
        cuts = {r: [x.end_s for x in mine] for r, mine in labels.items()}
        for window in windows(cuts):
            parts = {r: mine.within(*window[r]) for r, mine in traffic.items()}
            if not any(len(part.peer) for part in parts.values()):
                continue
            for r, found in find_tasks(parts).items():
                labels[r] += [Label(x.kind, str(x), x.start_s, x.end_s, -1) for x in found]
    except ValueError as error:
        return dict(labels_of), f"the schedule is not told by messages and kernels: {error}"
    return labels, (
        "no labels: forward and backward passes were told by the kernels' launching threads and "
        "the messages between them, and explain every message"
    )


def _traffic(rank: RankKernels, kept: Ints, comms: Sequence[Comm]) -> Traffic:
    """The rank's chosen kernels that compute, and its messages."""
    _, threads = rank.launches.of(rank.correlation[kept])
    computes = ~rank.moves[kept] & (threads >= 0)
    order = np.argsort(rank.start_s[kept], kind="stable")
    order = order[computes[order]]
    said = [
        (peer, sends, rank.start_s[kept[comm.row]], rank.end_s[kept[comm.row]])
        for comm in comms
        for peer, sends in comm.peers
    ]
    peer, sends, first_s, last_s = np.array(said, dtype=np.float64).reshape(-1, 4).T
    return Traffic(
        rank.start_s[kept][order],
        rank.end_s[kept][order],
        np.isin(threads, list(rank.backward_threads))[order],
        peer.astype(np.int64),
        sends > 0,
        first_s,
        last_s,
    )


def _labels(rank: RankKernels) -> list[Label]:
    """Labels on the device, or those of the host moved to the kernels launched in them."""
    if rank.device_labels or not rank.host_labels:
        return rank.device_labels
    launched, thread = rank.launches.of(rank.correlation)
    found = []
    for label in rank.host_labels:
        inside = (thread == label.thread) & (launched >= label.start_s) & (launched < label.end_s)
        if inside.any():
            start_s, end_s = float(rank.start_s[inside].min()), float(rank.end_s[inside].max())
            found.append(replace(label, start_s=start_s, end_s=end_s))
    return found


def _table(
    rank: RankKernels,
    kept: Ints,
    labels: list[Label],
    lanes: tuple[str, ...],
    lane: int,
    on_host: bool,
) -> SpanTable:
    """The rank's rows: first its chosen kernels, then its labels."""
    kinds = np.where(rank.moves[kept], KIND_CODE[Kind.TRANSFER], KIND_CODE[Kind.COMPUTE])
    table = SpanTable.build(
        lanes,
        rank.names,
        np.full(len(kept), lane),
        rank.start_s[kept],
        rank.end_s[kept],
        kinds.astype(np.int8),
        rank.name[kept],
    )
    _mark_syncs(table, rank, kept)
    if not labels:
        return table
    marked = _label_table(labels, lanes, lane)
    if not on_host:
        # What computes inside a label is its work; the rest of the label is a gap in it.
        _mark(table, labels)
        count = len(marked)
        marked = replace(
            marked,
            cause=np.full(count, CODE[Cause.HOST_GAP], dtype=np.int8),
            rank=np.zeros(count, dtype=np.int8),
        )
    return stacked([table, marked])


def _mark_syncs(table: SpanTable, rank: RankKernels, kept: Ints) -> None:
    """Give collectives of data-parallel ranks their cause."""
    rows = np.array([row for row, _, _, record in rank.comms if _syncs(record)], dtype=np.int64)
    table.cause[np.isin(kept, rows)] = CODE[Cause.DP_SYNC]


def _label_table(labels: list[Label], lanes: tuple[str, ...], lane: int) -> SpanTable:
    names: dict[str, int] = {}
    return SpanTable.build(
        lanes,
        tuple(dict.fromkeys(label.name for label in labels)),
        np.full(len(labels), lane),
        np.array([label.start_s for label in labels]),
        np.array([label.end_s for label in labels]),
        np.array([KIND_CODE[label.kind] for label in labels], dtype=np.int8),
        np.array([names.setdefault(label.name, len(names)) for label in labels]),
    )


def _mark(table: SpanTable, labels: list[Label]) -> None:
    """Give computing kernels the cause of the label they begin in."""
    computes = table.kind == KIND_CODE[Kind.COMPUTE]
    order = np.argsort(table.start_s, kind="stable")
    starts = table.start_s[order]
    for label in labels:
        first, last = np.searchsorted(starts, [label.start_s, label.end_s])
        rows = order[first:last]
        table.cause[rows[computes[rows]]] = CODE[CAUSE_OF_KIND[label.kind]]


def _comms(rank: RankKernels, number: int, kept: Ints) -> tuple[list[Comm], int]:
    """Communication kernels whose partners are known, and how many SendRecv ones are not; rows
    are those of the chosen kernels."""
    place = {row: index for index, row in enumerate(kept.tolist())}
    # Names of messages number ranks within their group; they tell who is meant where that is the
    # number in the job as well.
    notes = rank.notes if rank.own_numbers <= {number} else []
    calls = [call for call in rank.records if call.peer is not None] or notes
    batches = Batches(calls, rank.launches, [c for _, c, _, _ in rank.comms])
    found, unknown = [], 0
    for row, correlation, send_recv, record in rank.comms:
        if row not in place:
            continue
        if not send_recv:
            if record.group and record.what:
                comm = Comm(place[row], number, (), record.group, record.what, record.sequence)
                found.append(comm)
            continue
        peers: tuple[tuple[int, bool], ...]
        peers = ((record.peer, record.what == "send"),) if record.peer is not None else ()
        sequence = record.sequence if peers else None
        peers = peers or batches.peers(correlation)
        if peers:
            found.append(Comm(place[row], number, peers, "", "", sequence))
        else:
            unknown += 1
    return found, unknown


def _no_pipeline(ranks: Iterable[RankKernels], unknown: int) -> str:
    seen: Counter[str] = sum((rank.seen for rank in ranks), Counter())
    traffic = ", ".join(f"{count} {name}" for name, count in sorted(seen.items()))
    text = "no pipeline work is labelled, so no bubble fraction is given, only busy and idle time"
    if unknown:
        text += (
            f"; {unknown} SendRecv kernels carry no peers (rlhfuse.profiler.record labels a run)"
        )
    return f"{text} (seen: {traffic})" if traffic else text


def _syncs(record: Record) -> bool:
    """Whether a collective is one of data-parallel ranks, by its kind and its group."""
    return (
        bool(_SYNCING.search(record.what))
        and bool(_DATA_PARALLEL.search(record.purpose))
        and not _NOT_DATA_PARALLEL.search(record.purpose)
    )
