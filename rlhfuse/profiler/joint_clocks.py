"""All clocks at once: least squares over every message that was waited for and every meeting.

Pairs of ranks (`profiler.clocks`) come first. Where pipelines meet in collectives, errors that add
up along each of them are smaller for all, and drift between them is seen by meetings early and
late in the step.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from rlhfuse.profiler.arrays import Bools, Floats
from rlhfuse.profiler.table import SpanTable
from rlhfuse.profiler.transfers import Meeting

USUAL_DRIFT = 1e-4  # seconds a second: what crystals stay below
# A message: when it was used, by how much it came too early, and whether it was waited for.
Points = list[tuple[float, float, bool]]
Shift = tuple[float, float]  # seconds to add at the timeline's start, and per second after it
_MOST_LANES = 256
_FEWEST = 3
_SLOWEST = 1.5  # times the quickest messages' latency
_TIE = 0.1  # of a message's weight
LOW, ROUNDS = 0.02, 20  # the expectile of latencies that is fitted, and rounds of fitting
_SURER = 5.0  # the ends of a collective scatter less than messages do, by this factor


def refined(
    table: SpanTable, slacks: Mapping[tuple[str, str], Points], found: Sequence[Meeting]
) -> dict[str, Shift]:
    """What to add to each lane of a timeline that is aligned already, but not exactly.

    Unknown are each lane's offset and drift (the first lane's are 0) and each link's latency,
    equal both ways; a drift beyond `USUAL_DRIFT` must be louder than the scatter. Zeros for more
    lanes than such a system should have.
    """
    places = {lane: place for place, lane in enumerate(table.lanes)}
    count = len(places)
    links = {pair: i for i, pair in enumerate(sorted({_link(a, b) for a, b in slacks}))}
    still = dict.fromkeys(places, (0.0, 0.0))
    kept = {(a, b): _waited(points, slacks.get((b, a), ())) for (a, b), points in slacks.items()}
    scatters = [_scatter(points[:, 1]) for points in kept.values() if len(points) > 2]
    if not scatters or count > _MOST_LANES:
        return still
    noise = max(float(np.median(scatters)), 1e-6)
    size = 2 * count + len(links)
    fixed = _Equations(size)
    for first, other, time, difference in _meetings(table, found):
        where = [other, count + other, first, count + first]
        weight = _SURER / noise
        fixed.add(where, np.array([1.0, time, -1.0, -time]) * weight, difference * weight)
    for a, b in links:  # a link whose messages say little stays as its pair of clocks was
        fixed.add([places[a], places[b]], np.array([_TIE, -_TIE]) / noise, 0.0)
    fixed.normal[range(count, 2 * count), range(count, 2 * count)] += 1 / USUAL_DRIFT**2
    fixed.normal[0, 0] += 1e18
    fixed.normal[count, count] += 1e18
    fixed.normal[range(size), range(size)] += 1e-3  # lanes and links of which nothing is known
    ends = [
        (places[a], places[b], 2 * count + links[_link(a, b)], time, slack)
        for (a, b), points in kept.items()
        for time, slack in points.tolist()
    ]
    solved = _solved(fixed, np.array(ends).reshape(-1, 5), count, noise)
    return {lane: (float(solved[i]), float(solved[count + i])) for lane, i in places.items()}


class _Equations:
    """Weighted equations between unknowns, as normal equations."""

    def __init__(self, size: int) -> None:
        self.normal = np.zeros((size, size))
        self.wanted = np.zeros(size)

    def add(self, where: Sequence[int], row: Floats, value: float) -> None:
        """``row * unknowns[where] = value``, all divided by what it may be off."""
        self.normal[np.ix_(where, where)] += np.outer(row, row)
        self.wanted[where] += row * value


def _solved(fixed: _Equations, ends: Floats, count: int, noise: float) -> Floats:
    """The unknowns; `ends` [messages, 5]: from, to, link, time, slack.

    Of each message: slack + shift of `to` - shift of `from` = latency, the quickest counting most.
    """
    source, target, link = (ends[:, i].astype(np.int64) for i in range(3))
    time, slack = ends[:, 3], ends[:, 4]
    where = np.stack([target, count + target, source, count + source, link], axis=1)
    one = np.ones(len(ends))
    rows = np.stack([one, time, -one, -time, -one], axis=1)
    products = rows[:, :, None] * rows[:, None, :]
    weight = one / noise**2
    solved: Floats = np.zeros(len(fixed.wanted), dtype=np.float64)
    for _ in range(ROUNDS):
        normal, wanted = fixed.normal.copy(), fixed.wanted.copy()
        np.add.at(normal, (where[:, :, None], where[:, None, :]), products * weight[:, None, None])
        np.add.at(wanted, where, -rows * (slack * weight)[:, None])
        solved = np.asarray(np.linalg.solve(normal, wanted), dtype=np.float64)
        late = slack + (rows * solved[where]).sum(axis=1) > 0
        weight = expectile(late, LOW) / noise**2
    return solved


def expectile(late: Bools, share: float) -> Floats:
    """Weights of an asymmetric least-squares fit (Newey and Powell, 1987), 1 on average where half
    are late: what came late says little of the shortest time that a message takes."""
    weights: Floats = 2 * np.where(late, share, 1 - share)
    return weights


def _link(a: str, b: str) -> tuple[str, str]:
    return (a, b) if a < b else (b, a)


def _waited(points: Points, back: Points | tuple[()]) -> Floats:
    """(time, slack) [n, 2] of messages that were waited for, without those late for a reason of
    their own: what they took at most is told by the quickest of the link, `back` included."""
    tight = np.array([(t, slack) for t, slack, waited in points if waited]).reshape(-1, 2)
    every = np.sort([slack for _, slack, waited in (*points, *back) if waited])
    if not len(tight):
        return tight
    usual = float(np.median(every[: max(_FEWEST, len(every) // 4)]))
    kept: Floats = tight[tight[:, 1] <= _SLOWEST * max(usual, 0.0) + 1e-9]
    return kept


def _scatter(values: Floats) -> float:
    return 1.5 * float(np.median(np.abs(values - np.median(values))))


def _meetings(
    table: SpanTable, found: Sequence[Meeting]
) -> Iterator[tuple[int, int, float, float]]:
    """(lane, other lane, when, how much later it ended on the first)."""
    for meeting in found:
        first, *others = (comm.row for comm in meeting.comms)
        for other in others:
            when = float(table.end_s[first]) - table.begin_s
            difference = float(table.end_s[first] - table.end_s[other])
            yield int(table.lane[first]), int(table.lane[other]), when, difference
