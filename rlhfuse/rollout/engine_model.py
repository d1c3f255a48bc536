"""Simulated engines, compiled: each steps all its samples together.

Between two moments at which a sample comes, goes or is complete, an engine's batch is constant,
so that its samples advance at one rate. Everything lies in records: a million samples are a few
arrays, and the completions up to the next thing that a scheduler would answer are one call.
"""

from collections.abc import Sequence
from math import inf
from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from rlhfuse.cost import CostModel

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Records = npt.NDArray[np.void]
MOST_AT_ONCE = 8192  # completions, and stretches of decoding, that one call reports

ENGINE = np.dtype(
    [
        ("slow", np.float64),  # multiplies all that it does
        ("steps", np.float64),  # engine steps done (fractions included); only grows
        ("at_s", np.float64),  # `steps` and `context` are of this moment
        ("context", np.float64),  # tokens held
        ("blocked_s", np.float64),  # it stands still until then
        ("planned_s", np.float64),  # when the completion that is not void is looked for
        ("version", np.int64),  # completions planned before are void
        ("count", np.int64),  # samples running
    ]
)
# A sample is complete when its engine reaches `due` steps.
PLACE = np.dtype([("due", np.float64), ("sample", np.int64)])
SAMPLE = np.dtype(
    [
        ("engine", np.int64),  # -1: none
        ("since", np.int64),  # in which order they came
        ("done", np.int64),  # tokens at the last arrival on an engine
        ("length", np.int64),  # true response length
        ("prompt", np.int64),
    ]
)
LOOK = np.dtype(
    [("at_s", np.float64), ("number", np.int64), ("engine", np.int64), ("version", np.int64)]
)
ENDED = np.dtype([("at_s", np.float64), ("engine", np.int64), ("sample", np.int64)])


class Engines(NamedTuple):
    """i engines, n samples, at most k on one engine. An engine's samples are in its first
    `count` places, the next to be complete last. `looks`: a heap of engines to be looked at, since
    a completion is foreseen then, unless plans have changed."""

    table: Floats  # step seconds by batch; beyond it `beyond_s` more per sample
    beyond_s: float
    context_s: float  # of a step, per token held
    engines: Records  # [i] ENGINE
    places: Records  # [i, k] PLACE
    samples: Records  # [n] SAMPLE
    looks: Records  # [h] LOOK
    sizes: Ints  # [3] entries in the heap, numbers given out, stretches in the log
    ended: Records  # [c] ENDED, completions found by the last call
    log: Floats  # [c, 6] stretches of decoding: engine, start, end, steps, batch, context


def make_engines(
    cost: CostModel, max_running: int, slow: Sequence[float], lengths: Sequence[int],
    prompts: Sequence[int], *, record: bool,
) -> Engines:  # fmt: skip
    """Empty ones, one per entry of `slow`, for samples 0, 1, ...; `record`: keep the log."""
    number, num = len(slow), len(prompts)
    most = max(1, min(max_running, num))
    engines = np.zeros(number, dtype=ENGINE)
    engines["slow"], engines["planned_s"] = slow, inf
    samples = np.zeros(num, dtype=SAMPLE)
    samples["engine"], samples["length"], samples["prompt"] = -1, lengths[:num], prompts
    return Engines(
        table=cost.step_table(max_running),
        beyond_s=float(cost.step_s(max_running + 1) - cost.step_s(max_running)),
        context_s=float(cost.decode_context_s),
        engines=engines,
        places=np.empty((number, most), dtype=PLACE),
        samples=samples,
        looks=np.empty(4 * number + 64, dtype=LOOK),
        sizes=np.zeros(3, dtype=np.int64),
        ended=np.empty(MOST_AT_ONCE + most, dtype=ENDED),
        log=np.empty((MOST_AT_ONCE + 64 if record else 0, 6)),
    )


# --- the heap ------------------------------------------------------------------------------


@numba.njit(cache=True)
def _before(a, b):  # type: ignore[no-untyped-def]
    return a.at_s < b.at_s or (a.at_s == b.at_s and a.number < b.number)


@numba.njit(cache=True)
def _put(look, at_s, number, engine, version):  # type: ignore[no-untyped-def]
    look.at_s, look.number, look.engine, look.version = at_s, number, engine, version


@numba.njit(cache=True)
def _swap(a, b):  # type: ignore[no-untyped-def]
    at_s, number, engine, version = a.at_s, a.number, a.engine, a.version
    _put(a, b.at_s, b.number, b.engine, b.version)
    _put(b, at_s, number, engine, version)


