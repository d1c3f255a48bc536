"""What runs where and how far each worker's engine is, as records, compiled: a snapshot of ten
thousand samples costs microseconds, and so does the news that hundreds of them are complete."""

from collections.abc import Sequence
from heapq import heapify, heappop, heapreplace
from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from rlhfuse.sample import Sample

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Records = npt.NDArray[np.void]

LEAST_STEPS = 16  # a stretch is measured once it is so long
LEARNED_STEPS = 64  # after so many, half of what was believed before counts

WORKER = np.dtype(
    [
        ("alive", np.int64),
        ("num", np.int64),  # samples running
        ("inbound", np.int64),  # samples told to come
        ("load", np.int64),  # tokens reserved for both
        ("expected", np.float64),  # tokens that running ones will get, as expected when they came
        ("steps", np.float64),  # engine steps done, since any moment
        ("heard_s", np.float64),  # `steps` are of this moment
        ("held", np.float64),  # prompt tokens less offsets, summed over its samples
        ("slowness", np.float64),  # seconds of a step over what was predicted
        ("watched_s", np.float64),  # since when nothing but steps happened there; -1: not watched
        ("watched_steps", np.float64),
        ("watched_due_s", np.float64),  # what the steps since then should have taken
    ]
)
# All samples of an instance are stepped together, so a sample has `steps` of its instance less its
# `offset` tokens. `unsure`: it came while others were stepped.
ROW = np.dtype(
    [
        ("number", np.int64),
        ("home", np.int64),
        ("offset", np.float64),
        ("expected", np.float64),
        ("unsure", np.int64),
    ]
)


class Running(NamedTuple):
    """i workers, n samples, known by their number in the iteration. The first `size[0]` rows are
    of running samples, in no order; a row that leaves is filled by the last one."""

    workers: Records  # [i] WORKER
    rows: Records  # [n] ROW
    place: Ints  # [n] row of a sample; -1: it does not run
    to: Ints  # [n] where a sample was told to go; -1: nowhere
    prompts: Ints  # [n]
    size: Ints  # [2] samples running; those of them that were told to go
    table: Floats  # step seconds by batch
    context_s: float  # of a step, per token held
    limit: int  # most response tokens


def no_workers(number: int) -> Records:
    """Records of so many workers, alive, with nothing to do."""
    records = np.zeros(number, dtype=WORKER)
    records["alive"], records["slowness"], records["watched_s"] = 1, 1.0, -1.0
    return records


def nothing_running(
    workers: Records, samples: Sequence[Sample], table: Floats, context_s: float, limit: int
) -> Running:
    """Before the first of these samples starts."""
    num = len(samples)
    return Running(
        workers=workers,
        rows=np.zeros(num, dtype=ROW),
        place=np.full(num, -1, dtype=np.int64),
        to=np.full(num, -1, dtype=np.int64),
        prompts=np.array([s.prompt_tokens for s in samples], dtype=np.int64),
        size=np.zeros(2, dtype=np.int64),
        table=table,
        context_s=float(context_s),
        limit=limit,
    )


@numba.njit(cache=True)
def step_s(r, w):  # type: ignore[no-untyped-def]
    """What a step of the worker's samples should take."""
    base = r.table[min(w.num, len(r.table) - 1)]
    if r.context_s:
        base += r.context_s * (w.held + w.steps * w.num)  # tokens held
    return base


@numba.njit(cache=True)
def steps_at(r, i, now_s):  # type: ignore[no-untyped-def]
    """Steps that the worker has probably done by now."""
    w = r.workers[i]
    if w.num == 0 or now_s <= w.heard_s:
        return w.steps
    return w.steps + (now_s - w.heard_s) / (w.slowness * step_s(r, w))


@numba.njit(cache=True)
def all_steps(r, now_s):  # type: ignore[no-untyped-def]
    """`steps_at`, of each worker. [i]"""
    steps = np.empty(len(r.workers))
    for i in range(len(steps)):
        steps[i] = steps_at(r, i, now_s)
    return steps


