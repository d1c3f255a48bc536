"""When would everything be generated and scored? A fluid forecast, compiled, one plan at a time.

Each instance steps all its samples together, so between two completions every sample advances at
one rate; free blocks drain the scoring backlog. Plan: when at most `at_count` samples remain
(all of them: now), the samples of instances not in `keep` move to those in `keep`.

Linear in the samples once each scenario is sorted: thousands of plans a second at a thousand
samples. Two shortcuts make it so: after a move samples are still taken in the order of their
remaining lengths before it, and arrivals at the scorers fall into `BINS` equal stretches of time.
"""

from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
BINS = 512


class State(NamedTuple):
    """One moment, as the forecast needs it. n samples, i instances, s scorers (blocks), m
    scenarios, g groups."""

    remaining: Floats  # [m, n] tokens to come
    order: Ints  # [m, n] samples by remaining
    context: Floats  # [n] tokens held
    home: Ints  # [n]
    busy_s: Floats  # [i] until the worker has done what it was given
    slow: Floats  # [i] seconds of a step over what the table says
    usable: Bools  # [s] whether the block can score
    block: int
    load_s: Floats  # [s] until a model is loaded once the block is free
    table: Floats  # [b] step seconds by batch
    context_s: float  # of a step, per token of context
    stall_s: Floats  # [n] receiver seconds if the sample moves
    stall_call_s: float
    score_token_s: float  # summed over roles
    last_token_s: float  # the dearest role's
    backlog_s: float  # scoring that no worker has been given
    group: Ints  # [n]; used where train_token_s > 0
    group_tokens: Floats  # [g] tokens of finished siblings
    train_token_s: float


@numba.njit(cache=True)
def _completions(state, order, remaining, context, home, start, finish):  # type: ignore[no-untyped-def]
    """Fill `finish` for samples with remaining > 0; returns when each instance runs dry."""
    table, context_s, slow = state.table, state.context_s, state.slow
    num_instances = len(start)
    ends = start.copy()
    count = np.zeros(num_instances, np.int64)
    total = np.zeros(num_instances)
    level = np.zeros(num_instances)
    top = len(table) - 1
    for j in range(len(home)):
        if remaining[j] > 0:
            count[home[j]] += 1
            total[home[j]] += context[j]
    for j in order:
        if remaining[j] <= 0:
            continue
        i = home[j]
        batch = min(count[i], top)
        steps = remaining[j] - level[i]
        if steps > 0:
            held = total[i] + 0.5 * steps * count[i]
            step = table[batch] * (count[i] / batch) + context_s * held
            ends[i] += steps * slow[i] * step
            total[i] += steps * count[i]
            level[i] = remaining[j]
        finish[j] = ends[i]
        count[i] -= 1
        total[i] -= context[j] + remaining[j]
    return ends


@numba.njit(cache=True)
def _need(arrival, work, end):  # type: ignore[no-untyped-def]
    """Work by bin of arrival, over [0, end]."""
    bins = np.zeros(BINS + 1)
    scale = BINS / end if end > 0 else 0.0
    for j in range(len(arrival)):
        bins[min(int(arrival[j] * scale) + 1, BINS)] += work[j]
    return bins


@numba.njit(cache=True)
def _drain(free_at, bins, width, backlog):  # type: ignore[no-untyped-def]
    """When free scorers (from `free_at` on) have done `backlog` and what arrives, work-conserving:
    capacity spent by the end is the largest, over arrivals, of capacity before plus work after."""
    free = np.sort(free_at)
    after = bins.sum()
    need = backlog + after
    index, spent, clock = 0, 0.0, 0.0
    for b in range(len(bins)):
        if bins[b] <= 0:
            continue
        moment = b * width
        while index < len(free) and free[index] <= moment:
            spent += index * max(0.0, free[index] - clock)
            clock = max(clock, free[index])
            index += 1
        spent += index * max(0.0, moment - clock)
        clock = max(clock, moment)
        need = max(need, spent + after)
        after -= bins[b]
    while index < len(free):
        if index > 0 and spent + index * (free[index] - clock) >= need:
            break
        spent += index * max(0.0, free[index] - clock)
        clock = max(clock, free[index])
        index += 1
    return clock + max(0.0, need - spent) / max(index, 1)


@numba.njit(cache=True)
def _progress_at(state, moment, remaining, finish):  # type: ignore[no-untyped-def]
    """Tokens that each instance adds to each of its samples until `moment`."""
    home, table, start = state.home, state.table, state.busy_s
    num_instances = len(start)
    level = np.zeros(num_instances)
    count = np.zeros(num_instances, np.int64)
    total = np.zeros(num_instances)
    last = start.copy()
    for j in range(len(home)):
        i = home[j]
        if finish[j] <= moment:
            level[i] = max(level[i], remaining[j])
            last[i] = max(last[i], finish[j])
        else:
            count[i] += 1
            total[i] += state.context[j]
    for i in range(num_instances):
        if count[i] > 0 and moment > last[i]:
            batch = min(count[i], len(table) - 1)
            held = total[i] + level[i] * count[i]
            step = table[batch] * (count[i] / batch) + state.context_s * held
            level[i] += (moment - last[i]) / (step * state.slow[i])
    return level


