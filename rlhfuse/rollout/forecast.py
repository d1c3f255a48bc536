"""When would generation and inference end? A fluid forecast, compiled, for one plan at a time.

Each instance steps all its samples together, so between two completions every sample advances at
one rate; free workers drain the scoring backlog. Plan: when at most `at_count` samples remain
(all of them: now), the samples of instances not in `keep` move to those in `keep`.
"""

import numba
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@numba.njit(cache=True)
def _completions(  # type: ignore[no-untyped-def]
    remaining, context, home, start, num_instances, table, context_s, finish
):
    """Fill `finish` for samples with remaining > 0; returns when each instance runs dry."""
    ends = start.copy()
    count = np.zeros(num_instances, np.int64)
    total = np.zeros(num_instances)
    level = np.zeros(num_instances)
    for j in range(len(home)):
        if remaining[j] > 0:
            count[home[j]] += 1
            total[home[j]] += context[j]
    for j in np.argsort(remaining):
        if remaining[j] <= 0:
            continue
        i = home[j]
        batch = min(count[i], len(table) - 1)
        steps = remaining[j] - level[i]
        if steps > 0:
            held = total[i] + 0.5 * steps * count[i]
            ends[i] += steps * (table[batch] * (count[i] / batch) + context_s * held)
            total[i] += steps * count[i]
            level[i] = remaining[j]
        finish[j] = ends[i]
        count[i] -= 1
        total[i] -= context[j] + remaining[j]
    return ends


@numba.njit(cache=True)
def _drain(free_at, arrive, work, backlog):  # type: ignore[no-untyped-def]
    """When free workers (from `free_at` on) have done `backlog` and what arrives, work-conserving:
    capacity spent by the end is the largest, over arrivals, of capacity before plus work after."""
    free = np.sort(free_at)
    order = np.argsort(arrive)
    after = work.sum()
    need = backlog + after
    index, spent, clock = 0, 0.0, 0.0
    for j in order:
        moment = arrive[j]
        while index < len(free) and free[index] <= moment:
            spent += index * max(0.0, free[index] - clock)
            clock = max(clock, free[index])
            index += 1
        spent += index * max(0.0, moment - clock)
        clock = max(clock, moment)
        need = max(need, spent + after)
        after -= work[j]
    while index < len(free):
        if index > 0 and spent + index * (free[index] - clock) >= need:
            break
        spent += index * max(0.0, free[index] - clock)
        clock = max(clock, free[index])
        index += 1
    return clock + max(0.0, need - spent) / max(index, 1)


@numba.njit(cache=True)
def _progress_at(moment, remaining, finish, home, start, num_instances, table, context_s, context):  # type: ignore[no-untyped-def]
    """Tokens that each instance adds to each of its samples until `moment`."""
    level = np.zeros(num_instances)
    count = np.zeros(num_instances, np.int64)
    total = np.zeros(num_instances)
    last = start.copy()
    for j in range(len(home)):
        if finish[j] <= moment:
            level[home[j]] = max(level[home[j]], remaining[j])
            last[home[j]] = max(last[home[j]], finish[j])
    for j in range(len(home)):
        if finish[j] > moment:
            count[home[j]] += 1
            total[home[j]] += context[j]
    for i in range(num_instances):
        if count[i] > 0 and moment > last[i]:
            batch = min(count[i], len(table) - 1)
            held = total[i] + level[i] * count[i]
            step = table[batch] * (count[i] / batch) + context_s * held
            level[i] += (moment - last[i]) / step
    return level


@numba.njit(cache=True)
def _assign(moving, home, keep, count, key):  # type: ignore[no-untyped-def]
    """Longest first to the kept instance with the fewest samples; `count` is updated."""
    for j in np.argsort(-key):
        if moving[j]:
            best = -1
            for i in range(len(keep)):
                if keep[i] and (best < 0 or count[i] < count[best]):
                    best = i
            home[j] = best
            count[best] += 1