@numba.njit(cache=True)
def look_away(r, i):  # type: ignore[no-untyped-def]
    """Something else than steps happens there: begin to watch again at the next progress."""
    w = r.workers[i]
    w.watched_s, w.watched_steps = -1.0, w.steps


@numba.njit(cache=True)
def place(r, number, i, tokens, expected, now_s):  # type: ignore[no-untyped-def]
    """The sample, with `tokens` so far, runs on a worker; `expected` more. Whether it is the only
    one there."""
    w = r.workers[i]
    steps = steps_at(r, i, now_s)
    first = w.num == 0
    row = r.rows[r.size[0]]
    row.unsure = 0
    if first:
        w.heard_s = now_s
    elif steps > w.steps:
        row.unsure = 1
    row.number, row.home, row.offset, row.expected = number, i, steps - tokens, expected
    r.place[number] = r.size[0]
    r.size[0] += 1
    w.num += 1
    w.load += r.prompts[number] + r.limit
    w.expected += expected
    w.held += r.prompts[number] - row.offset
    look_away(r, i)
    return first


@numba.njit(cache=True)
def send(r, number, destination):  # type: ignore[no-untyped-def]
    """The sample has been told to leave for `destination`, where its tokens are reserved."""
    look_away(r, r.rows[r.place[number]].home)  # its batch is another from now on
    w = r.workers[destination]
    w.load += r.prompts[number] + r.limit
    w.inbound += 1
    r.to[number] = destination
    r.size[1] += 1


@numba.njit(cache=True)
def remove(r, number):  # type: ignore[no-untyped-def]
    """The sample runs no more and goes nowhere. Returns (its worker if that is empty now, where it
    was going), -1 for neither."""
    at, to = r.place[number], r.to[number]
    home = r.rows[at].home
    row, w = r.rows[at], r.workers[home]
    w.held -= r.prompts[number] - row.offset
    w.expected -= row.expected
    w.load -= r.prompts[number] + r.limit
    w.num -= 1
    if to >= 0 or w.num == 0:
        w.watched_s, w.watched_steps = -1.0, w.steps
    if w.num == 0:
        w.expected = w.held = 0.0
    if to >= 0:
        r.workers[to].load -= r.prompts[number] + r.limit
        r.workers[to].inbound -= 1
        r.to[number] = -1
        r.size[1] -= 1
    r.place[number] = -1
    r.size[0] -= 1
    last = r.rows[r.size[0]]
    if last.number != number:
        row.number, row.home, row.offset = last.number, last.home, last.offset
        row.expected, row.unsure = last.expected, last.unsure
        r.place[last.number] = at
    return (home if w.num == 0 else -1), to


@numba.njit(cache=True)
def arrive(r, number, tokens, expected, now_s):  # type: ignore[no-untyped-def]
    """The sample has left and runs where it was going. Returns (where that is, its old worker if
    that is empty now), -1 for neither: where it was going is lost, and nothing has changed."""
    if not r.workers[r.to[number]].alive:
        return -1, -1
    emptied, to = remove(r, number)
    place(r, number, to, tokens, expected, now_s)
    return to, emptied


@numba.njit(cache=True)
def reached(r, number, i, tokens, now_s):  # type: ignore[no-untyped-def]
    """The sample is seen to have `tokens` on worker `i`: so many steps has its engine done."""
    at = r.place[number]
    if at < 0 or r.rows[at].home != i:
        return
    row, w = r.rows[at], r.workers[i]
    steps = tokens + row.offset
    if row.unsure or steps < w.steps:
        # It came while others were stepped, or stood still: they say where the engine is.
        row.unsure = 0
        offset = steps_at(r, i, now_s) - tokens
        w.held -= offset - row.offset
        row.offset = offset
        return
    if steps > w.steps:
        w.watched_due_s += (steps - w.steps) * step_s(r, w)
        w.steps = steps
        if w.watched_s < 0.0 or steps >= w.watched_steps + LEAST_STEPS:
            _watch(w, now_s)
    w.heard_s = now_s