@numba.njit(cache=True)
def _move(state, moment, order, left, keep):  # type: ignore[no-untyped-def]
    """Re-home the samples with left > 0, the longest to different instances; returns (home, start
    of each instance after it)."""
    after = state.home.copy()
    num, instances = len(after), len(keep)
    count = np.zeros(instances, np.int64)
    stays = np.zeros(num, np.bool_)
    num_left, num_keep = 0, 0
    kept = np.zeros(instances, np.int64)
    for i in range(instances):
        if keep[i]:
            kept[num_keep] = i
            num_keep += 1
    for j in range(num):
        num_left += left[j] > 0
    most = (num_left + num_keep - 1) // num_keep
    begin = np.maximum(state.busy_s, moment)
    for j in order:
        if left[j] > 0 and keep[after[j]] and count[after[j]] < most:
            count[after[j]] += 1
            stays[j] = True
    called = np.zeros(instances, np.bool_)
    pointer = 0
    for back in range(num):
        j = order[num - 1 - back]
        if left[j] > 0 and not stays[j]:
            while count[kept[pointer]] >= most:
                pointer = (pointer + 1) % num_keep
            i = kept[pointer]
            pointer = (pointer + 1) % num_keep
            after[j] = i
            count[i] += 1
            begin[i] += state.stall_s[j]
            if not called[i]:
                begin[i] += state.stall_call_s
                called[i] = True
    return after, begin


@numba.njit(cache=True)
def _ends_with_move(state, order, remaining, keep, at_count, finish):  # type: ignore[no-untyped-def]
    """As `_completions`, with the move: `finish` holds the times without it and is updated."""
    num = len(remaining)
    home = state.home
    left = remaining.copy()
    held = state.context.copy()
    dry = state.busy_s.copy()
    moment = 0.0
    if at_count < num:
        moment = np.partition(finish, num - at_count - 1)[num - at_count - 1]
        level = _progress_at(state, moment, remaining, finish)
        for j in range(num):
            left[j] = 0.0
            if finish[j] > moment:
                left[j] = max(remaining[j] - level[home[j]], 1e-9)
                held[j] += remaining[j] - left[j]
            dry[home[j]] = max(dry[home[j]], min(moment, finish[j]))
    after, begin = _move(state, moment, order, left, keep)
    later = _completions(state, order, left, held, after, begin, finish)
    for j in range(num):
        if left[j] > 0:
            dry[after[j]] = later[after[j]]
    return dry


@numba.njit(cache=True)
def _free_from(state, ends):  # type: ignore[no-untyped-def]
    """When each usable block can score: when its last member is dry and a model is loaded."""
    free = np.empty(len(state.usable))
    number = 0
    for s in range(len(state.usable)):
        if state.usable[s]:
            first = s * state.block
            free[number] = ends[first : first + state.block].max() + state.load_s[s]
            number += 1
    return free[:number]


@numba.njit(cache=True)
def _scored_at(state, finish, remaining, free):  # type: ignore[no-untyped-def]
    """When all is scored, and trained where groups are."""
    num = len(finish)
    final = state.context + remaining
    last = np.argmax(finish)
    end = finish[last]
    width = end / BINS
    bins = _need(finish, state.score_token_s * final, end)
    alone = end + state.last_token_s * final[last]
    if state.train_token_s > 0:
        ready = np.zeros(len(state.group_tokens))
        tokens = state.group_tokens.copy()
        for j in range(num):
            ready[state.group[j]] = max(ready[state.group[j]], finish[j])
            tokens[state.group[j]] += final[j]
        bins += _need(ready, state.train_token_s * tokens, end)
        alone += state.train_token_s * tokens[state.group[last]]
        # One scorer trains a group from beginning to end, however many are free.
        alone = max(alone, (ready + state.train_token_s * tokens).max())
    return max(_drain(free, bins, width, state.backlog_s), alone)


@numba.njit(cache=True)
def end_s(state, keep, at_count):  # type: ignore[no-untyped-def]
    """Mean over scenarios of the seconds until everything is generated, scored and trained.
    keep [i] instances; at_count: see the module, 0 for no move."""
    total = 0.0
    scenarios = len(state.remaining)
    for m in range(scenarios):
        remaining, order = state.remaining[m], state.order[m]
        finish = np.zeros(len(remaining))
        if at_count < len(remaining):
            ends = _completions(
                state, order, remaining, state.context, state.home, state.busy_s, finish
            )
        if at_count > 0:
            ends = _ends_with_move(state, order, remaining, keep, at_count, finish)
        total += _scored_at(state, finish, remaining, _free_from(state, ends))
    return total / scenarios


def warm_up() -> None:
    """Compile (or load from the cache) before the first decision is needed: seconds, once."""
    ones, zero = np.ones(1), np.zeros(1, dtype=np.int64)
    yes = np.ones(1, dtype=np.bool_)
    state = State(
        remaining=ones[None],
        order=zero[None],
        context=ones,
        home=zero,
        busy_s=ones,
        slow=ones,
        usable=yes,
        block=1,
        load_s=ones,
        table=np.ones(2),
        context_s=0.0,
        stall_s=ones,
        stall_call_s=0.0,
        score_token_s=0.0,
        last_token_s=0.0,
        backlog_s=0.0,
        group=zero,
        group_tokens=ones,
        train_token_s=0.0,
    )
    end_s(state, yes, 1)
