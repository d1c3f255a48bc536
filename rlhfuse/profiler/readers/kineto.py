"""PyTorch profiler traces (Kineto JSON), one file per rank, of any size.

Kernels say what a device did, not for whom. Pipeline work is recognised by labels (ranges named
like tasks, ``PP:0F1``, ``actor:2F0``, as `rlhfuse.profiler.record` and PyTorch's pipelining write
them) or by messages whose peers are known. SendRecv kernels alone prove nothing: all-to-all uses
them too.
"""

import re
from array import array
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np

from rlhfuse.profiler.readers.batches import Launches, Record
from rlhfuse.profiler.readers.kernels import RankKernels, load_kernels
from rlhfuse.profiler.readers.stream import OnProgress, TraceStream
from rlhfuse.profiler.trace import Trace, common_steps

_DEVICE = frozenset({"kernel", "Kernel", "gpu_memcpy", "gpu_memset", "Memcpy", "Memset"})
_RUNTIME = frozenset({"cuda_runtime", "cuda_driver", "Runtime"})
_COLLECTIVE = re.compile(r"(?i)(nccl|rccl|msccl|hccl|oneccl)")
_STEP = re.compile(r"ProfilerStep#(\d+)")
_P2P = re.compile(r"nccl:(send|recv) (\d+)(->|<-)(\d+)")
_RANK_IN_NAME = re.compile(r"rank[-_]?(\d+)", re.IGNORECASE)
_DISTRIBUTED = re.compile(rb'"distributedInfo"\s*:\s*\{')
_COMPUTE, _TRANSFER = 0, 1


class _Args(msgspec.Struct, gc=False):
    correlation: object = None
    collective: object = msgspec.field(default=None, name="Collective name")
    group: object = msgspec.field(default=None, name="Process Group Name")
    group_of: object = msgspec.field(default=None, name="Process Group Description")
    ranks: object = msgspec.field(default=None, name="Process Group Ranks")
    source: object = msgspec.field(default=None, name="Src Rank")
    target: object = msgspec.field(default=None, name="Dst Rank")
    sequence: object = msgspec.field(default=None, name="Seq")


class _Event(msgspec.Struct, gc=False):
    ph: str = ""
    cat: str = ""
    name: str = ""
    ts: int | float = 0
    dur: float = 0.0
    tid: object = 0
    args: _Args | None = None


_NO_ARGS = _Args()


@dataclass(slots=True)
class _File:
    """What one file says, while it is read; microseconds after `zero_us`.

    Absolute times need 51 bits already: what is kept must be taken from a nearer zero.
    """

    zero_us: float | None

    starts: "array[float]" = field(default_factory=lambda: array("d"))
    lengths: "array[float]" = field(default_factory=lambda: array("d"))
    kinds: "array[int]" = field(default_factory=lambda: array("b"))
    name_of: "array[int]" = field(default_factory=lambda: array("i"))
    correlations: "array[int]" = field(default_factory=lambda: array("q"))
    names: dict[str, int] = field(default_factory=dict)
    moves: dict[str, int] = field(default_factory=dict)  # kernel name -> computes or moves bytes
    launch_of: "array[int]" = field(default_factory=lambda: array("q"))
    launch_ts: "array[float]" = field(default_factory=lambda: array("d"))
    launch_tid: "array[int]" = field(default_factory=lambda: array("q"))
    threads: dict[str, int] = field(default_factory=dict)
    found: RankKernels = field(default_factory=RankKernels)

    def take(self, event: _Event) -> None:
        if self.zero_us is None:
            self.zero_us = event.ts
        event.ts -= self.zero_us
        category = event.cat
        if category in _DEVICE:
            self._take_kernel(event, category)
        elif category in _RUNTIME:
            correlation = _correlation(event)
            if correlation >= 0:
                self.launch_of.append(correlation)
                self.launch_ts.append(event.ts)
                self.launch_tid.append(self._thread(event))
        elif category == "cpu_op":
            if event.name == "record_param_comms":
                self._take_record(event)
            elif event.name.startswith("autograd::engine::"):
                self.found.backward_threads.add(self._thread(event))
        elif category in ("user_annotation", "gpu_user_annotation"):
            self._take_annotation(event)

    def _take_kernel(self, event: _Event, category: str) -> None:
        name = event.name
        moves = self.moves.get(name)
        if moves is None:
            bytes_only = category.lower() != "kernel" or _COLLECTIVE.match(name)
            self.moves[name] = moves = _TRANSFER if bytes_only else _COMPUTE
        self.starts.append(event.ts)
        self.lengths.append(event.dur)
        self.kinds.append(moves)
        self.name_of.append(self.names.setdefault(name, len(self.names)))
        self.correlations.append(_correlation(event))
        if moves and category.lower() == "kernel":
            self._take_comm(event, len(self.starts) - 1)

    def _take_comm(self, event: _Event, row: int) -> None:
        record = _record(event, self._thread(event))
        known = record.what or "unnamed"
        # RCCL has kernels for whatever there is to do; only the call behind one says what it was.
        generic = "Generic" in event.name and record.what in ("", "send", "recv")
        messages = generic or "SendRecv" in event.name
        if messages:
            self.found.seen[f"{'generic' if generic else 'SendRecv'} kernel, {known}"] += 1
        self.found.comms.append((row, _correlation(event), messages, record))

    def _take_record(self, event: _Event) -> None:
        record = _record(event, self._thread(event))
        if record.what:
            self.found.records.append(record)

    def _take_annotation(self, event: _Event) -> None:
        on_host = event.cat == "user_annotation"
        step = _STEP.fullmatch(event.name)
        if step is not None:
            if on_host:
                self.found.steps[int(step[1])] = (event.ts / 1e6, (event.ts + event.dur) / 1e6)
        elif event.name.startswith("nccl:"):
            self.found.seen[event.name.split(" ")[0]] += 1
            message = _P2P.match(event.name)
            if message is not None and on_host:
                peer = int(message[4])
                self.found.own_numbers.add(int(message[2]))
                start_s = event.ts / 1e6
                self.found.notes.append(
                    Record(start_s, self._thread(event), message[1], peer, "", None, "")
                )
        else:
            self.found.label(
                event.name, event.ts / 1e6, event.dur / 1e6, self._thread(event), on_host
            )

    def _thread(self, event: _Event) -> int:
        return self.threads.setdefault(str(event.tid), len(self.threads))

    def finished(self) -> RankKernels:
        found = self.found
        kinds = np.frombuffer(self.kinds, dtype=np.int8) if self.kinds else np.empty(0, np.int8)
        starts = np.array(self.starts, dtype=np.float64) / 1e6
        lengths = np.array(self.lengths, dtype=np.float64) / 1e6
        found.set_kernels(
            starts,
            lengths,
            kinds == _TRANSFER,
            np.array(self.name_of, dtype=np.int64),
            self.names,
            np.array(self.correlations, dtype=np.int64),
        )
        found.launches = Launches(
            np.array(self.launch_of, dtype=np.int64),
            np.array(self.launch_ts, dtype=np.float64) / 1e6,
            np.array(self.launch_tid, dtype=np.int64),
        )
        return found


