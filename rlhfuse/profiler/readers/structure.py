"""Pipeline tasks told from kernels and messages alone, where nobody labelled them.

Autograd launches backward kernels from threads of its own, so a kernel's launching thread says
forward or backward. A stage sends its result as soon as it is computed, and computes nothing whose
input has not come: the k-th send after forward kernels ends the k-th forward pass, and so on. What
is found is kept only if it explains every message of every rank; a schedule of which that cannot
be said (chunks of several stages on one rank, a weight gradient split off) is not guessed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from rlhfuse.profiler.arrays import Bools, Floats, Ints
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
    for number, chain in enumerate(chains):
        name = "model" if len(chains) == 1 else f"replica{number}"
        links = [_Link.between(ranks[a], a, ranks[b], b) for a, b in pairwise(chain)]
        for stage, rank in enumerate(chain):
            before = links[stage - 1] if stage else None
            after = links[stage] if stage < len(links) else None
            try:
                found[rank] = _stage_tasks(ranks[rank], name, stage, before, after)
            except ValueError as error:
                raise ValueError(f"rank {rank}: {error}") from error
    return found


def _chains(ranks: Mapping[int, Traffic]) -> list[list[int]]:
    """Ranks in the order of their stages, per pipeline."""
    peers = {rank: set(traffic.peer.tolist()) for rank, traffic in ranks.items()}
    silent = [rank for rank, mine in peers.items() if not mine]
    if silent:
        raise ValueError(f"rank {silent[0]} exchanges no messages")
    absent = sorted(set().union(*peers.values()) - set(peers))
    if absent:
        raise ValueError(f"the pipeline's ranks {absent} are not in the trace")
    if any(len(mine) > 2 for mine in peers.values()):
        raise ValueError("a rank exchanges messages with more than two others")
    chains, seen = [], set[int]()
    for rank in sorted(peers):
        if len(peers[rank]) == 1 and rank not in seen:
            chain = _walk(peers, rank)
            chains.append(chain if _is_ahead(ranks[chain[0]], chain[1]) else chain[::-1])
            seen |= set(chain)
    if seen != set(peers):
        raise ValueError("messages go round in a circle (several chunks on each rank?)")
    return chains


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


def _stage_tasks(
    traffic: Traffic, name: str, stage: int, before: _Link | None, after: _Link | None
) -> list[Found]:
    forward, backward = ~traffic.backward, traffic.backward
    counts = {len(link.down_sent) for link in (before, after) if link is not None}
    counts |= {len(link.up_sent) for link in (before, after) if link is not None}
    if len(counts) != 1:
        raise ValueError(f"its links carry {sorted(counts)} results and gradients: not one each")
    (count,) = counts
    needed = before.down_came if before is not None else None
    made = after.down_sent if after is not None else None
    tasks = _tasks(traffic, forward, count, needed, made, "forward")
    grads = _tasks(
        traffic,
        backward,
        count,
        after.up_came if after is not None else None,
        before.up_sent if before is not None else None,
        "backward",
    )
    found = [Found(Kind.F, name, stage, i, a, b) for i, (a, b) in enumerate(tasks)]
    found += [Found(Kind.B, name, stage, i, a, b) for i, (a, b) in enumerate(grads)]
    found.sort(key=lambda task: task.start_s)
    for one, other in pairwise(found):
        if other.start_s < one.end_s - _SLACK_S:
            raise ValueError(f"{one} and {other} would overlap")
    return found


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
