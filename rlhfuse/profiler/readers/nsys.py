"""Nsight Systems exports: ``nsys export --type=sqlite report.nsys-rep``.

Kernels and copies are read per device; NVTX ranges named like tasks, pushed on the host, are moved
to the kernels that were launched in them. Tables are created lazily and their columns vary with
the version, so what is not there is not asked for. Times are nanoseconds. (Nsight Systems, SQLite
Export Schema Reference.)
"""

import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from rlhfuse.profiler.arrays import Ints
from rlhfuse.profiler.readers.batches import Launches, Record
from rlhfuse.profiler.readers.kernels import RankKernels, load_kernels
from rlhfuse.profiler.trace import Trace, common_steps

_KERNELS = "CUPTI_ACTIVITY_KIND_KERNEL"
_COPIES = ("CUPTI_ACTIVITY_KIND_MEMCPY", "CUPTI_ACTIVITY_KIND_MEMSET")
_RUNTIME = "CUPTI_ACTIVITY_KIND_RUNTIME"
_NVTX = "NVTX_EVENTS"
_RANGES = (59, 60)  # eventType: push/pop range, start/end range
_COLLECTIVE = re.compile(r"(?i)(nccl|rccl)")
_CALL = re.compile(r"(?:.*:)?ncclSend|(?:.*:)?ncclRecv")
_STEP = re.compile(r"(?:.*\b)?(?:step|iteration)[ _:#-]*(\d+)", re.IGNORECASE)
_PROCESS = 0xFFFFFFFFFF000000  # a global thread id without its thread
_ROWS = 1 << 16


def open_nsys(paths: list[Path]) -> Trace:
    """All processes and devices of one or more exports; ranks in the order of files, processes
    and devices, or the number in a file's name where each file has one device.

    Raises:
        ValueError: not an export, or no device activity in it.
    """
    found: list[tuple[Path, RankKernels]] = []
    for path in paths:
        try:
            with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as base:
                found += [(path, rank) for rank in _read(path, base)]
        except (sqlite3.Error, UnicodeDecodeError, OverflowError) as error:
            raise ValueError(f"{path}: not a readable nsys export: {error}") from error
    numbers = [re.search(r"rank[-_]?(\d+)", path.name) for path, _ in found]
    named = [int(number[1]) for number in numbers if number is not None]
    ranks = named if len(set(named)) == len(found) else list(range(len(found)))
    by_rank = {rank: kernels for rank, (_, kernels) in zip(ranks, found, strict=True)}
    place = str(paths[0])
    steps, told = common_steps({r: kernels.steps for r, kernels in by_rank.items()}, place)
    warnings = [text for rank in by_rank.values() for text in rank.warnings] + told
    return Trace("nsys", steps, lambda step: load_kernels(by_rank, step, warnings, place))


def _read(path: Path, base: sqlite3.Connection) -> list[RankKernels]:
    tables = {str(name) for (name,) in base.execute("SELECT name FROM sqlite_master")}
    if _KERNELS not in tables:
        raise ValueError(f"{path}: no {_KERNELS} in it: nsys recorded no kernels (--trace=cuda)")
    strings = dict(base.execute("SELECT id, value FROM StringIds")) if "StringIds" in tables else {}
    (zero_ns,) = base.execute(f"SELECT MIN(start) FROM {_KERNELS}").fetchone()
    if not isinstance(zero_ns, int):
        raise ValueError(f"{path}: no kernels in {_KERNELS}")
    reader = _Reader(base, tables, {int(k): str(v) for k, v in strings.items()}, zero_ns)
    devices = reader.devices()
    return [reader.rank(process, device, len(devices)) for process, device in devices]


