"""Layouts of two models: what shares which ranks, what cannot, and where stages go."""

import itertools

import pytest

from rlhfuse.schedules.fused import fuse
from rlhfuse.schedules.layouts import (
    Blocks,
    ModelLayout,
    Placement,
    block_problem,
    near_layouts,
    place,
    share_blocks,
)
from rlhfuse.schedules.timing import check_channels


def _model(name: str, tp: int, pp: int, dp: int, m: int = 4) -> ModelLayout:
    return ModelLayout(name, tp, pp, dp, m, 1.0, 2.0, weight=1.0)


def test_factors_of_the_paper() -> None:
    """65B on 8 stages, 33B on 4: two critic pipelines on each actor pipeline."""
    blocks = share_blocks(_model("actor", 8, 8, 2), _model("critic", 8, 4, 4))
    assert blocks == Blocks(8, 2, 8, (1, 2), (1, 1))
    # Half the tensor parallelism: two replicas side by side count as one pipeline.
    blocks = share_blocks(_model("actor", 8, 8, 2), _model("critic", 4, 4, 8))
    assert blocks == Blocks(8, 2, 8, (1, 2), (1, 2))
    # Sizes that do not divide: two pipelines of 6 and three of 4 on 12 ranks.
    assert share_blocks(_model("a", 2, 6, 2), _model("c", 2, 4, 3)).factors == (2, 3)
    # A critic on fewer GPUs: two ranks of the block are the actor's alone.
    blocks = share_blocks(_model("a", 1, 8, 1), _model("c", 1, 3, 2))
    assert (blocks.ranks_per_block, blocks.factors) == (8, (1, 2))


def test_every_layout_of_sixteen_gpus_is_shared_whole_or_refused_with_near_ones() -> None:
    sizes = [
        s for s in itertools.product((1, 2, 3, 4, 8, 16), repeat=3) if s[0] * s[1] * s[2] == 16
    ]
    shared = 0
    for one, two in itertools.product(sizes, repeat=2):
        first, second = _model("actor", *one), _model("critic", *two)
        try:
            blocks = share_blocks(first, second)
        except ValueError:
            for near in near_layouts(first, second):
                assert near[0] * near[1] * near[2] == 16
                share_blocks(first, _model("critic", *near))
            continue
        shared += 1
        assert blocks.num_gpus == 16
        for model, count, beside in zip(
            (first, second), blocks.factors, blocks.side_by_side, strict=True
        ):
            assert blocks.num_blocks * count * beside == model.dp
            assert count * model.pp == blocks.ranks_per_block
        problem = block_problem(first, second, offset=1)
        used = sorted(rank for pipe in problem.pipelines for rank in pipe.stages)
        assert used == sorted(2 * list(range(blocks.ranks_per_block)))
    assert shared > len(sizes)


def test_refusals_say_why_and_what_is_near() -> None:
    with pytest.raises(ValueError, match=r"tp 6 does not divide tp 8.*near that can: tp 8, pp 3"):
        share_blocks(_model("actor", 8, 8, 1), _model("critic", 6, 4, 2))
    with pytest.raises(ValueError, match=r"2 stages of critic .* near that can: tp 4, pp 8, dp 2"):
        share_blocks(_model("actor", 8, 8, 1), _model("critic", 4, 16, 1))
    with pytest.raises(ValueError, match="pp is 0"):
        share_blocks(_model("actor", 8, 0, 1), _model("critic", 4, 16, 1))


def test_the_place_chosen_is_no_worse_than_the_papers() -> None:
    tried: list[Placement] = []
    first, second = _model("actor", 2, 4, 1, m=6), _model("critic", 2, 2, 2, m=3)
    found = place(first, second, split_weight=True, on_try=tried.append)
    assert {(t.reverse, t.offset) for t in tried} == set(itertools.product((True, False), (0, 1)))
    papers = [t.makespan for t in tried if (t.reverse, t.offset) == (True, 0)]
    assert found.makespan <= min(papers)
    assert place(first, second, split_weight=True) == found
    assert "K1 = 1, K2 = 2" in found.describe()
    schedule = fuse(found.problem, iterations=1)
    schedule.validate()
    check_channels(schedule)
