"""Files come back as what was written, and bad files get one clear line."""

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from torch.distributed.pipelining.schedules import _Action, _validate_schedule

from rlhfuse.schedules.formats import (
    from_flexfusion,
    from_torch_csv,
    schedule_from_json,
    schedule_to_json,
    to_flexfusion,
    to_torch_csv,
)
from rlhfuse.schedules.fused import fuse
from rlhfuse.schedules.ir import Pipeline, Problem
from rlhfuse.schedules.problem_file import problem_from_tree, problem_to_tree, read_problem
from rlhfuse.schedules.standard import serial, zb_h1
from rlhfuse.schedules.timing import makespan

PROBLEM = Problem(
    4,
    (
        Pipeline.make("actor", [0, 1, 2, 3], 4, 1, [2, 2, 2, 3], weight=1, activation=1.5),
        Pipeline.make("critic0", [1, 0], 3, 1, 2, microbatch_weights=[1, 0.5, 2], release=1.0),
        Pipeline.make("critic1", [3, 2], 3, 1, 2, deadline=100.0),
    ),
    memory_cap=9.0,
    link_latency={(0, 1): 0.25},
)
ONE = Problem(4, (Pipeline.make("model", [0, 1, 2, 3], 6, 1, 2, weight=1),))


@pytest.mark.parametrize("split", [False, True])
def test_json_returns_the_schedule(split: bool) -> None:
    schedule = fuse(PROBLEM, iterations=2, split_weight=split)
    data = schedule_to_json(schedule)
    assert schedule_from_json(data) == schedule
    tree = msgspec.json.decode(data)
    assert tree["makespan"] == pytest.approx(makespan(schedule))
    assert max(t["end"] for row in tree["ranks"] for t in row) == pytest.approx(tree["makespan"])


def test_problem_tree_round_trip() -> None:
    assert problem_from_tree(problem_to_tree(PROBLEM)) == PROBLEM


def test_flexfusion_round_trip() -> None:
    schedule = fuse(PROBLEM, iterations=2)
    assert from_flexfusion(to_flexfusion(schedule), PROBLEM) == schedule


@pytest.mark.parametrize("split", [False, True])
def test_torch_reads_what_we_write(split: bool) -> None:
    schedule = zb_h1(ONE) if split else serial(ONE)
    text = to_torch_csv(schedule)
    actions = {
        rank: [_Action.from_str(cell) for cell in line.split(",")]
        for rank, line in enumerate(text.splitlines())
    }
    _validate_schedule(actions, 4, 4, 6)
    assert from_torch_csv(text, ONE) == schedule
    assert from_torch_csv(text.replace("\n", ",,\n"), ONE) == schedule


BAD = {
    "ranks: 2": "the key 'pipelines' is missing",
    "ranks: 2\npipelines: []": "pipelines is empty",
    "ranks: 2\npipeline: []": "did you mean 'pipelines'",
    "forward: -1": r"forward\[0\] is -1",
    "forward: .nan": r"forward\[0\] is nan",
    "forward: fast": "forward is 'fast', expected a number",
    "microbatches: 0": "microbatches is 0",
    "microbatches: 1000000000": "too many tasks",
    "microbatches: 1e9": "too many tasks",
    "stages: [0, 2]": "stage 1 is on rank 2, ranks are 0 to 1",
    "stages: [0, 0]": "appears twice",
    "stages: []": "stages is empty",
    "weight: 3": "exceeds its backward",
    "backward: [1]": "has 1 numbers for 2 stages",
    "colour: red": "unknown key 'colour'",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_problem_files_get_one_clear_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "problem.yaml"
    key = line.split(":")[0]
    good = {
        "name": "a",
        "stages": "[0, 1]",
        "microbatches": 2,
        "forward": 1,
        "backward": 2,
        "weight": 1,
    }
    if key == "ranks":
        path.write_text(line)
    else:
        fields = [f"{k}: {v}" for k, v in good.items() if k != key] + [line]
        path.write_text(f"ranks: 2\npipelines:\n  - {{{', '.join(fields)}}}\n")
    with pytest.raises(ValueError, match=BAD[line]) as caught:
        read_problem(path)
    assert "\n" not in str(caught.value)


def test_a_broken_schedule_file_is_refused() -> None:
    schedule = serial(ONE)
    broken = replace(schedule, rows=schedule.rows[::-1])
    with pytest.raises(ValueError, match="ERROR HERE"):
        schedule_from_json(schedule_to_json(schedule).replace(b'"stage":0', b'"stage":1'))
    with pytest.raises(ValueError, match="ERROR HERE"):
        broken.validate()