class _Reader:
    """Reads one export; `zero_ns` is its first kernel, near which times stay exact."""

    def __init__(
        self, base: sqlite3.Connection, tables: set[str], strings: dict[int, str], zero_ns: int
    ) -> None:
        self._base = base
        self._tables = tables
        self._strings = strings
        self._zero_ns = zero_ns

    def devices(self) -> list[tuple[int | None, int]]:
        """(process, device) pairs that ran kernels; no process where the version has none."""
        pid = "globalPid" if "globalPid" in self._columns(_KERNELS) else "NULL"
        rows = self._base.execute(
            f"SELECT DISTINCT {pid}, deviceId FROM {_KERNELS} ORDER BY 1, 2"
        ).fetchall()
        return [(None if pid is None else int(pid), int(device)) for pid, device in rows]

    def rank(self, process: int | None, device: int, num_devices: int) -> RankKernels:
        found = RankKernels()
        rows = [np.array(list(self._kernels(process, device)), dtype=np.int64).reshape(-1, 4)]
        names: dict[str, int] = {}
        kernel_names = [self._strings.get(row, f"kernel {row}") for row in rows[0][:, 2].tolist()]
        of_name = [names.setdefault(name, len(names)) for name in kernel_names]
        moves = [bool(_COLLECTIVE.match(name)) for name in kernel_names]
        for table in _COPIES:
            copies = np.array(list(self._copies(table, process, device)), dtype=np.int64)
            rows.append(copies.reshape(-1, 4))
            of_name += [names.setdefault(table[20:].lower(), len(names))] * len(rows[-1])
            moves += [True] * len(rows[-1])
        table_rows = np.concatenate(rows)
        found.comms = [
            (
                row,
                int(table_rows[row, 3]),
                "SendRecv" in name,
                Record(0.0, 0, "", None, "", None, ""),
            )
            for row, name in enumerate(kernel_names)
            if moves[row]
        ]
        start_s = self._seconds(table_rows[:, 0])
        found.set_kernels(
            start_s,
            self._seconds(table_rows[:, 1]) - start_s,
            np.array(moves, dtype=np.bool_),
            np.array(of_name, dtype=np.int64),
            names,
            table_rows[:, 3],
        )
        found.launches = self._launches(process)
        self._ranges(process, found)
        for _, _, send_recv, _ in found.comms:
            found.seen["SendRecv kernel" if send_recv else "collective kernel"] += 1
        if num_devices > 1 and process is None:
            found.warnings.append("this version of nsys names no processes: one rank per device")
        return found

    def _kernels(self, process: int | None, device: int) -> Iterator[Sequence[int]]:
        columns = self._columns(_KERNELS)
        name = next(x for x in ("shortName", "demangledName", "mangledName") if x in columns)
        yield from self._select(
            _KERNELS, ("start", "end", name, "correlationId"), process, f"deviceId = {device}"
        )

    def _copies(self, table: str, process: int | None, device: int) -> Iterator[Sequence[int]]:
        if table in self._tables:
            names = ("start", "end", "deviceId", "correlationId")
            yield from self._select(table, names, process, f"deviceId = {device}")

    def _launches(self, process: int | None) -> Launches:
        if _RUNTIME not in self._tables:
            return Launches()
        rows = list(self._select(_RUNTIME, ("correlationId", "start", "globalTid"), process, "1"))
        table = np.array(rows, dtype=np.int64).reshape(-1, 3)
        return Launches(table[:, 0], self._seconds(table[:, 1]), table[:, 2])

    def _ranges(self, process: int | None, found: RankKernels) -> None:
        """NVTX ranges: tasks, steps, and NCCL's own calls (whose peers it does not tell)."""
        if _NVTX not in self._tables:
            return
        columns = self._columns(_NVTX)
        text_id = "textId" if "textId" in columns else "NULL"
        thread = "globalTid" if "globalTid" in columns else "NULL"
        kinds = ", ".join(map(str, _RANGES))
        cursor = self._base.execute(
            f"SELECT start, end, text, {text_id}, {thread} FROM {_NVTX} "
            f'WHERE eventType IN ({kinds}) AND "end" IS NOT NULL ORDER BY start'
        )
        while rows := cursor.fetchmany(_ROWS):
            for start, end, text, number, tid in rows:
                if process is not None and tid is not None and tid & _PROCESS != process:
                    continue
                name = str(text if text is not None else self._strings.get(number, ""))
                start_s, end_s = ((x - self._zero_ns) / 1e9 for x in (start, end))
                step = _STEP.fullmatch(name)
                if step is not None:
                    found.steps[int(step[1])] = (start_s, end_s)
                elif _CALL.fullmatch(name):
                    found.seen[f"NVTX {name.rpartition(':')[2]}"] += 1
                else:
                    found.label(name, start_s, end_s - start_s, tid or 0, on_host=True)

    def _select(
        self, table: str, names: tuple[str, ...], process: int | None, where: str
    ) -> Iterator[Sequence[int]]:
        quoted = ", ".join(f'"{name}"' for name in names)
        if process is not None:
            columns = self._columns(table)
            if "globalPid" in columns:
                where += f" AND globalPid = {process}"
            elif "globalTid" in columns:
                # A signed mask: the thread takes the lowest 24 bits.
                where += f" AND (globalTid & ~{0xFFFFFF}) = {process}"
        for row in self._base.execute(f"SELECT {quoted} FROM {table} WHERE {where}"):
            yield [0 if value is None else int(value) for value in row]

    def _columns(self, table: str) -> set[str]:
        return {str(row[1]) for row in self._base.execute(f"PRAGMA table_info({table})")}

    def _seconds(self, nanoseconds: Ints) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
        found: np.ndarray[tuple[int], np.dtype[np.float64]] = (nanoseconds - self._zero_ns) / 1e9
        return found
