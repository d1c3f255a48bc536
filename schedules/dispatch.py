"""List scheduling, in time's direction and against it.

Whenever a rank is free it takes the most urgent task that may start: its input has arrived, the
memory cap holds, the chain's limit of micro-batches in flight allows it, and its receiver has at
most two messages unread. So the result passes the channel check, unless streams share a channel (a
rank that holds several stages of a pipeline); then it must be asked.

A rank keeps room for one micro-batch of every chain of a pipeline that does not give way to the
claiming one. The pipeline that gives way to none can then always move on, next the one that gives
way only to it, and so on. (Where micro-batches differ in weight, or hold less after
`I` than before, a cap can still be too tight for an order: such a try is given up.)
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rlhfuse.schedules.compiled import (
    SLOT_F,
    Coded,
    Floats,
    Ints,
    Rows,
    compiled,
    decode,
    encode,
    inlined,
)
from rlhfuse.schedules.flows import (
    AFTER,
    CLAIM,
    CLOSER,
    COUNT,
    DOWN,
    DURATION,
    EARLIEST,
    FIRST,
    LOCAL,
    NET,
    OPENS,
    RANK,
    READS,
    SENDS,
    SHARED,
    UP,
    Flow,
    make_flow,
)
from rlhfuse.schedules.ir import Problem, Schedule

NEVER = 1e300
UNREAD = 2  # messages that may be unread on a channel (see `timing`)
WAIT = NO_LIMIT = 1 << 40
FREE, HELD, START = range(3)  # columns of `Desk.rank`


class Desk(NamedTuple):
    """Working arrays of a dispatcher; made once, used for every run."""

    next: Ints  # [K] next task of each kind
    starts: Floats  # [K] when it could start
    unread: Ints  # [K] messages of a stream
    must: Ints  # [num_ranks] kind that must come next, WAIT for a stream, -1 for neither
    end: Floats  # [T]
    rank: Floats  # [num_ranks, 3], columns FREE, HELD (memory) and START (of the best next task)
    best_kind: Ints  # [num_ranks] that task's
    row_first: Ints  # [num_ranks + 1]
    tasks: Ints  # [N] rows being written
    length: Ints  # [num_ranks]
    touched: Ints  # [num_ranks, at least 3] ranks whose best next task may have changed


class Policy(NamedTuple):
    """What a dispatcher is told: the smallest key goes first."""

    key: Floats  # [T]
    limit: Ints  # [C] micro-batches in flight
    way: Ints  # [C] a chain keeps no room for chains with a larger number
    window: float  # a task up to this much later may go first if it is more urgent
    bold: bool  # may leave a third message unread and wait until one is read
    cap: float


def make_desk(coded: Coded, flow: Flow) -> Desk:
    """Working arrays for problems of this shape."""
    ranks, kinds = coded.num_ranks, flow.kind.shape[0]
    work = np.bincount(flow.kind[:, RANK], flow.kind[:, COUNT], ranks)
    row_first = np.concatenate([np.zeros(1), np.cumsum(work)]).astype(np.int64)
    return Desk(
        next=np.zeros(kinds, np.int64),
        starts=np.zeros(kinds),
        unread=np.zeros(kinds, np.int64),
        must=np.zeros(ranks, np.int64),
        end=np.zeros(coded.rank.shape[0]),
        rank=np.zeros((ranks, 3)),
        best_kind=np.zeros(ranks, np.int64),
        row_first=row_first,
        tasks=np.zeros(int(row_first[-1]), np.int64),
        length=np.zeros(ranks, np.int64),
        touched=np.zeros(max(3, ranks), np.int64),
    )


def dispatch_pipeline(problem: Problem, limits: Sequence[int]) -> Schedule:
    """Backward first, oldest first, at most `limits` in flight per chain: 1F1B on any stage map."""
    coded = encode(problem, [False] * len(problem.pipelines))
    flow = make_flow(problem, coded, np.zeros(coded.rank.shape[0]), reverse=False)
    desk = make_desk(coded, flow)
    key = coded.microbatch + 1e6 * (coded.slot == SLOT_F)
    limit = np.asarray(limits, np.int64)
    dispatch(flow, desk, Policy(key.astype(np.float64), limit, 0 * limit, 0.0, False, NEVER))
    return decode(problem, coded, Rows(desk.tasks, desk.row_first))


@inlined
def _input_time(
    sign: int, kind: Ints, times: Floats, latency: Floats, next_: Ints, end: Floats, k: int
) -> float:
    """When the inputs of the next task of kind k are there, NEVER if that is not known."""
    i = next_[k]
    ready = times[kind[k, FIRST] + sign * i, EARLIEST]
    source = kind[k, UP]
    if source >= 0:
        if next_[source] <= i:
            ready = NEVER
        else:
            ready = max(ready, end[kind[source, FIRST] + sign * i] + latency[k])
    source = kind[k, LOCAL]
    if source >= 0 and next_[source] <= i:
        ready = NEVER
    return float(ready)


@inlined
def _may_send(
    sign: int,
    kind: Ints,
    times: Floats,
    next_: Ints,
    starts: Floats,
    unread: Ints,
    must: Ints,
    rank: Floats,
    k: int,
    bold: bool,
    cap: float,
) -> bool:
    """Whether the channel rule lets a task of kind k make its message.

    A third unread message is made boldly if its reader could read one at once: in time's direction
    the rank then waits until that is done; against it the reader (which will come before what the
    message's maker blocks) must read next.
    """
    c = kind[k, SENDS]
    fine = c < 0 or unread[c] < UNREAD
    if not fine and bold and unread[c] == UNREAD and kind[k, SHARED] == 0:
        reader = kind[k, DOWN]
        fine = starts[reader] < NEVER
        if fine and sign < 0:
            r = kind[reader, RANK]
            fine = must[r] < 0 or must[r] == reader
            if fine and kind[reader, OPENS]:
                claim = times[kind[reader, FIRST] + sign * next_[reader], CLAIM]
                fine = rank[r, HELD] + claim <= cap
    return bool(fine)


@inlined
def _fits(
    sign: int,
    kind: Ints,
    times: Floats,
    kinds_first: Ints,
    kinds: Ints,
    next_: Ints,
    limit: Ints,
    way: Ints,
    reserve: Floats,
    k: int,
    room: float,
) -> bool:
    """Whether limit and memory allow kind k another micro-batch, with room kept for others."""
    i, closer, rank = next_[k], kind[k, CLOSER], kind[k, RANK]
    fine = k == closer or i - next_[closer] < limit[k // 3]
    room -= times[kind[k, FIRST] + sign * i, CLAIM]
    for q in range(kinds_first[rank], kinds_first[rank + 1]):
        other = kinds[q]
        if kind[other, OPENS] and other != k and way[other // 3] <= way[k // 3]:
            begun = next_[other]
            if begun < kind[other, COUNT] and begun == next_[kind[other, CLOSER]]:
                room -= reserve[other // 3]
    return fine and room >= 0.0


@inlined
def _scan(
    sign: int,
    kind: Ints,
    times: Floats,
    latency: Floats,
    kinds_first: Ints,
    kinds: Ints,
    next_: Ints,
    starts: Floats,
    unread: Ints,
    must: Ints,
    end: Floats,
    ranks: Floats,
    limit: Ints,
    way: Ints,
    reserve: Floats,
    r: int,
    bold: bool,
    cap: float,
) -> float:
    """Fill `starts` for the kinds of a rank; the earliest."""
    earliest, free, room = NEVER, ranks[r, FREE], cap - ranks[r, HELD]
    for q in range(kinds_first[r], kinds_first[r + 1]):
        k = kinds[q]
        start = NEVER
        if next_[k] < kind[k, COUNT] and (must[r] < 0 or must[r] == k):
            start = _input_time(sign, kind, times, latency, next_, end, k)
        if start < NEVER:
            start = max(start, free)
            fine = _may_send(sign, kind, times, next_, starts, unread, must, ranks, k, bold, cap)
            if fine and kind[k, OPENS]:
                fine = _fits(
                    sign, kind, times, kinds_first, kinds, next_, limit, way, reserve, k, room
                )
            if not fine:
                start = NEVER
        starts[k] = start
        earliest = min(earliest, start)
    return earliest


@inlined
def _most_urgent(
    sign: int,
    kind: Ints,
    kinds_first: Ints,
    kinds: Ints,
    next_: Ints,
    starts: Floats,
    keys: Floats,
    rank: int,
    latest: float,
) -> int:
    """The kind with the smallest key of those that can start by `latest`; -1 if none can."""
    best, least = -1, np.inf
    for q in range(kinds_first[rank], kinds_first[rank + 1]):
        k = kinds[q]
        if starts[k] <= latest:
            key = keys[kind[k, FIRST] + sign * next_[k]]
            if key < least:
                best, least = k, key
    return best


@inlined
def _pass_on(sign: int, kind: Ints, unread: Ints, must: Ints, k: int) -> None:
    """Count messages after a task of kind k, and see who must wait or hurry because of them."""
    rank = kind[k, RANK]
    if sign < 0:
        must[rank] = -1
    c = kind[k, SENDS]
    if c >= 0:
        unread[c] += 1
        if unread[c] > UNREAD and sign > 0:
            must[rank] = WAIT
        elif unread[c] > UNREAD:
            must[kind[kind[k, DOWN], RANK]] = kind[k, DOWN]
    c = kind[k, READS]
    if c >= 0:
        unread[c] -= 1
        source = kind[kind[k, UP], RANK]
        if sign > 0 and must[source] == WAIT and unread[c] == UNREAD:
            must[source] = -1


@inlined
def _first_rank(ranks: Floats) -> int:
    """The rank whose next task starts first."""
    rank = 0
    for other in range(1, ranks.shape[0]):
        if ranks[other, START] < ranks[rank, START]:
            rank = other
    return rank


@inlined
def _clear(desk: Desk) -> None:
    desk.starts[:] = NEVER
    desk.next[:] = 0
    desk.unread[:] = 0
    desk.must[:] = -1
    desk.rank[:] = 0.0
    desk.length[:] = 0
    for rank in range(desk.rank.shape[0]):
        desk.touched[rank] = rank


@inlined
def _run(
    sign: int,
    kind: Ints,
    times: Floats,
    next_: Ints,
    end: Floats,
    ranks: Floats,
    row_first: Ints,
    tasks: Ints,
    length: Ints,
    rank: int,
    k: int,
) -> int:
    """Run the rank's best task, of kind k; its id."""
    task = kind[k, FIRST] + sign * next_[k]
    finish = ranks[rank, START] + times[task, DURATION]
    end[task] = finish
    ranks[rank, FREE] = finish
    ranks[rank, HELD] += times[task, NET]
    next_[k] += 1
    place = row_first[rank] + length[rank] if sign > 0 else row_first[rank + 1] - 1 - length[rank]
    tasks[place] = task
    length[rank] += 1
    return int(task)


@compiled
def dispatch(flow: Flow, desk: Desk, policy: Policy) -> float:
    """Makespan (at the least) of the rows left on the desk; infinite if tasks got stuck."""
    # Arrays are taken out of their tuples once: in the loop each time would count a reference.
    sign, kind, times, latency = flow.sign, flow.kind, flow.task, flow.latency
    reserve, kinds_first, kinds = flow.reserve, flow.kinds_first, flow.kinds
    next_, starts, unread, must, end = desk.next, desk.starts, desk.unread, desk.must, desk.end
    ranks, best_kind, row_first = desk.rank, desk.best_kind, desk.row_first
    tasks, length, touched = desk.tasks, desk.length, desk.touched
    keys, limit, way, window = policy.key, policy.limit, policy.way, policy.window
    bold, cap = policy.bold, policy.cap
    _clear(desk)
    count, longest = ranks.shape[0], 0.0
    left = tasks.shape[0]
    while left > 0:
        for z in range(count):
            r = touched[z]
            earliest = _scan(
                sign,
                kind,
                times,
                latency,
                kinds_first,
                kinds,
                next_,
                starts,
                unread,
                must,
                end,
                ranks,
                limit,
                way,
                reserve,
                r,
                bold,
                cap,
            )
            ranks[r, START] = NEVER
            if earliest < NEVER:
                k = _most_urgent(
                    sign, kind, kinds_first, kinds, next_, starts, keys, r, earliest + window
                )
                best_kind[r] = k
                ranks[r, START] = starts[k]
        r = _first_rank(ranks)
        if ranks[r, START] >= NEVER:
            return np.inf
        k = best_kind[r]
        count, touched[0] = 1, r
        if bold and not _may_send(
            sign, kind, times, next_, starts, unread, must, ranks, k, bold, cap
        ):
            continue  # what allowed it has changed since
        left -= 1
        task = _run(sign, kind, times, next_, end, ranks, row_first, tasks, length, r, k)
        longest = max(longest, end[task] + times[task, AFTER])
        _pass_on(sign, kind, unread, must, k)
        if kind[k, SENDS] >= 0:
            touched[count] = kind[kind[k, DOWN], RANK]
            count += 1
        if kind[k, READS] >= 0:
            touched[count] = kind[kind[k, UP], RANK]
            count += 1
    return longest