@numba.njit(cache=True)
def _move(  # type: ignore[no-untyped-def]
    moment, left, context, home, start, keep, stall_token_s, stall_call_s
):
    """Re-home the samples with left > 0; returns (home, start of each instance after it)."""
    after = home.copy()
    count = np.zeros(len(keep), np.int64)
    moving = np.zeros(len(home), np.bool_)
    num_left, num_keep = 0, 0
    for i in range(len(keep)):
        num_keep += keep[i]
    for j in range(len(home)):
        num_left += left[j] > 0
    most = (num_left + num_keep - 1) // num_keep
    for j in range(len(home)):
        if left[j] > 0:
            if keep[home[j]] and count[home[j]] < most:
                count[home[j]] += 1
            else:
                moving[j] = True
    _assign(moving, after, keep, count, left)
    begin = np.maximum(start, moment)
    called = np.zeros(len(keep), np.bool_)
    for j in range(len(home)):
        if moving[j]:
            begin[after[j]] += stall_token_s * context[j]
            if not called[after[j]]:
                begin[after[j]] += stall_call_s
                called[after[j]] = True
    return after, begin


@numba.njit(cache=True)
def _ends_with_move(  # type: ignore[no-untyped-def]
    remaining, context, home, busy, keep, at_count, table, context_s, stall_token_s,
    stall_call_s, finish,
):  # fmt: skip
    """As `_completions`, with the move: `finish` holds the times without it and is updated."""
    num, instances = len(home), len(keep)
    moment = 0.0 if at_count >= num else np.sort(finish)[num - at_count - 1]
    level = _progress_at(
        moment, remaining, finish, home, busy, instances, table, context_s, context
    )
    left = np.zeros(num)
    held = context.copy()
    dry = busy.copy()
    for j in range(num):
        if finish[j] > moment:
            left[j] = max(remaining[j] - level[home[j]], 1e-9)
            held[j] += remaining[j] - left[j]
        dry[home[j]] = max(dry[home[j]], min(moment, finish[j]))
    after, begin = _move(moment, left, held, home, busy, keep, stall_token_s, stall_call_s)
    later = _completions(left, held, after, begin, instances, table, context_s, finish)
    for j in range(num):
        if left[j] > 0:
            dry[after[j]] = later[after[j]]
    return dry


@numba.njit(cache=True)
def _free_from(ends, alive, block):  # type: ignore[no-untyped-def]
    """When each worker can score: a block is free when its last member is, if all are alive."""
    free = np.empty(len(alive))
    number = 0
    for first in range(0, len(alive), block):
        end = min(first + block, len(alive))
        if np.all(alive[first:end]):
            free[number : number + end - first] = np.max(ends[first:end])
            number += end - first
    return free[:number]


@numba.njit(cache=True)
def _one_end(  # type: ignore[no-untyped-def]
    remaining, context, home, busy, alive, keep, at_count, table, context_s, stall_token_s,
    stall_call_s, score_token_s, last_token_s, backlog, block,
):  # fmt: skip
    finish = np.zeros(len(home))
    ends = _completions(remaining, context, home, busy, len(alive), table, context_s, finish)
    if at_count > 0:
        ends = _ends_with_move(
            remaining, context, home, busy, keep, at_count, table, context_s, stall_token_s,
            stall_call_s, finish,
        )  # fmt: skip
    work = score_token_s * (context + remaining)
    end = _drain(_free_from(ends, alive, block), finish, work, backlog)
    last = np.argmax(finish)
    return max(end, finish[last] + last_token_s * (context[last] + remaining[last]))


@numba.njit(cache=True)
def end_s(  # type: ignore[no-untyped-def]
    remaining, context, home, busy, alive, keep, at_count, table, context_s, stall_token_s,
    stall_call_s, score_token_s, last_token_s, backlog, block,
):  # fmt: skip
    """Mean over scenarios of the seconds until everything is generated and scored.

    remaining [m, n] tokens to come; context [n] tokens held; home [n] instance; busy [i] seconds
    until each worker has done what it was given; alive, keep [i]; at_count: see the module, 0 for
    no move; table [b] step seconds by batch; score_token_s summed over roles; last_token_s the
    dearest role's; backlog in worker seconds.
    """
    total = 0.0
    for m in range(len(remaining)):
        total += _one_end(
            remaining[m], context, home, busy, alive, keep, at_count, table, context_s,
            stall_token_s, stall_call_s, score_token_s, last_token_s, backlog, block,
        )  # fmt: skip
    return total / len(remaining)


def warm_up() -> None:
    """Compile (or load from the cache) before the first decision is needed: seconds, once."""
    ones, zero = np.ones(1), np.zeros(1, dtype=np.int64)
    yes = np.ones(1, dtype=np.bool_)
    table = np.ones(2)
    end_s(ones[None], ones, zero, ones, yes, yes, 1, table, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1)