def _correlation(event: _Event) -> int:
    """The number that ties a kernel to its launch; -1 without one."""
    found = event.args.correlation if event.args is not None else None
    return found if isinstance(found, int) and 0 <= found < 2**62 else -1


def _record(event: _Event, thread: int) -> Record:
    args = event.args or _NO_ARGS
    what = args.collective if isinstance(args.collective, str) else ""
    peer = args.source if what == "recv" else args.target if what == "send" else None
    group = args.group if isinstance(args.group, str) else ""
    ranks = args.ranks if isinstance(args.ranks, str) else ""
    return Record(
        event.ts / 1e6,
        thread,
        what,
        peer if isinstance(peer, int) and 0 <= peer < 2**31 else None,
        f"{group} {ranks}".strip(),
        args.sequence if isinstance(args.sequence, int) else None,
        args.group_of if isinstance(args.group_of, str) else "",
    )


def open_kineto(paths: list[Path], on_progress: OnProgress | None = None) -> Trace:
    """All ranks of one job.

    Raises:
        ValueError: no device activity, a rank given twice, or ranks of different jobs.
    """
    ranks: dict[int, RankKernels] = {}
    worlds: set[int] = set()
    warnings: list[str] = []
    zero_us: float | None = None
    for position, path in enumerate(paths):
        rank, world, found, zero_us = _read(path, position, len(paths), zero_us, on_progress)
        if rank in ranks:
            raise ValueError(f"{path}: rank {rank} is given twice")
        ranks[rank] = found
        worlds |= {world} if world is not None else set()
        warnings += found.warnings
    if len(worlds) > 1:
        raise ValueError(
            f"{paths[0].parent}: ranks of different jobs (world sizes {sorted(worlds)})"
        )
    world = next(iter(worlds), len(ranks))
    if world > len(ranks):
        warnings.insert(0, f"{len(ranks)} of the job's {world} ranks are here; sums are over these")
    place = str(paths[0])
    steps, told = common_steps({r: found.steps for r, found in ranks.items()}, place)
    warnings += told
    return Trace("kineto", steps, lambda step: load_kernels(ranks, step, warnings, place))


def _read(
    path: Path, position: int, count: int, zero_us: float | None, on_progress: OnProgress | None
) -> tuple[int, int | None, RankKernels, float | None]:
    def share(done: float) -> None:
        if on_progress is not None:
            on_progress((position + done) / count)

    stream = TraceStream(path, share)
    file = _File(zero_us)
    take = file.take
    for event in stream.events(_Event):
        if event.ph == "X":
            take(event)
    found = file.finished()
    around = stream.head + stream.tail
    named = _RANK_IN_NAME.search(path.name)
    told = _number(around, b"rank")
    rank = told if told is not None else int(named[1]) if named else position
    if told is None:
        source = "its name" if named else "the order of files"
        found.warnings.append(f"{path.name}: no distributedInfo; rank {rank} from {source}")
    if stream.broken:
        found.warnings.append(f"{path.name}: {stream.broken}; what could be read is used")
    return rank, _number(around, b"world_size"), found, file.zero_us


def _number(text: bytes, key: bytes) -> int | None:
    place = _DISTRIBUTED.search(text)
    if place is None:
        return None
    match = re.compile(rb'"' + key + rb'"\s*:\s*(\d{1,9})\b').search(text, place.end())
    return int(match[1]) if match else None
