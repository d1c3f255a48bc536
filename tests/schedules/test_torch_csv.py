"""torch.distributed.pipelining reads our CSV with its own loader, and we read what torch writes."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from torch import device, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime
from torch.testing._internal.distributed.fake_pg import FakeStore

from rlhfuse.schedules.formats import from_torch_csv, to_torch_csv
from rlhfuse.schedules.fused import fuse
from rlhfuse.schedules.ir import Pipeline, Problem
from rlhfuse.schedules.summary import Policy, standard_policies

RANKS, MICROBATCHES = 4, 8
PROBLEM = Problem(RANKS, (Pipeline.make("model", range(RANKS), MICROBATCHES, 1, 2, weight=1),))
ONE_MODEL = [policy for policy in standard_policies() if policy.name != "dualpipe"]


@pytest.fixture
def fake_group() -> Iterator[None]:
    """torch's own stand-in for a process group of four: nothing is sent."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    yield
    dist.destroy_process_group()


def _runtime(stages: tuple[int, ...]) -> _PipelineScheduleRuntime:
    """torch's runtime with rank 0's stages of a pipeline with this stage map."""
    here = [
        PipelineStage(nn.Linear(2, 2), stage, len(stages), device("cpu"))
        for stage, rank in enumerate(stages)
        if rank == 0
    ]
    return _PipelineScheduleRuntime(here, MICROBATCHES)


@pytest.mark.usefixtures("fake_group")
@pytest.mark.parametrize("policy", ONE_MODEL, ids=[policy.name for policy in ONE_MODEL])
def test_torch_loads_what_we_write_and_we_load_what_torch_writes(
    policy: Policy, tmp_path: Path
) -> None:
    schedule = policy.make(PROBLEM)
    ours, theirs = tmp_path / "ours.csv", tmp_path / "theirs.csv"
    ours.write_text(to_torch_csv(schedule))
    runtime = _runtime(schedule.problem.pipelines[0].stages)
    runtime._load_csv(str(ours))
    rows = [[str(action) for action in runtime.pipeline_order[rank]] for rank in range(RANKS)]
    assert rows == [[str(task).split(":")[1] for task in row] for row in schedule.rows]
    # Lowering adds the sends and receives; it fails where a schedule cannot be carried out.
    sends = sum("SEND" in str(a) for row in runtime.pipeline_order_with_comms.values() for a in row)
    links = sum(
        a != b
        for a, b in zip(
            schedule.problem.pipelines[0].stages,
            schedule.problem.pipelines[0].stages[1:],
            strict=False,
        )
    )
    assert sends == 2 * links * MICROBATCHES
    runtime._dump_csv(str(theirs), format="compute_only")
    assert from_torch_csv(theirs.read_text(), schedule.problem) == schedule


@pytest.mark.usefixtures("fake_group")
def test_each_of_two_fused_models_is_a_file_that_torch_loads(tmp_path: Path) -> None:
    back = Pipeline.make("critic", range(RANKS - 1, -1, -1), MICROBATCHES, 1, 2, weight=1)
    schedule = fuse(Problem(RANKS, (*PROBLEM.pipelines, back)), iterations=2, split_weight=True)
    for pipe in schedule.problem.pipelines:
        path = tmp_path / f"{pipe.name}.csv"
        path.write_text(to_torch_csv(schedule, pipe.name))
        runtime = _runtime(pipe.stages)
        runtime._load_csv(str(path))
        alone = from_torch_csv(path.read_text(), Problem(RANKS, (pipe,)))
        for rank, row in enumerate(schedule.rows):
            assert alone.rows[rank] == tuple(t for t in row if t.pipeline == pipe.name)
            assert len(runtime.pipeline_order[rank]) == len(alone.rows[rank])
    with pytest.raises(ValueError, match="name one of model, critic"):
        to_torch_csv(schedule)
    with pytest.raises(ValueError, match="no pipeline is named 'actor'"):
        to_torch_csv(schedule, "actor")