@numba.njit(cache=True)
def _rise(looks, a):  # type: ignore[no-untyped-def]
    while a > 0 and _before(looks[a], looks[(a - 1) // 2]):
        _swap(looks[a], looks[(a - 1) // 2])
        a = (a - 1) // 2


@numba.njit(cache=True)
def _take_first(e):  # type: ignore[no-untyped-def]
    e.sizes[0] -= 1
    size, looks = e.sizes[0], e.looks
    _swap(looks[0], looks[size])
    a = 0
    while 2 * a + 1 < size:
        child = 2 * a + 1
        if child + 1 < size and _before(looks[child + 1], looks[child]):
            child += 1
        if not _before(looks[child], looks[a]):
            break
        _swap(looks[a], looks[child])
        a = child


@numba.njit(cache=True)
def _look_at(e, i, at_s):  # type: ignore[no-untyped-def]
    """Put the engine on the heap. Where that is full, void entries leave it first."""
    looks = e.looks
    if e.sizes[0] == len(looks):
        kept = 0
        for a in range(len(looks)):
            if looks[a].version == e.engines[looks[a].engine].version:
                _swap(looks[kept], looks[a])
                _rise(looks, kept)
                kept += 1
        e.sizes[0] = kept
    _put(looks[e.sizes[0]], at_s, e.sizes[1], i, e.engines[i].version)
    _rise(looks, e.sizes[0])
    e.sizes[0] += 1
    e.sizes[1] += 1


# --- one engine ----------------------------------------------------------------------------


@numba.njit(cache=True)
def _step_s(e, i, steps):  # type: ignore[no-untyped-def]
    """Mean seconds per step over the next `steps` steps."""
    m = e.engines[i]
    top = len(e.table) - 1
    if m.count <= top:
        base = m.slow * e.table[m.count]
    else:
        base = m.slow * e.table[top] + m.slow * e.beyond_s * (m.count - top)
    if e.context_s:
        base += m.slow * e.context_s * (m.context + 0.5 * steps * m.count)
    return base


@numba.njit(cache=True)
def _catch_up(e, i, now_s):  # type: ignore[no-untyped-def]
    """Bring the engine to the present."""
    m = e.engines[i]
    start_s = max(m.at_s, m.blocked_s)
    m.at_s = now_s
    if m.count == 0 or now_s <= start_s:
        return
    elapsed = now_s - start_s
    first = _step_s(e, i, 0.0)
    if e.context_s:
        # Exact: elapsed = base x + context_s (context x + batch x^2 / 2), solved for x.
        square = m.slow * e.context_s * m.count
        steps = 2.0 * elapsed / (first + (first * first + 2.0 * square * elapsed) ** 0.5)
    else:
        steps = elapsed / first
    if len(e.log):
        row = e.log[e.sizes[2]]
        row[0], row[1], row[2], row[3], row[4] = i, start_s, now_s, steps, m.count
        row[5] = m.context + 0.5 * steps * m.count
        e.sizes[2] += 1
    m.steps += steps
    m.context += steps * m.count


@numba.njit(cache=True)
def plan(e, i, now_s):  # type: ignore[no-untyped-def]
    """Foresee the engine's next completion, if nothing changes; it is up to date. One that has
    only been put off stays where it is: the engine is looked at when its old time comes."""
    m = e.engines[i]
    if m.count == 0:
        return
    steps = max(e.places[i, m.count - 1].due - m.steps, 0.0)
    at_s = max(now_s, m.blocked_s) + steps * _step_s(e, i, steps)
    if at_s < m.planned_s:
        m.version += 1
        m.planned_s = at_s
        _look_at(e, i, at_s)


@numba.njit(cache=True)
def block(e, i, now_s, from_s, seconds):  # type: ignore[no-untyped-def]
    """The worker does something that holds its engine up, from `from_s` on or later; returns when
    it starts."""
    _catch_up(e, i, now_s)
    m = e.engines[i]
    start_s = max(from_s, m.blocked_s)
    m.blocked_s = start_s + seconds * m.slow
    return start_s


@numba.njit(cache=True)
def _so_far(e, i, place):  # type: ignore[no-untyped-def]
    """Tokens of the sample in this place of an engine that is up to date."""
    p = e.places[i, place]
    length = e.samples[p.sample].length
    return min(int(length - p.due + e.engines[i].steps + 1e-6), length - 1)


@numba.njit(cache=True)
def report(e, i, now_s):  # type: ignore[no-untyped-def]
    """(sample, tokens) of the one that came first of those that run there."""
    _catch_up(e, i, now_s)
    first = 0
    for p in range(1, e.engines[i].count):
        mine, best = e.places[i, p].sample, e.places[i, first].sample
        if e.samples[mine].since < e.samples[best].since:
            first = p
    return e.places[i, first].sample, _so_far(e, i, first)


@numba.njit(cache=True)
def _add(e, i, number):  # type: ignore[no-untyped-def]
    """A sample comes to an engine that is up to date."""
    m, places, sample = e.engines[i], e.places[i], e.samples[number]
    due = m.steps + (sample.length - sample.done)
    place = m.count
    assert place < len(places)
    while place > 0:
        below = places[place - 1]
        if below.due > due or (below.due == due and below.sample > number):
            break
        places[place].due, places[place].sample = below.due, below.sample
        place -= 1
    places[place].due, places[place].sample = due, number
    m.count += 1
    m.context += sample.prompt + sample.done
    sample.engine, sample.since = i, e.sizes[1]
    e.sizes[1] += 1


@numba.njit(cache=True)
def _prefill(e, i, now_s, prefill_s):  # type: ignore[no-untyped-def]
    m = e.engines[i]
    start_s = now_s
    if prefill_s >= 0.0:
        start_s = max(now_s, m.blocked_s)
        m.blocked_s = start_s + prefill_s * m.slow
    plan(e, i, now_s)
    return start_s


@numba.njit(cache=True)
def arrive(e, i, now_s, number, prefill_s):  # type: ignore[no-untyped-def]
    """A sample comes; computing what it holds takes `prefill_s` (below 0: its cache comes with
    it). Returns when that starts."""
    _catch_up(e, i, now_s)
    _add(e, i, number)
    return _prefill(e, i, now_s, prefill_s)


@numba.njit(cache=True)
def arrive_all(e, i, now_s, samples, prefill_s):  # type: ignore[no-untyped-def]
    """`arrive`, of several together."""
    _catch_up(e, i, now_s)
    for number in samples:
        _add(e, i, number)
    return _prefill(e, i, now_s, prefill_s)


@numba.njit(cache=True)
def _remove(e, i, number):  # type: ignore[no-untyped-def]
    """A sample goes from an engine that is up to date: `done` says with how many tokens. Whether
    it was there."""
    m, places, sample = e.engines[i], e.places[i], e.samples[number]
    if sample.engine != i:
        return False
    kept = 0
    for p in range(m.count):
        if places[p].sample == number:
            sample.done = _so_far(e, i, p)
        else:
            places[kept].due, places[kept].sample = places[p].due, places[p].sample
            kept += 1
    m.count = kept
    m.context -= sample.prompt + sample.done
    sample.engine = -1
    if m.count == 0:
        m.context = 0.0
    return True


@numba.njit(cache=True)
def depart(e, i, now_s, number):  # type: ignore[no-untyped-def]
    """A sample goes. Whether it was there."""
    _catch_up(e, i, now_s)
    was_there = _remove(e, i, number)
    plan(e, i, now_s)
    return was_there


@numba.njit(cache=True)
def depart_all(e, i, now_s, samples):  # type: ignore[no-untyped-def]
    """`depart`, of several together. [n] whether each was there."""
    _catch_up(e, i, now_s)
    were_there = np.zeros(len(samples), np.bool_)
    for k in range(len(samples)):
        were_there[k] = _remove(e, i, samples[k])
    plan(e, i, now_s)
    return were_there


@numba.njit(cache=True)
def lose(e, i, now_s):  # type: ignore[no-untyped-def]
    """The worker is gone; `done` says how far its samples were."""
    _catch_up(e, i, now_s)
    m = e.engines[i]
    for p in range(m.count):
        sample = e.samples[e.places[i, p].sample]
        sample.done = _so_far(e, i, p)
        sample.engine = -1
    m.count, m.context, m.planned_s = 0, 0.0, np.inf
    m.version += 1


# --- all of them ---------------------------------------------------------------------------


@numba.njit(cache=True)
def run(e, bound_s, bound, most, until_s):  # type: ignore[no-untyped-def]
    """Complete samples in the order of time, up to the entry (`bound_s`, `bound`): until `most`
    are, or one is at `until_s` or later, or an engine has run empty. Returns (how many are in
    `ended`, which of them is the first of the last engine's, entries taken). The last engine looked
    at has no plan yet, since what is answered may change its batch."""
    found = first = taken = 0
    while e.sizes[0] > 0:
        look = e.looks[0]
        at_s, i, version = look.at_s, look.engine, look.version
        if at_s > bound_s or (at_s == bound_s and look.number > bound):
            break
        _take_first(e)
        taken += 1
        m = e.engines[i]
        if version != m.version:
            continue
        m.planned_s = np.inf
        _catch_up(e, i, at_s)
        before, reached = found, m.steps + 1e-6
        while m.count > 0 and e.places[i, m.count - 1].due <= reached:
            m.count -= 1
            number = e.places[i, m.count].sample
            sample, ended = e.samples[number], e.ended[found]
            m.context -= sample.prompt + sample.length
            sample.engine = -1
            ended.at_s, ended.engine, ended.sample = at_s, i, number
            found += 1
        if found > before:
            first = before
        full = found >= MOST_AT_ONCE or e.sizes[2] >= MOST_AT_ONCE
        answered = found >= most or at_s >= until_s or m.count == 0
        if full or (found > before and answered):
            break
        plan(e, i, at_s)
    return found, first, taken
