"""Pipeline tasks told from kernels and messages alone, where nobody labelled them.

Autograd launches backward kernels from threads of its own, so a kernel's launching thread says
forward or backward. A stage sends its result as soon as it is computed, and computes nothing whose
input has not come: the k-th send after forward kernels ends the k-th forward pass, and so on. Where
messages go round in a circle, ranks have several chunks: they are taken to have had turns as in
Megatron's interleaved schedule, and the messages from the last rank to the first must agree. What
is found is kept only if it explains every message of every rank; what cannot be told so (a weight
gradient split off, chunks on two ranks) is not guessed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from rlhfuse.profiler.arrays import Bools, Floats, Ints
from rlhfuse.schedules.ir import Op, Pipeline, Problem
from rlhfuse.timeline import Kind

_SLACK_S = 2e-5
_NEGLIGIBLE = 0.01  # runs of kernels shorter than this share of a task are not one


@dataclass(frozen=True, slots=True)
class Traffic:
    """One rank's computing kernels by start, and its messages by start; seconds of its own clock.

    `backward` [kernels]: launched by autograd. `peer`, `sends`, `first_s`, `last_s` [messages].
    """

    start_s: Floats
    end_s: Floats
    backward: Bools
    peer: Ints
    sends: Bools
    first_s: Floats
    last_s: Floats

    def within(self, begin_s: float, finish_s: float) -> "Traffic":
        """What starts in a window."""
        mine = (self.start_s >= begin_s) & (self.start_s < finish_s)
        said = (self.first_s >= begin_s) & (self.first_s < finish_s)
        return Traffic(
            self.start_s[mine],
            self.end_s[mine],
            self.backward[mine],
            self.peer[said],
            self.sends[said],
            self.first_s[said],
            self.last_s[said],
        )


@dataclass(frozen=True, slots=True)
class Found:
    """One task of a rank's stage; seconds of the rank's clock."""

    kind: Kind
    pipeline: str
    stage: int
    microbatch: int
    start_s: float
    end_s: float

    def __str__(self) -> str:
        return f"{self.pipeline}:{self.stage}{self.kind.value}{self.microbatch}"


def find_tasks(ranks: Mapping[int, Traffic]) -> dict[int, list[Found]]:
    """The tasks of one training step, per rank.

    Raises:
        ValueError: structure does not tell them, and why.
    """
    chains = _chains(ranks)
    found = {}
    for number, (chain, circle) in enumerate(chains):
        name = "model" if len(chains) == 1 else f"replica{number}"
        links = [_Link.between(ranks[a], a, ranks[b], b) for a, b in pairwise(chain)]
        ends = [None, *links, None]
        passes = []
        for rank, before, after in zip(chain, ends, ends[1:], strict=False):
            try:
                passes.append(_passes(ranks[rank], before, after))
            except ValueError as error:
                raise ValueError(f"rank {rank}: {error}") from error
        if circle:
            a, b = chain[-1], chain[0]
            orders = _chunk_orders(passes, _Link.between(ranks[a], a, ranks[b], b))
        else:
            orders = [
                [[(stage, k) for k in range(len(mine[0]))]] * 2 for stage, mine in enumerate(passes)
            ]
        for rank, mine, order in zip(chain, passes, orders, strict=True):
            found[rank] = _in_order(name, mine, order)
    return found


def _chains(ranks: Mapping[int, Traffic]) -> list[tuple[list[int], bool]]:
    """Ranks in the order of their stages, per pipeline; and whether the last one's results go to
    the first, as they do where each rank has several chunks of the model."""
    peers = {rank: set(traffic.peer.tolist()) for rank, traffic in ranks.items()}
    silent = [rank for rank, mine in peers.items() if not mine]
    if silent:
        raise ValueError(f"rank {silent[0]} exchanges no messages")
    for rank, mine in peers.items():
        if rank in mine:
            raise ValueError(f"rank {rank} exchanges messages with itself")
    absent = sorted(set().union(*peers.values()) - set(peers))
    if absent:
        raise ValueError(f"the pipeline's ranks {absent} are not in the trace")
    if any(len(mine) > 2 for mine in peers.values()):
        raise ValueError("a rank exchanges messages with more than two others")
    chains, seen = [], set[int]()
    for rank in sorted(peers, key=lambda rank: (len(peers[rank]), rank)):
        if rank in seen:
            continue
        chain, circle = _walk(peers, rank), len(peers[rank]) == 2
        seen |= set(chain)
        if circle:
            chain = _opened(ranks, chain)
        chains.append((chain if _is_ahead(ranks[chain[0]], chain[1]) else chain[::-1], circle))
    return sorted(chains, key=lambda found: min(found[0]))


def _opened(ranks: Mapping[int, Traffic], ring: list[int]) -> list[int]:
    """A circle cut at the link that carries least: one chunk's results go nowhere from there."""
    counts = [
        int((ranks[a].peer == b).sum()) for a, b in zip(ring, [*ring[1:], ring[0]], strict=True)
    ]
    least = min(counts)
    if counts.count(least) > 1 or len(set(counts)) != 2:
        raise ValueError(f"messages go round in a circle, {counts} on its links")
    cut = counts.index(least) + 1
    return ring[cut:] + ring[:cut]


