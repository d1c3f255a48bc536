"""A problem as list schedulers see it, in time's direction and against it."""

from typing import NamedTuple

import numpy as np

from rlhfuse.schedules.compiled import SLOT_B, SLOT_F, SLOT_W, Coded, Floats, Ints
from rlhfuse.schedules.ir import Problem
from rlhfuse.schedules.timing import channel_numbers

# Columns of `Flow.kind`: the id of the first task, how many there are, the rank, the kinds that
# make the input, that must come before on the same chain, and that take the output (-1 for none),
# the streams of output and input (one for each kind that sends to another rank, else -1), whether
# memory is claimed, the kind that gives it back, whether the output shares its channel.
FIRST, COUNT, RANK, UP, LOCAL, DOWN, SENDS, READS, OPENS, CLOSER, SHARED = range(11)
# Columns of `Flow.task`: the earliest start, the time that must pass after the end, memory claimed
# at the start, and memory held more after the end.
DURATION, EARLIEST, AFTER, CLAIM, NET = range(5)


class Flow(NamedTuple):
    """A problem as a list scheduler sees it; a *kind* is one slot of one chain.

    Task i of kind k has id ``first[k] + sign * i``. Against time inputs and outputs change places,
    the last micro-batch goes first, and memory is claimed by what gives it back.
    """

    sign: int  # 1 in time's direction, -1 against it
    kind: Ints  # [K, 11], columns FIRST to SHARED
    task: Floats  # [T, 5], columns DURATION to NET
    latency: Floats  # [K] delay of the input
    reserve: Floats  # [C] memory of the heaviest micro-batch
    kinds_first: Ints  # [num_ranks + 1] kinds of rank r: kinds[kinds_first[r]:kinds_first[r + 1]]
    kinds: Ints


def make_flow(problem: Problem, coded: Coded, late: Floats, *, reverse: bool) -> Flow:
    """The view of `coded` in time's direction, or against it; `late` [T] follows each task."""
    k, chain = np.arange(3 * coded.base.shape[0]), np.repeat(np.arange(coded.base.shape[0]), 3)
    slot, m, slots = k % 3, coded.num_mb[chain], coded.chain_slots[chain]
    count = np.where(slot < slots, m, 0)
    task = coded.base[chain] + slot * m  # the first of each kind
    here = count > 0
    source = np.where(here, _kind_of(coded, coded.pred[task]), -1)
    target = np.where(here & (slot < SLOT_W), _kind_of(coded, coded.succ[task]), -1)
    channel = np.where(here, channel_numbers(problem, coded)[task], -1)
    out = np.where(channel >= 0, k, -1)
    into = np.where(source >= 0, out[source], -1)
    out_latency = np.where(target >= 0, coded.latency[task[target]], 0.0)
    order = np.flatnonzero(here)
    order = order[np.argsort(coded.chain_rank[chain[order]], kind="stable")]
    claim, net, reserve = _memory(coded, reverse)
    split = slots > SLOT_W
    last = np.where(split, SLOT_W, slots - 1)
    waits = split & (slot == (SLOT_B if reverse else SLOT_W))
    senders = np.bincount(channel[channel >= 0], minlength=1)
    columns = {
        FIRST: task + (m - 1 if reverse else 0),
        COUNT: count,
        RANK: coded.chain_rank[chain],
        UP: target if reverse else source,
        LOCAL: np.where(waits, k + (1 if reverse else -1), -1),
        DOWN: source if reverse else target,
        SENDS: into if reverse else out,
        READS: out if reverse else into,
        OPENS: slot == (last if reverse else SLOT_F),
        CLOSER: 3 * chain + (SLOT_F if reverse else last),
    }
    columns[SHARED] = (channel >= 0) & (senders[channel] > 1)
    if reverse:
        columns[SHARED] = np.where(source >= 0, columns[SHARED][source], False)
    late, release = (coded.release, late) if reverse else (late, coded.release)
    return Flow(
        sign=-1 if reverse else 1,
        kind=np.stack([columns[i] for i in range(len(columns))], 1).astype(np.int64),
        task=np.stack([coded.duration, release, late, claim, net], 1),
        latency=out_latency if reverse else np.where(here, coded.latency[task], 0.0),
        reserve=reserve,
        kinds_first=np.searchsorted(
            coded.chain_rank[chain[order]], np.arange(coded.num_ranks + 1)
        ).astype(np.int64),
        kinds=order,
    )


def _kind_of(coded: Coded, tasks: Ints) -> Ints:
    return np.where(tasks >= 0, coded.kind[tasks], -1)


def _memory(coded: Coded, reverse: bool) -> tuple[Floats, Floats, Floats]:
    """Claim and net change of each task, and the largest claim of each chain.

    Only the first slot of a chain claims: at once the most that the micro-batch will ever hold.
    """
    most = np.zeros(coded.rank.shape[0])
    claim, net = most.copy(), most.copy()
    largest = np.zeros(coded.base.shape[0])
    for chain, (base, m, slots) in enumerate(
        zip(coded.base, coded.num_mb, coded.chain_slots, strict=True)
    ):
        f, b, w = (slice(base + s * m, base + (s + 1) * m) for s in range(3))
        level = coded.claim[f]
        kept = level + coded.change[b] if slots > SLOT_W else level
        most = np.maximum(level, kept)
        opener, closer = (f, (f, b, w)[slots - 1])
        if reverse:
            opener, closer = closer, opener
        claim[opener] = most
        net[opener] += most
        net[closer] -= most
        if slots > SLOT_W and not reverse:
            net[b] += kept - most
            net[w] -= kept - most
        largest[chain] = most.max()
    return claim, net, largest
