"""Compile, or load from the cache on disk, what numba compiles: the schedule search, the rollout
scheduler, its forecast and its simulator. `make setup` runs it, so that no first step and no first
command has to wait."""

from rlhfuse.cost import CostModel
from rlhfuse.rollout import forecast
from rlhfuse.rollout.policy import Migration, Policy
from rlhfuse.rollout.simulator import simulate
from rlhfuse.rollout.world import Loss
from rlhfuse.schedules.fused import fuse
from rlhfuse.schedules.ir import Pipeline, Problem
from rlhfuse.schedules.robust import fuse_robust
from rlhfuse.schedules.searcher import Search


def warm_up() -> None:
    """Run all of it on the smallest problems that touch all of its code."""
    forecast.warm_up()
    policy = Policy(migration=Migration.FORCED, forced=((3, 1),))
    simulate(
        CostModel.default(), policy, [10, 40, 60, 80], [5] * 4, 3, ("actor",),
        losses=[Loss(0.03, 2, 0.1)],
    )  # fmt: skip
    pipelines = (
        Pipeline.make("actor", (0, 1), 2, (1.0, 1.3), 2.0, weight=1.0),
        Pipeline.make("critic", (1, 0), 2, 1.0, 2.0, weight=1.0),
    )
    for split_weight in (False, True):
        fuse(Problem(2, pipelines), iterations=2, split_weight=split_weight)
    # So small a problem is solved before the search has begun to anneal: some rounds all the same.
    search = Search(Problem(2, pipelines), False, 0)
    search.begin(False, None)
    for _ in range(2):
        search.round()
    search.era, search.descents_lead = 1, True
    for _ in range(4):
        search.round()
    fuse_robust(Problem(2, pipelines), iterations=1, candidates=1)


if __name__ == "__main__":
    warm_up()