def _walk(peers: Mapping[int, set[int]], rank: int) -> list[int]:
    chain = [rank]
    while following := peers[chain[-1]] - set(chain):
        chain.append(following.pop())
    return chain


def _is_ahead(traffic: Traffic, peer: int) -> bool:
    """Whether this rank's first message to `peer` was over before the first that came back."""
    own = traffic.peer == peer
    there, back = traffic.last_s[own & traffic.sends], traffic.last_s[own & ~traffic.sends]
    return len(there) > 0 and (len(back) == 0 or float(there.min()) < float(back.min()))


@dataclass(frozen=True, slots=True)
class _Link:
    """Messages between two stages, per micro-batch: when each was sent, and when it had come.

    `down`: results to the later stage; `up`: gradients to the earlier one; [micro-batches].
    """

    down_sent: Floats
    down_came: Floats
    up_sent: Floats
    up_came: Floats

    @staticmethod
    def between(early: Traffic, a: int, late: Traffic, b: int) -> "_Link":
        down_sent, down_came = _messages(early, a, late, b)
        up_sent, up_came = _messages(late, b, early, a)
        return _Link(down_sent, down_came, up_sent, up_came)


def _messages(source: Traffic, a: int, target: Traffic, b: int) -> tuple[Floats, Floats]:
    """When each result left rank `a` and had come to `b`; a shape sent ahead of a tensor, with
    nothing computed between, is one message with it."""
    sent = np.sort(source.first_s[(source.peer == b) & source.sends])
    came = np.sort(target.last_s[(target.peer == a) & ~target.sends])
    if len(sent) != len(came) or not len(sent):
        raise ValueError(f"{len(sent)} messages left rank {a} for {b}, {len(came)} came")
    computed = np.searchsorted(source.start_s, sent)
    first = np.flatnonzero(np.diff(computed, prepend=-1) > 0)
    each = len(sent) // len(first)
    if each * len(first) != len(sent):
        raise ValueError(f"messages from rank {a} to {b} do not follow what it computed")
    return sent[first], came[each - 1 :: each]


_Passes = tuple[list[tuple[float, float]], list[tuple[float, float]]]  # forward, backward
_Order = list[list[tuple[int, int]]]  # forward, backward: (stage, micro-batch)


def _passes(traffic: Traffic, before: _Link | None, after: _Link | None) -> _Passes:
    """(start, end) of every forward and every backward pass of a rank, in order."""
    counts = {len(link.down_sent) for link in (before, after) if link is not None}
    counts |= {len(link.up_sent) for link in (before, after) if link is not None}
    if len(counts) != 1:
        raise ValueError(f"its links carry {sorted(counts)} results and gradients: not one each")
    (count,) = counts
    needed = before.down_came if before is not None else None
    made = after.down_sent if after is not None else None
    forward = _tasks(traffic, ~traffic.backward, count, needed, made, "forward")
    back = after.up_came if after is not None else None
    gone = before.up_sent if before is not None else None
    return forward, _tasks(traffic, traffic.backward, count, back, gone, "backward")


def _in_order(name: str, passes: _Passes, order: _Order) -> list[Found]:
    found = [
        Found(kind, name, stage, microbatch, start_s, end_s)
        for kind, mine, numbers in zip((Kind.F, Kind.B), passes, order, strict=True)
        for (start_s, end_s), (stage, microbatch) in zip(mine, numbers, strict=True)
    ]
    found.sort(key=lambda task: task.start_s)
    for one, other in pairwise(found):
        if other.start_s < one.end_s - _SLACK_S:
            raise ValueError(f"{one} and {other} would overlap")
    return found


