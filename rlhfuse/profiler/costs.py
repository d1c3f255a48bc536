"""Measured costs as a problem: what ``rlhfuse schedule`` and ``rlhfuse plan`` take."""

from collections.abc import Sequence
from dataclasses import replace

from rlhfuse.profiler.recovery import Recovered, microbatch_costs
from rlhfuse.schedules.ir import Pipeline, Problem


def measured_problem(rounds: Sequence[Recovered]) -> Problem:
    """All models that trained in a step, in one problem: seconds, medians over micro-batches.

    Micro-batches keep their measured weights; of a model that trained in several rounds the last
    one counts. Activations count 1 a micro-batch, for nothing measured them.

    Raises:
        ValueError: no training round was recovered.
    """
    if not rounds:
        raise ValueError("--costs: no schedule was recovered from this trace, so no costs")
    pipes: dict[str, Pipeline] = {}
    lag_s = 0.0
    for training in rounds:
        for pipe in training.problem.pipelines:
            weights = [round(x, 6) for x in microbatch_costs(training, pipe)]
            pipes[pipe.name] = replace(pipe, microbatch_weights=tuple(weights))
        lag_s = max(lag_s, training.lag_s)
    ranks = max(training.problem.num_ranks for training in rounds)
    return Problem(ranks, tuple(pipes.values()), None, lag_s)
