"""All clocks at once: least squares over every message that was waited for and every meeting.

Pairs of ranks (`profiler.clocks`) come first. Where pipelines meet in collectives, errors that add
up along each of them are smaller for all, and drift between them is seen by meetings early and
late in the step.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from rlhfuse.profiler.arrays import Floats
from rlhfuse.profiler.table import SpanTable
from rlhfuse.profiler.transfers import Meeting

USUAL_DRIFT = 1e-4  # seconds a second: what crystals stay below
# A message: when it was used, by how much it came too early, and whether it was waited for.
Points = list[tuple[float, float, bool]]
Shift = tuple[float, float]  # seconds to add at the timeline's start, and per second after it
_MOST_LANES = 256
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
    kept = {pair: _waited(points) for pair, points in slacks.items()}
    scatters = [_scatter(points[:, 1]) for points in kept.values() if len(points) > 2]
    if not scatters or count > _MOST_LANES:
        return still
    noise = max(float(np.median(scatters)), 1e-6)
    size = 2 * count + len(links)
    normal, wanted = np.zeros((size, size)), np.zeros(size)
    for (a, b), points in kept.items():
        latency = 2 * count + links[_link(a, b)]
        # slack + shift of b - shift of a = latency
        for time, slack in points:
            where = [places[b], count + places[b], places[a], count + places[a], latency]
            row = np.array([1.0, time, -1.0, -time, -1.0]) / noise
            normal[np.ix_(where, where)] += np.outer(row, row)
            wanted[where] -= row * slack / noise
    for first, other, time, difference in _meetings(table, found):
        where = [other, count + other, first, count + first]
        row = np.array([1.0, time, -1.0, -time]) * _SURER / noise
        normal[np.ix_(where, where)] += np.outer(row, row)
        wanted[where] += row * difference * _SURER / noise
    normal[range(count, 2 * count), range(count, 2 * count)] += 1 / USUAL_DRIFT**2
    normal[0, 0] += 1e18
    normal[count, count] += 1e18
    normal[range(size), range(size)] += 1e-3  # lanes and links of which nothing is known
    solved = np.linalg.solve(normal, wanted)
    return {lane: (float(solved[i]), float(solved[count + i])) for lane, i in places.items()}


def _link(a: str, b: str) -> tuple[str, str]:
    return (a, b) if a < b else (b, a)


def _waited(points: Points) -> Floats:
    """(time, slack) [n, 2] of messages that were waited for, without those late for a reason of
    their own."""
    tight = np.array([(t, slack) for t, slack, waited in points if waited]).reshape(-1, 2)
    if not len(tight):
        return tight
    off = np.abs(tight[:, 1] - np.median(tight[:, 1]))
    kept: Floats = tight[off <= 4 * float(np.median(off)) + 1e-9]
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