def _chunk_orders(passes: Sequence[_Passes], around: _Link) -> list[_Order]:
    """Stage and micro-batch of every pass of every rank, if the chunks took turns as in Megatron's
    interleaved schedule; the messages from the last rank to the first say whether they did."""
    from rlhfuse.schedules.interleaved import interleaved  # loads the compiler

    ranks, total = len(passes), len(passes[0][0])
    count = total - len(around.down_sent)
    if count <= 0 or total % count:
        raise ValueError(f"{total} passes and {len(around.down_sent)} messages round the circle")
    pipe = Pipeline.make("model", list(range(ranks)), count, 1.0, 2.0)
    rows = interleaved(Problem(ranks, (pipe,)), total // count).rows
    orders = [
        [[(t.pp_stage, t.microbatch) for t in row if t.op is op] for op in (Op.F, Op.B)]
        for row in rows
    ]
    end, begin = total // count * ranks - 1, 0
    for op, source, target, sent, came in (
        (0, ranks - 1, 0, around.down_sent, around.down_came),
        (1, 0, ranks - 1, around.up_sent, around.up_came),
    ):
        # The last stage sends no result on, and the first one takes none; gradients the other way.
        nowhere, nothing = (end, begin) if op == 0 else (begin, end)
        made = _of(passes[source][op], orders[source][op], nowhere)
        used = _of(passes[target][op], orders[target][op], nothing)
        if not len(made) == len(used) == len(sent) == len(came):
            raise ValueError("messages round the circle are not one for each chunk's passes")
        # A result leaves before the next pass of its direction is over.
        ends = np.array([end_s for _, end_s in passes[source][op]])
        last = ends[np.searchsorted(ends, sent + _SLACK_S, side="right") - 1]
        if (last != made[:, 1]).any() or (used[:, 0] < came - _SLACK_S).any():
            raise ValueError("the chunks did not take turns as in the interleaved schedule")
    return orders


def _of(
    passes: Sequence[tuple[float, float]], order: Sequence[tuple[int, int]], but: int
) -> Floats:
    """(start, end) [n, 2] of the passes of all stages but one."""
    return np.array(
        [times for times, (stage, _) in zip(passes, order, strict=True) if stage != but]
    ).reshape(-1, 2)


def _tasks(
    traffic: Traffic,
    mine: Bools,
    count: int,
    came: Floats | None,
    sent: Floats | None,
    what: str,
) -> list[tuple[float, float]]:
    """(start, end) of each micro-batch's pass of one direction: what is computed after its input
    came and before its result was sent."""
    rows = np.flatnonzero(mine)
    if came is not None:  # nothing before the first input is part of a pass
        rows = rows[traffic.start_s[rows] >= came[0] - _SLACK_S]
    if not len(rows):
        raise ValueError(f"no {what} kernels (were launches recorded, with CPU activity?)")
    if sent is not None:
        of = np.searchsorted(sent, traffic.start_s[rows], side="right")
    else:
        of = _runs(traffic, rows, mine, count, came)
    spans = []
    for index in range(count):
        own = rows[of == index]
        if not len(own):
            raise ValueError(f"{what} {index}: a message, but nothing was computed for it")
        start_s, end_s = float(traffic.start_s[own].min()), float(traffic.end_s[own].max())
        if came is not None and start_s < came[index] - _SLACK_S:
            raise ValueError(f"{what} {index} would begin before its input came")
        if sent is not None and end_s > sent[index] + _SLACK_S:
            raise ValueError(f"{what} {index} would end after its result was sent")
        spans.append((start_s, end_s))
    rest = rows[of >= count]
    if what == "backward" and len(rest):
        late = float((traffic.end_s[rest] - traffic.start_s[rest]).sum())
        if late > _NEGLIGIBLE * sum(end - start for start, end in spans):
            raise ValueError("backward kernels run after the last gradient was sent")
    return spans


def _runs(traffic: Traffic, rows: Ints, mine: Bools, count: int, came: Floats | None) -> Ints:
    """The micro-batch of each row, where nothing is sent: by runs of kernels with none of the
    other direction between, else by the inputs' coming. Rows of no run get `count`."""
    starts = traffic.start_s[rows]
    last = np.inf
    if not traffic.backward[rows[0]]:
        # After the last backward pass comes the optimizer, not a forward pass.
        last = float(traffic.end_s[~mine].max(initial=-np.inf))
    turn = np.cumsum(np.diff(mine.astype(np.int8), prepend=0) > 0)[rows]
    turn[starts >= last] = 0  # of no run
    lengths = np.bincount(turn, weights=traffic.end_s[rows] - starts)
    lengths[0] = 0.0
    real = lengths > _NEGLIGIBLE * float(lengths.sum()) / count
    if int(real.sum()) == count:
        return np.where(real, np.cumsum(real) - 1, count)[turn]
    if came is None:
        raise ValueError(f"{int(real.sum())} runs of kernels for {count} micro-batches")
    middle = (traffic.start_s[rows, None] < came - _SLACK_S) & (
        traffic.end_s[rows, None] > came + _SLACK_S
    )
    if middle.any():
        raise ValueError("inputs come while it computes: its passes cannot be told apart")
    of = np.searchsorted(came, starts + _SLACK_S, side="right") - 1
    return np.where(starts < last, of, count)


def windows(cuts: Mapping[int, Sequence[float]]) -> list[dict[int, tuple[float, float]]]:
    """Per training step the window of each rank, its ranks' optimizer steps ending at `cuts`.

    Raises:
        ValueError: the ranks do not have equally many.
    """
    counts = {len(moments) for moments in cuts.values()}
    if len(counts) > 1:
        raise ValueError("the ranks have unequal numbers of optimizer steps")
    (count,) = counts
    edges = {rank: [-np.inf, *sorted(moments), np.inf] for rank, moments in cuts.items()}
    return [{rank: (own[i], own[i + 1]) for rank, own in edges.items()} for i in range(count + 1)]
