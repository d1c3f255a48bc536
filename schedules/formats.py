"""Schedules as files: the JSON contract, torch's CSV, FlexFusion's text.

Every mistake in a file is a `ValueError` of one line that names the place.
"""

import csv
import io
import re

import msgspec

from rlhfuse.schedules.checks import completion_times, peak_memory
from rlhfuse.schedules.ir import Op, Problem, Schedule, Task
from rlhfuse.schedules.problem_file import problem_from_tree, problem_to_tree

_TORCH_ACTION = re.compile(r"(\d+)([FBIW])(\d+)")
_TRACE_ENTRY = re.compile(r"\[([^\]]*)\]")


class TaskRecord(msgspec.Struct):
    """One task of a written schedule, in the problem's time unit."""

    pipeline: str
    op: str
    stage: int
    microbatch: int
    start: float
    end: float


class ScheduleRecord(msgspec.Struct):
    """The file that ``rlhfuse schedule -o`` writes; `problem` has the form of a problem file."""

    problem: dict[str, object]
    ranks: list[list[TaskRecord]]
    makespan: float
    peak_memory: float


def schedule_to_json(schedule: Schedule) -> bytes:
    """The schedule with its simulated times, as the JSON contract says."""
    ends = completion_times(schedule)
    rows = []
    for row in schedule.rows:
        records = []
        for task in row:
            pipe = schedule.problem.pipeline(task.pipeline)
            length = pipe.duration(task.op, task.pp_stage, task.microbatch)
            records.append(
                TaskRecord(
                    task.pipeline,
                    task.op.value,
                    task.pp_stage,
                    task.microbatch,
                    ends[task] - length,
                    ends[task],
                )
            )
        rows.append(records)
    record = ScheduleRecord(
        problem_to_tree(schedule.problem),
        rows,
        max(ends.values(), default=0.0),
        max(peak_memory(schedule), default=0.0),
    )
    return msgspec.json.encode(record)


def schedule_from_json(data: bytes | str) -> Schedule:
    """The schedule that `schedule_to_json` wrote, validated.

    Raises:
        ValueError: not such a file, or not a legal schedule.
    """
    try:
        record = msgspec.json.decode(data, type=ScheduleRecord)
    except msgspec.DecodeError as error:
        raise ValueError(f"not a schedule file: {error}") from error
    rows = tuple(
        tuple(Task(r.pipeline, _op(r.op), r.stage, r.microbatch) for r in row)
        for row in record.ranks
    )
    schedule = Schedule(problem_from_tree(record.problem), rows)
    schedule.validate()
    return schedule


def to_torch_csv(schedule: Schedule, pipeline: str | None = None) -> str:
    """One pipeline as torch.distributed.pipelining's ``compute_only`` CSV: one row per rank.

    Of several pipelines, `pipeline` says which: its order on each rank stays, what ran between its
    tasks is lost, since torch's format has one model.

    Raises:
        ValueError: several pipelines and none named, or no pipeline of that name.
    """
    names = [pipe.name for pipe in schedule.problem.pipelines]
    if pipeline is None and len(names) != 1:
        raise ValueError(f"torch's CSV holds one pipeline; name one of {', '.join(names)}")
    if pipeline is not None and pipeline not in names:
        raise ValueError(f"no pipeline is named {pipeline!r}; there are {', '.join(names)}")
    wanted = pipeline or names[0]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for row in schedule.rows:
        mine = (t for t in row if t.pipeline == wanted)
        writer.writerow([f"{t.pp_stage}{t.op.value}{t.microbatch}" for t in mine])
    return text.getvalue()


def from_torch_csv(text: str, problem: Problem) -> Schedule:
    """A ``compute_only`` CSV as a schedule of the one pipeline of `problem`, validated.

    Empty cells are idle steps and are left out.

    Raises:
        ValueError: a cell that is no compute action, or not a legal schedule.
    """
    if len(problem.pipelines) != 1:
        raise ValueError("torch's CSV holds one pipeline; give a problem with one")
    name = problem.pipelines[0].name
    rows = []
    for line, cells in enumerate(csv.reader(io.StringIO(text)), start=1):
        row = []
        for column, cell in enumerate(cells, start=1):
            if not cell.strip():
                continue
            match = _TORCH_ACTION.fullmatch(cell.strip())
            if match is None:
                raise ValueError(
                    f"line {line}, cell {column}: {cell!r} is no F, B, I or W action like 2F0"
                )
            row.append(Task(name, Op(match[2]), int(match[1]), int(match[3])))
        rows.append(tuple(row))
    schedule = Schedule(problem, tuple(rows))
    schedule.validate()
    return schedule


def to_flexfusion(schedule: Schedule) -> str:
    """FlexFusion's trace: a line per rank of ``[model, micro-batch, stage, start, end, memory]``.

    A stage of at least the number of stages means backward. Memory is what is held afterwards.

    Raises:
        ValueError: the schedule has split backwards, which the format cannot say.
    """
    ends = completion_times(schedule)
    index = {pipe.name: i for i, pipe in enumerate(schedule.problem.pipelines)}
    lines = []
    for row in schedule.rows:
        held, words = 0.0, []
        for task in row:
            pipe = schedule.problem.pipeline(task.pipeline)
            if task.op in (Op.I, Op.W):
                raise ValueError(f"{task}: FlexFusion's text knows F and B only")
            p = pipe.num_stages
            stage = task.pp_stage if task.op is Op.F else 2 * p - 1 - task.pp_stage
            held += sum(pipe.memory_change(task.op, task.pp_stage, task.microbatch))
            start = ends[task] - pipe.duration(task.op, task.pp_stage, task.microbatch)
            words.append(
                f"[{index[task.pipeline]}, {task.microbatch}, {stage}, {start:g}, "
                f"{ends[task]:g}, {held:.6g}], "
            )
        lines.append("".join(words) or " ")  # a blank line would end the trace
    return "\n".join(lines) + "\n"


def from_flexfusion(text: str, problem: Problem) -> Schedule:
    """A FlexFusion trace as a schedule of `problem`, validated.

    Model i is the i-th pipeline; where the rank has no stage of it (copies of the second model),
    it is the later pipeline that has. The text ends at the first blank line.

    Raises:
        ValueError: an entry that is none, or not a legal schedule.
    """
    rows = []
    for rank, line in enumerate(text.split("\n\n")[0].strip("\n").split("\n")):
        row = []
        for entry in _TRACE_ENTRY.findall(line):
            fields = [field.strip() for field in entry.split(",")]
            if len(fields) < 3 or not all(re.fullmatch(r"\d+", f) for f in fields[:3]):
                raise ValueError(f"line {rank + 1}: [{entry}] is no trace entry")
            model, mb, stage = (int(field) for field in fields[:3])
            here = [p for p in problem.pipelines[model:] if rank in p.stages]
            if not here:
                raise ValueError(f"line {rank + 1}: model {model} has no stage on rank {rank}")
            pipe, p = here[0], here[0].num_stages
            op, at = (Op.F, stage) if stage < p else (Op.B, 2 * p - 1 - stage)
            row.append(Task(pipe.name, op, at, mb))
        rows.append(tuple(row))
    schedule = Schedule(problem, tuple(rows))
    schedule.validate()
    return schedule


def _op(letter: str) -> Op:
    if letter not in Op.__members__:
        raise ValueError(f"op is {letter!r}, expected one of F, B, I, W")
    return Op(letter)
