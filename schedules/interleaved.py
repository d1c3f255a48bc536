"""Several model chunks on each rank: interleaved 1F1B, and the chunked pipelines that it runs on.

A pipeline of p stages is cut into ``v * p`` shorter ones: each rank keeps the work and the memory
it had, in v equal chunks. In a *loop* chunk c of rank i is stage ``c * p + i``; in a *fold*
(V shape, two chunks) the pipeline comes back the way it went.
"""

from collections.abc import Iterator
from dataclasses import replace

from rlhfuse.schedules.ir import Op, Pipeline, Problem, Schedule, Task
from rlhfuse.schedules.standard import Rows, checked, in_groups, plain_rows


def interleaved(problem: Problem, chunks: int = 2) -> Schedule:
    """Interleaved 1F1B (Megatron-LM, arXiv 2104.04473) with `chunks` chunks on each rank.

    Bubble (p-1)(F+B)/v per pipeline, F and B of a whole rank; at most p + (p-1)/v micro-batches'
    activations on a rank. The schedule's problem is the chunked one. A pipeline whose stages
    already go round its ranks in a loop keeps its own chunks; a forward-only one is not cut.

    Raises:
        ValueError: micro-batches that are no multiple of the ranks, a stage map that is no loop,
            or more memory than the cap.
    """

    def rows(pipe: Pipeline) -> Rows:
        return plain_rows(pipe) if pipe.forward_only else _rows(pipe)

    cut = chunked(problem, chunks)
    return checked(in_groups(cut, rows), f"interleaved 1F1B with {chunks} chunks")


def _rows(pipe: Pipeline) -> Rows:
    p, m = len(set(pipe.stages)), pipe.num_microbatches
    if pipe.stages != pipe.stages[:p] * (pipe.num_stages // p):
        raise ValueError(
            f"interleaved 1F1B: the stages of pipeline {pipe.name!r} do not go round its ranks in "
            "a loop; list the ranks in one order, several times"
        )
    if m % p:
        near = " or ".join(str(n) for n in (m - m % p, m - m % p + p) if n)
        raise ValueError(
            f"interleaved 1F1B: pipeline {pipe.name!r} has {m} micro-batches, not a multiple of "
            f"its {p} ranks; take {near}, or another policy"
        )
    return {rank: _rank_order(pipe, p, position) for position, rank in enumerate(pipe.stages[:p])}


def _rank_order(pipe: Pipeline, p: int, position: int) -> Iterator[Task]:
    """One rank: p micro-batches go through its first chunk, then its second, and so on."""
    chunks, total = pipe.num_stages // p, pipe.num_stages // p * pipe.num_microbatches

    def forward(k: int) -> Task:
        turn, rest = divmod(k, p * chunks)
        chunk, mb = divmod(rest, p)
        return Task(pipe.name, Op.F, chunk * p + position, turn * p + mb)

    def backward(k: int) -> Task:
        turn, rest = divmod(k, p * chunks)
        chunk, mb = divmod(rest, p)
        return Task(pipe.name, Op.B, (chunks - 1 - chunk) * p + position, turn * p + mb)

    warm_up = min(total, 2 * (p - 1 - position) + (chunks - 1) * p)
    for k in range(warm_up):
        yield forward(k)
    for k in range(total):
        if warm_up + k < total:
            yield forward(warm_up + k)
        yield backward(k)


def chunked(problem: Problem, chunks: int, *, fold: bool = False) -> Problem:
    """The problem with every trained pipeline cut into `chunks` chunks per rank.

    Pipelines that have several stages on a rank already, and forward-only ones, stay.

    Raises:
        ValueError: fewer than two chunks, or a fold of more than two.
    """
    if chunks < 2 or (fold and chunks != 2):
        raise ValueError(f"chunks is {chunks}, expected {'2 for a fold' if fold else 'at least 2'}")
    cut = tuple(
        pipe
        if pipe.forward_only or len(set(pipe.stages)) < pipe.num_stages
        else _cut(pipe, chunks, fold)
        for pipe in problem.pipelines
    )
    return replace(problem, pipelines=cut)


def _cut(pipe: Pipeline, chunks: int, fold: bool) -> Pipeline:
    there = tuple(range(pipe.num_stages))
    places = there + there[::-1] if fold else there * chunks

    def share(values: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(values[place] / chunks for place in places)

    return replace(
        pipe,
        stages=tuple(pipe.stages[place] for place in places),
        forward=share(pipe.forward),
        backward=share(pipe.backward),
        weight=share(pipe.weight),
        activation=share(pipe.activation),
        activation_after_input=share(pipe.activation_after_input),
        interleaved=True,
    )
