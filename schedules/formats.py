"""Schedules and problems as files: the JSON contract, torch's CSV, FlexFusion's text.

Every mistake in a file is a `ValueError` of one line that names the place.
"""

import csv
import difflib
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from rlhfuse.config_file import read_yaml
from rlhfuse.schedules.checks import completion_times, peak_memory
from rlhfuse.schedules.ir import Op, Pipeline, Problem, Schedule, Task

_PROBLEM_KEYS = ("ranks", "memory_cap", "pipelines", "link_latency")
_NUMBERS = ("forward", "backward", "weight", "activation", "activation_after_input")
_PIPELINE_KEYS = (
    *("name", "stages", "microbatches", *_NUMBERS),
    *("microbatch_weights", "release", "deadline", "interleaved"),
)
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


def read_problem(path: str | Path) -> Problem:
    """The problem in a YAML or JSON file.

    Raises:
        ValueError: the file is not a problem; place, value and what is expected.
    """
    try:
        return problem_from_tree(read_yaml(path))
    except ValueError as error:
        text = str(error)
        raise ValueError(text if str(path) in text else f"{path}: {text}") from error


def problem_from_tree(tree: Mapping[str, object]) -> Problem:
    """A problem from the nested lists and mappings of a problem file.

    Raises:
        ValueError: as `read_problem`.
    """
    _check_keys("problem", tree, _PROBLEM_KEYS, ("ranks", "pipelines"))
    pipelines = tree["pipelines"]
    if not isinstance(pipelines, list):
        raise ValueError(f"pipelines is {pipelines!r}, expected a list of pipelines")
    cap = tree.get("memory_cap")
    return Problem(
        _whole("ranks", tree["ranks"]),
        tuple(_pipeline(f"pipelines[{i}]", value) for i, value in enumerate(pipelines)),
        None if cap is None else _number("memory_cap", cap),
        _links(tree.get("link_latency", 0.0)),
    )


def problem_to_tree(problem: Problem) -> dict[str, object]:
    """What `problem_from_tree` reads back as the same problem."""
    tree: dict[str, object] = {"ranks": problem.num_ranks}
    if problem.memory_cap is not None:
        tree["memory_cap"] = problem.memory_cap
    if isinstance(problem.link_latency, Mapping):
        tree["link_latency"] = [[a, b, s] for (a, b), s in problem.link_latency.items()]
    else:
        tree["link_latency"] = problem.link_latency
    tree["pipelines"] = [_pipeline_tree(pipe) for pipe in problem.pipelines]
    return tree


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


def to_torch_csv(schedule: Schedule) -> str:
    """One pipeline as torch.distributed.pipelining's ``compute_only`` CSV: one row per rank.

    Raises:
        ValueError: several pipelines: torch's format has no name for them.
    """
    if len(schedule.problem.pipelines) != 1:
        raise ValueError("torch's CSV holds one pipeline; write one file per pipeline")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for row in schedule.rows:
        writer.writerow([f"{t.pp_stage}{t.op.value}{t.microbatch}" for t in row])
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
        lines.append("".join(words))
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


def _pipeline(place: str, value: object) -> Pipeline:
    if not isinstance(value, Mapping):
        raise ValueError(f"{place} is {value!r}, expected name, stages, microbatches, ...")
    _check_keys(place, value, _PIPELINE_KEYS, ("name", "stages", "microbatches", "forward"))
    name = value["name"]
    if not isinstance(name, str):
        raise ValueError(f"{place}.name is {name!r}, expected a word")
    stages = value["stages"]
    if not isinstance(stages, list):
        raise ValueError(f"{place}.stages is {stages!r}, expected the rank of each stage")
    weights, deadline = value.get("microbatch_weights"), value.get("deadline")
    after = value.get("activation_after_input")
    interleaved = value.get("interleaved", False)
    if not isinstance(interleaved, bool):
        raise ValueError(f"{place}.interleaved is {interleaved!r}, expected true or false")
    return Pipeline.make(
        name,
        [_whole(f"{place}.stages[{i}]", rank) for i, rank in enumerate(stages)],
        _whole(f"{place}.microbatches", value["microbatches"]),
        _numbers(f"{place}.forward", value["forward"]),
        _numbers(f"{place}.backward", value.get("backward", 0.0)),
        weight=_numbers(f"{place}.weight", value.get("weight", 0.0)),
        activation=_numbers(f"{place}.activation", value.get("activation", 1.0)),
        activation_after_input=None
        if after is None
        else _numbers(f"{place}.activation_after_input", after),
        microbatch_weights=None
        if weights is None
        else _list(f"{place}.microbatch_weights", weights),
        release=_number(f"{place}.release", value.get("release", 0.0)),
        deadline=None if deadline is None else _number(f"{place}.deadline", deadline),
        interleaved=interleaved,
    )


def _pipeline_tree(pipe: Pipeline) -> dict[str, object]:
    tree: dict[str, object] = {
        "name": pipe.name,
        "stages": list(pipe.stages),
        "microbatches": pipe.num_microbatches,
    }
    for key in _NUMBERS:
        values: tuple[float, ...] = getattr(pipe, key)
        tree[key] = values[0] if len(set(values)) == 1 else list(values)
    if set(pipe.microbatch_weights) != {1.0}:
        tree["microbatch_weights"] = list(pipe.microbatch_weights)
    if pipe.release:
        tree["release"] = pipe.release
    if pipe.deadline is not None:
        tree["deadline"] = pipe.deadline
    if pipe.interleaved:
        tree["interleaved"] = True
    return tree


def _check_keys(
    place: str, tree: Mapping[str, object], known: Sequence[str], needed: Sequence[str]
) -> None:
    for key in tree:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise ValueError(f"{place}: unknown key {key!r}; {hint}")
    for key in needed:
        if key not in tree:
            raise ValueError(f"{place}: the key {key!r} is missing")


def _whole(place: str, value: object) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{place} is {value!r}, expected a whole number")
    return value


def _number(place: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{place} is {value!r}, expected a number")
    return float(value)


def _list(place: str, value: object) -> list[float]:
    if not isinstance(value, list):
        raise ValueError(f"{place} is {value!r}, expected a list of numbers")
    return [_number(f"{place}[{i}]", item) for i, item in enumerate(value)]


def _numbers(place: str, value: object) -> float | list[float]:
    return _list(place, value) if isinstance(value, list) else _number(place, value)


def _links(value: object) -> float | dict[tuple[int, int], float]:
    if not isinstance(value, list):
        return _number("link_latency", value)
    links: dict[tuple[int, int], float] = {}
    for i, item in enumerate(value):
        if not isinstance(item, list) or len(item) != 3:
            raise ValueError(f"link_latency[{i}] is {item!r}, expected [from, to, seconds]")
        pair = (_whole(f"link_latency[{i}]", item[0]), _whole(f"link_latency[{i}]", item[1]))
        links[pair] = _number(f"link_latency[{i}]", item[2])
    return links