@numba.njit(cache=True)
def _watch(w, now_s):  # type: ignore[no-untyped-def]
    """Learn how slow the worker is, from stretches of pure stepping of some length."""
    done = w.steps - w.watched_steps
    if w.watched_s < 0.0 and done <= 0.0:
        return  # not yet at it
    if w.watched_s >= 0.0:
        if done < LEAST_STEPS or w.watched_due_s <= 0.0:
            return
        ratio = (now_s - w.watched_s) / w.watched_due_s
        weight = done / (done + LEARNED_STEPS)
        w.slowness += weight * (min(max(ratio, 0.5), 8.0) - w.slowness)
    w.watched_s, w.watched_steps, w.watched_due_s = now_s, w.steps, 0.0


@numba.njit(cache=True)
def finished(r, numbers, instances, tokens, times, emptied):  # type: ignore[no-untyped-def]
    """These samples are complete, in this order. Fills `emptied` with the workers that have none
    left; returns how many."""
    empty = 0
    for k in range(len(numbers)):
        reached(r, numbers[k], instances[k], tokens[k], times[k])
        home, _ = remove(r, numbers[k])
        if home >= 0:
            emptied[empty] = home
            empty += 1
    return empty


# --- dispatch ------------------------------------------------------------------------------


class Waiting(NamedTuple):
    """q samples of the queue, in order."""

    numbers: Ints  # [q]
    tokens: Ints  # [q] so far
    expected: Floats  # [q] to come
    groups: Ints  # [q] from 0 on


@numba.njit(cache=True)
def deal(r, waiting, last_home, first, max_running, cache_tokens, share, now_s):  # type: ignore[no-untyped-def]
    """Instances for the samples that wait, of as many as find a place; they run there now.
    `share`: expected tokens up to which siblings follow to `last_home`; below 0: they do not."""
    homes = np.empty(len(waiting.numbers), dtype=np.int64)
    heap, others = _by_work(r, 0, first), _by_work(r, first, len(r.workers))
    count = 0
    while count < len(homes) and len(heap) + len(others):
        if not len(heap):
            heap, others = others, heap
        work, load, i = heap[0]
        w = r.workers[i]
        if w.expected * w.slowness != work or w.load != load:
            heapreplace(heap, (w.expected * w.slowness, w.load, i))
            continue
        number, expected = waiting.numbers[count], waiting.expected[count]
        if not _has_room(r, i, number, max_running, cache_tokens):
            heappop(heap)
            continue
        to = i
        if share >= 0.0:
            home = last_home[waiting.groups[count]]
            home = i if home < 0 else home
            fits = _has_room(r, home, number, max_running, cache_tokens)
            if fits and r.workers[home].expected + expected <= share:
                to = home
            last_home[waiting.groups[count]] = to
        place(r, number, to, waiting.tokens[count], expected, now_s)
        homes[count] = to
        count += 1
    return homes[:count]


@numba.njit(cache=True)
def _by_work(r, first, end):  # type: ignore[no-untyped-def]
    """A heap of (work, load, instance), of the live ones from `first` up to `end`."""
    heap = [(0.0, 0, -1)]
    heap.pop()
    for i in range(first, min(end, len(r.workers))):
        w = r.workers[i]
        if w.alive:
            heap.append((w.expected * w.slowness, w.load, i))
    heapify(heap)
    return heap


@numba.njit(cache=True)
def _has_room(r, i, number, max_running, cache_tokens):  # type: ignore[no-untyped-def]
    """Whether the sample fits to its very end, whatever its length."""
    w = r.workers[i]
    if w.num + w.inbound >= max_running:
        return False
    if cache_tokens == 0 or w.load == 0:
        return True
    return w.load + r.prompts[number] + r.limit <= cache_tokens
