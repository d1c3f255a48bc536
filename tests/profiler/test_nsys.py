"""nsys exports: a database of the documented schema gives the tasks and gaps that were put in."""

import sqlite3
from pathlib import Path

import pytest

from rlhfuse.profiler.explain import explain
from rlhfuse.profiler.readers.detect import open_trace
from rlhfuse.schedules.ir import Pipeline, Problem
from rlhfuse.schedules.standard import one_f_one_b
from rlhfuse.schedules.timing import makespan, simulate

# As `nsys export` creates them (documented columns that matter here, and some that do not).
SCHEMA = """
CREATE TABLE StringIds (id INTEGER NOT NULL PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (start INTEGER NOT NULL, end INTEGER NOT NULL,
  deviceId INTEGER NOT NULL, contextId INTEGER NOT NULL, streamId INTEGER NOT NULL,
  correlationId INTEGER, globalPid INTEGER, demangledName INTEGER NOT NULL,
  shortName INTEGER NOT NULL, gridX INTEGER NOT NULL);
CREATE TABLE CUPTI_ACTIVITY_KIND_MEMCPY (start INTEGER NOT NULL, end INTEGER NOT NULL,
  deviceId INTEGER NOT NULL, correlationId INTEGER, globalPid INTEGER, bytes INTEGER NOT NULL);
CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME (start INTEGER NOT NULL, end INTEGER NOT NULL,
  eventClass INTEGER NOT NULL, globalTid INTEGER, correlationId INTEGER,
  nameId INTEGER NOT NULL, returnValue INTEGER NOT NULL);
CREATE TABLE NVTX_EVENTS (start INTEGER NOT NULL, end INTEGER, eventType INTEGER NOT NULL,
  text TEXT, globalTid INTEGER, textId INTEGER, domainId INTEGER);
"""
SCHEDULE = one_f_one_b(Problem(4, (Pipeline.make("model", [0, 1, 2, 3], 6, 0.01, 0.02),)))


def _export(path: Path, *, labels: bool = True, base_ns: int = 1_700_000_000_000_000_000) -> None:
    """Four processes of one node; every task is one kernel, launched from its NVTX range."""
    with sqlite3.connect(path) as base:
        base.executescript(SCHEMA)
        base.execute("INSERT INTO StringIds VALUES (1, 'gemm'), (2, 'cudaLaunchKernel'), (3, '?')")
        for number, span in enumerate(simulate(SCHEDULE).spans):
            rank = int(span.lane.removeprefix("rank"))
            pid = (1 << 56) + ((4000 + rank) << 24)
            start, end = (base_ns + round(x * 1e9) for x in (span.start_s, span.end_s))
            # The host runs far ahead of the device: only correlation ties the two together.
            push = base_ns - 10**9 + number * 1000
            kernel = (start, end, rank, 1, 7, number, pid, 1, 1, 64)
            base.execute(f"INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL VALUES {kernel}")
            launch = (push + 10, push + 20, 0, pid + 1, number, 2, 0)
            base.execute(f"INSERT INTO CUPTI_ACTIVITY_KIND_RUNTIME VALUES {launch}")
            if labels:
                values = (push, push + 500, 59, span.name, pid + 1, None, 0)
                base.execute("INSERT INTO NVTX_EVENTS VALUES (?, ?, ?, ?, ?, ?, ?)", values)


def test_an_export_gives_the_schedule_that_ran(tmp_path: Path) -> None:
    _export(tmp_path / "report.sqlite")
    trace = open_trace([tmp_path])
    assert trace.format == "nsys"
    table, summary = explain(trace, trace.pick(None), critic_scale=None)
    assert table.lanes == ("rank0", "rank1", "rank2", "rank3")
    assert summary.wall_s == pytest.approx(makespan(SCHEDULE), abs=1e-8)
    assert summary.bubble_fraction == pytest.approx(3 / 9)
    assert summary.schedule is not None
    assert summary.schedule.name == "1F1B"


def test_without_labels_no_bubble_is_claimed(tmp_path: Path) -> None:
    _export(tmp_path / "report.sqlite", labels=False)
    _, summary = explain(open_trace([tmp_path]), None)
    assert summary.bubble_fraction is None
    assert summary.causes["compute"] == pytest.approx(4 * 6 * 0.03)


def test_what_is_no_export_is_told(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "x.sqlite") as base:
        base.execute("CREATE TABLE cats (name TEXT)")
    with pytest.raises(ValueError, match="nsys recorded no kernels"):
        open_trace([tmp_path / "x.sqlite"])
    _export(tmp_path / "y.sqlite")
    data = (tmp_path / "y.sqlite").read_bytes()
    (tmp_path / "y.sqlite").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="not a readable nsys export"):
        open_trace([tmp_path / "y.sqlite"])
