"""ZB-V: the weight gradient split off, on a pipeline folded into a V.

(ZB-H1, which needs no fold, is in `standard`.)
"""

from collections.abc import Iterator

from rlhfuse.schedules.interleaved import chunked
from rlhfuse.schedules.ir import Op, Pipeline, Problem, Schedule, Task
from rlhfuse.schedules.standard import Rows, checked, in_groups, plain_rows


def zb_v(problem: Problem) -> Schedule:
    """ZB-V (arXiv 2405.15362): rank i holds chunk i of the way there and of the way back.

    Where F = I = W and m >= 2p - 1, each rank runs without a pause from its first task to its last;
    the makespan is the work plus (p-1)/2 forwards of a whole rank, since rank i starts i chunks
    late. Memory p micro-batches on every rank. The schedule's problem is the folded one.
    A pipeline without a weight part runs the same order with whole backwards.

    Raises:
        ValueError: a stage map of several stages a rank that is no fold, or more memory than the
            cap.
    """

    def rows(pipe: Pipeline) -> Rows:
        return plain_rows(pipe) if pipe.forward_only else _rows(pipe)

    return checked(in_groups(chunked(problem, 2, fold=True), rows), "ZB-V")


def _rows(pipe: Pipeline) -> Rows:
    p = len(set(pipe.stages))
    there, back = pipe.stages[:p], pipe.stages[p:]
    if back != there[::-1]:
        raise ValueError(
            f"ZB-V: the stages of pipeline {pipe.name!r} do not go over its ranks and back"
        )
    split = any(pipe.weight)
    return {
        rank: [
            Task(task.pipeline, task.op if split or task.op is Op.F else Op.B, *_at(task))
            for task in _rank_order(pipe, p, position)
            if task.microbatch < pipe.num_microbatches and (split or task.op is not Op.W)
        ]
        for position, rank in enumerate(there)
    }


def _at(task: Task) -> tuple[int, int]:
    return task.pp_stage, task.microbatch


class _Chunk:
    """One chunk of a rank: its tasks, each kind in micro-batch order."""

    def __init__(self, name: str, stage: int) -> None:
        self.name, self.stage = name, stage
        self.count = dict.fromkeys(Op, 0)

    def next(self, op: Op) -> Task:
        self.count[op] += 1
        return Task(self.name, op, self.stage, self.count[op] - 1)

    def backward(self) -> Iterator[Task]:
        """Input gradient, and its weight gradient at once."""
        yield self.next(Op.I)
        yield self.next(Op.W)


def _rank_order(pipe: Pipeline, p: int, position: int) -> Iterator[Task]:
    """One rank. Written for at least 2p - 1 micro-batches; with fewer, leave out those above."""
    m = max(pipe.num_microbatches, 2 * p - 1)
    there, back = _Chunk(pipe.name, position), _Chunk(pipe.name, 2 * p - 1 - position)
    # Warm-up: fill until the first micro-batch comes back, then one there for each one back.
    for _ in range(2 * (p - position) - 1):
        yield there.next(Op.F)
    for _ in range(position):
        yield back.next(Op.F)
        yield there.next(Op.F)
    for _ in range(p - position):
        yield back.next(Op.F)
        yield from back.backward()
    # Steady: all six operations, once each.
    while back.count[Op.F] < m:
        if there.count[Op.F] < m:
            yield there.next(Op.F)
        yield from there.backward()
        yield back.next(Op.F)
        yield from back.backward()
    # Cool-down: input gradients, which others wait for, first; weight gradients fill the rest.
    for _ in range(position):
        yield there.next(Op.I)
        yield back.next(Op.I)
    for _ in range(p - position):
        yield there.next(Op.I)
        yield there.next(Op.W)
    for chunk in (back, there):
        while chunk.count[Op.W] < m:
            yield chunk.next(Op.W)
