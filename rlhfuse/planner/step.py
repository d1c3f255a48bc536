"""One step from its parts: seconds by stage, a timeline of devices, idle time by cause."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from rlhfuse.profiler.attribution import attribute
from rlhfuse.profiler.causes import WORK
from rlhfuse.timeline import Kind, Span, Timeline


class StageSeconds(msgspec.Struct, frozen=True):
    """Wall time of one step. `inference` is what scoring adds after the last response; `other`:
    weights to the engines, optimizer states moved out of the way, the controller."""

    generation: float
    inference: float
    training: float
    other: float

    @property
    def step(self) -> float:
        return self.generation + self.inference + self.training + self.other


@dataclass(frozen=True, slots=True)
class Round:
    """One mini-batch as it runs: tasks on block ranks (lanes ``rank0`` ...), then the exchange of
    gradients and the optimizer on all."""

    tasks: Timeline
    makespan_s: float
    exchange_s: float


def joined(
    rollout: Timeline,
    rollout_s: float,
    rounds: Sequence[Round],
    weights_s: float,
    lane_of: Callable[[int], tuple[str, int]],
    lanes: int,
) -> Timeline:
    """The whole step on `lanes` devices. ``lane_of(i)`` gives the name of the device that shows
    instance i, and its rank in a training block."""
    named = {f"rank{i}": lane_of(i) for i in range(lanes)}
    spans = [
        msgspec.structs.replace(span, lane=named[span.lane][0])
        for span in rollout.spans
        if span.lane in named
    ]
    at_s = rollout_s
    for number, part in enumerate(rounds):
        by_rank: dict[str, list[Span]] = {}
        for span in part.tasks.spans:
            by_rank.setdefault(span.lane, []).append(span)
        done_s = at_s + part.makespan_s
        for lane, rank in named.values():
            for span in by_rank.get(f"rank{rank}", ()):
                spans.append(
                    Span(
                        lane,
                        at_s + span.start_s,
                        at_s + span.end_s,
                        span.kind,
                        span.name,
                        {**span.args, "round": number},
                    )
                )
            if part.exchange_s > 0:
                spans.append(
                    Span(lane, done_s, done_s + part.exchange_s, Kind.TRANSFER, "exchange")
                )
        at_s = done_s + part.exchange_s
    if weights_s > 0:
        spans += [
            Span(lane, at_s, at_s + weights_s, Kind.WEIGHTS, "weights")
            for lane, _ in named.values()
        ]
    return Timeline(tuple(spans))


def bubbles(timeline: Timeline) -> dict[str, float]:
    """Causes of everything that is not computing, as parts of all device time; largest first."""
    explained = attribute(timeline)
    total = explained.wall_s * len(explained.lanes) or 1.0
    shares = {
        cause.value: seconds / total
        for cause, seconds in explained.causes.items()
        if cause not in WORK
    }
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


_LETTERS = {
    Kind.GENERATE: "g",
    Kind.PREFILL: "g",
    Kind.SCORE: "s",
    Kind.MIGRATE: "m",
    Kind.WEIGHTS: "w",
    Kind.TRANSFER: "x",
    Kind.OPTIMIZER: "o",
}
LEGEND = "g generate, s score, A actor trains, C critic trains, x exchange, w weights, . idle"


def drawn(timeline: Timeline, wall_s: float, width: int = 64, most: int = 8) -> list[str]:
    """One line of `width` letters per device, at most `most` of them, on a scale of `wall_s`."""
    lanes = timeline.lanes
    step = -(-len(lanes) // most)
    rows = []
    for lane in lanes[::step]:
        covered: list[dict[str, float]] = [{} for _ in range(width)]
        for span in timeline.of_lane(lane):
            letter = _LETTERS.get(span.kind) or ("C" if span.name.startswith("critic") else "A")
            _cover(covered, span.start_s / wall_s * width, span.end_s / wall_s * width, letter)
        used = round(timeline.end_s / wall_s * width)
        cells = [_letter(column) if i < used else " " for i, column in enumerate(covered)]
        rows.append(f"{lane:>8} {''.join(cells)}")
    return rows


def _cover(columns: list[dict[str, float]], start: float, end: float, letter: str) -> None:
    for index in range(int(start), min(int(end) + 1, len(columns))):
        part = min(end, index + 1) - max(start, index)
        if part > 0:
            columns[index][letter] = columns[index].get(letter, 0.0) + part


def _letter(column: dict[str, float]) -> str:
    """What took most of a column; idle where more than two thirds of it was."""
    if sum(column.values()) < 1 / 3:
        return "."
    return max(column, key=lambda letter: column[letter])
