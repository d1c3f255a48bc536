"""Exact timing of schedules: predicted timelines, and proof that a schedule can be executed.

Channels (one first-in first-out channel per link, direction and pipeline): messages travel in the
order in which the sender makes them. A receiver has receives posted for what it has consumed and
`ahead` messages more; a send completes when its receive is posted; a rank computes on with at most
`ahead` sends open per channel. This is the weakest behaviour that executors are built for, so a
schedule that completes under it cannot deadlock.
"""

from dataclasses import dataclass

import numpy as np

from rlhfuse.schedules.compiled import (
    Bools,
    Coded,
    Floats,
    Ints,
    Rows,
    compiled,
    encode_schedule,
    run_rows,
)
from rlhfuse.schedules.ir import Problem, Schedule, Task
from rlhfuse.timeline import Kind, Span, Timeline


@dataclass(frozen=True, slots=True)
class Message:
    """The output of `producer` that `consumer`, on another rank, needs."""

    producer: Task
    consumer: Task


@dataclass(frozen=True, slots=True)
class Channel:
    """Messages of one pipeline from one rank to another, in the order they are sent."""

    pipeline: str
    source: int
    target: int
    messages: tuple[Message, ...]


def end_times(coded: Coded, rows: Rows) -> tuple[Floats, Ints]:
    """End of every task [T] and an order [N] with predecessors first.

    Raises:
        ValueError: tasks wait for each other in a circle.
    """
    ranks, size = coded.num_ranks, coded.rank.shape[0]
    end, order = np.zeros(size), np.empty(rows.tasks.shape[0], np.int64)
    waiter = np.empty(size, np.int64)
    at, todo = np.empty(ranks, np.int64), np.empty(ranks + 1, np.int64)
    done = run_rows(rows, coded, end, waiter, at, todo, order)
    if done < rows.tasks.shape[0]:
        raise ValueError("tasks of the schedule wait for each other in a circle")
    return end, order


@compiled
def makespans(coded: Coded, first: Ints, tasks: Ints) -> Floats:
    """Makespan of each of K schedules of one problem, infinite where tasks wait in a circle.

    `tasks` [K, N] holds the rows of each, rank r at ``first[r]:first[r + 1]``. One call for many
    small schedules: a call from Python costs as much as hundreds of simulated tasks.
    """
    ranks, size, n = first.shape[0] - 1, coded.rank.shape[0], tasks.shape[1]
    end, waiter = np.empty(size), np.empty(size, np.int64)
    at, todo, order = (
        np.empty(ranks, np.int64),
        np.empty(ranks + 1, np.int64),
        np.empty(n, np.int64),
    )
    lengths = np.zeros(tasks.shape[0])
    for k in range(tasks.shape[0]):
        row = tasks[k]
        if run_rows(Rows(row, first), coded, end, waiter, at, todo, order) < n:
            lengths[k] = np.inf
            continue
        for rank in range(ranks):
            if first[rank + 1] > first[rank]:
                lengths[k] = max(lengths[k], end[row[first[rank + 1] - 1]])
    return lengths


def makespan(schedule: Schedule) -> float:
    """When the last task ends.

    Raises:
        ValueError: tasks wait for each other in a circle.
    """
    coded, rows = encode_schedule(schedule)
    end, _ = end_times(coded, rows)
    return float(end[rows.tasks].max(initial=0.0))


def simulate(schedule: Schedule) -> Timeline:
    """The predicted timeline: every rank runs its row as early as inputs and links allow.

    Lanes are ``rank0``, ``rank1``, ...; span names are the tasks' text forms; `args` holds
    ``pipeline``, ``pp_stage`` and ``microbatch``.

    Raises:
        ValueError: tasks wait for each other in a circle.
    """
    coded, rows = encode_schedule(schedule)
    end, _ = end_times(coded, rows)
    ends = end[rows.tasks].tolist()
    lengths = coded.duration[rows.tasks].tolist()
    spans = []
    for position, (rank, _, task) in enumerate(schedule.tasks()):
        spans.append(
            Span(
                lane=f"rank{rank}",
                start_s=ends[position] - lengths[position],
                end_s=ends[position],
                kind=Kind(task.op.value),
                name=str(task),
                args={
                    "pipeline": task.pipeline,
                    "pp_stage": task.pp_stage,
                    "microbatch": task.microbatch,
                },
            )
        )
    return Timeline(tuple(spans))


def channels(schedule: Schedule) -> tuple[Channel, ...]:
    """Every channel that the schedule uses, by pipeline in file order, source and target.

    Sender and receiver both follow the order of `messages`.
    """
    coded, rows = encode_schedule(schedule)
    by_id = dict(zip(rows.tasks.tolist(), (t for row in schedule.rows for t in row), strict=True))
    found: dict[tuple[int, int, int], list[Message]] = {}
    position = {pipe.name: index for index, pipe in enumerate(schedule.problem.pipelines)}
    for id_ in rows.tasks.tolist():
        target = int(coded.succ[id_])
        if target < 0 or coded.slot[id_] == 2 or coded.rank[id_] == coded.rank[target]:
            continue
        key = (position[by_id[id_].pipeline], int(coded.rank[id_]), int(coded.rank[target]))
        found.setdefault(key, []).append(Message(by_id[id_], by_id[target]))
    names = [pipe.name for pipe in schedule.problem.pipelines]
    return tuple(
        Channel(names[pipe], source, target, tuple(messages))
        for (pipe, source, target), messages in sorted(found.items())
    )


def check_channels(schedule: Schedule, ahead: int = 1) -> None:
    """Prove that the schedule completes under the channel rule (head of this file).

    Raises:
        ValueError: it would deadlock; the message shows where the ranks stand.
    """
    coded, rows = encode_schedule(schedule)
    at = stuck_ranks(coded, rows, channel_numbers(schedule.problem, coded), ahead)
    for rank in range(coded.num_ranks):
        index = int(at[rank] - rows.first[rank])
        if index < len(schedule.rows[rank]):
            raise ValueError(
                f"deadlock with receives posted {ahead} ahead: rank {rank} stops at "
                f"{schedule.rows[rank][index]}\n{schedule.marked(rank, index)}"
            )


def channel_numbers(problem: Problem, coded: Coded) -> Ints:
    """Channel number of the message that each task sends [T], -1 if it sends none."""
    stages = [pipe.num_stages for pipe in problem.pipelines]
    pipeline = np.repeat(np.arange(len(stages)), stages)
    target = coded.succ
    sends = (target >= 0) & (coded.rank[target] != coded.rank)
    key = pipeline[coded.chain] * coded.num_ranks + coded.rank
    key = key * coded.num_ranks + coded.rank[target]
    numbers = np.full(coded.rank.shape[0], -1, np.int64)
    numbers[sends] = np.unique(key[sends], return_inverse=True)[1]
    return numbers


def stuck_ranks(coded: Coded, rows: Rows, channel: Ints, ahead: int) -> Ints:
    """Where each rank stands in `rows` when nothing moves any more; its row's end if it is done."""
    number = np.zeros(channel.shape[0], np.int64)
    num_channels = int(channel.max(initial=-1)) + 1
    at = rows.first[:-1].copy()
    run_channels(
        rows,
        coded.pred,
        channel,
        ahead,
        number,
        np.zeros(num_channels, np.int64),
        np.full(num_channels, ahead, np.int64),
        np.zeros(channel.shape[0], np.bool_),
        at,
    )
    return at


@compiled
def _number_messages(rows: Rows, channel: Ints, number: Ints, sent: Ints) -> None:
    """`number` [T]: the place of each task's message in its channel."""
    for i in range(rows.tasks.shape[0]):
        c = channel[rows.tasks[i]]
        if c >= 0:
            number[rows.tasks[i]] = sent[c]
            sent[c] += 1
    sent[:] = 0


@compiled
def _input_read(
    source: int, channel: Ints, number: Ints, posted: Ints, done: Bools, ahead: int
) -> bool:
    """Post the receives that the task needs; whether the output of `source` has come in."""
    c = channel[source]
    if c < 0:
        return bool(done[source])
    posted[c] = max(posted[c], number[source] + 1)
    if done[source]:
        posted[c] = max(posted[c], number[source] + 1 + ahead)
    return bool(done[source])


@compiled
def run_channels(
    rows: Rows,
    pred: Ints,
    channel: Ints,
    ahead: int,
    number: Ints,
    sent: Ints,
    posted: Ints,
    done: Bools,
    at: Ints,
) -> None:
    """Let every rank go as far as the channel rule allows, until nothing moves."""
    _number_messages(rows, channel, number, sent)
    before, total = -1, 0
    while total > before:
        before = total
        for rank in range(at.shape[0]):
            while at[rank] < rows.first[rank + 1]:
                here = at[rank]
                c = channel[rows.tasks[here - 1]] if here > rows.first[rank] else -1
                if c >= 0 and sent[c] - posted[c] > ahead:
                    break
                task = rows.tasks[here]
                source = pred[task]
                if source >= 0 and not _input_read(source, channel, number, posted, done, ahead):
                    break
                done[task] = True
                if channel[task] >= 0:
                    sent[channel[task]] += 1
                at[rank] += 1
        total = at.sum() + posted.sum()
