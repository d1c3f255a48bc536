"""Charts as SVG text: lines with bands, stacked bars, bars, histograms. Pure; all text escaped.

Colours that depend on the scheme (ink, rules) are CSS variables of the page.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

# View box units are pixels at the page's two usual widths: half of it, and all of it.
_HALF, _WHOLE = 520.0, 1120.0
_LETTER = 7.5  # width of a letter, with some room
_HEIGHT = 230.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 12.0, 10.0, 30.0

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Line:
    """One series; `dots` draws points only, joined by a thin line."""

    label: str
    color: str
    points: Points
    dots: bool = False


@dataclass(frozen=True, slots=True)
class Band:
    """The room between two series of equal abscissae."""

    label: str
    color: str
    low: Points
    high: Points


@dataclass(frozen=True, slots=True)
class Stack:
    """One layer of stacked bars: a value per bar."""

    label: str
    color: str
    values: Sequence[float]


@dataclass(frozen=True, slots=True)
class Bar:
    """One horizontal bar and what stands beside it."""

    label: str
    value: float
    color: str
    note: str


def line_chart(lines: Sequence[Line], bands: Sequence[Band], x_label: str, y_label: str) -> str:
    """Lines over steps. Points that are not finite are left out."""
    lines = [Line(x.label, x.color, _finite(x.points), x.dots) for x in lines]
    bands = [Band(b.label, b.color, _finite(b.low), _finite(b.high)) for b in bands]
    points = [p for line in lines for p in line.points]
    points += [p for band in bands for p in (*band.low, *band.high)]
    if not points:
        return ""
    scale = _Scale.of([x for x, _ in points], [y for _, y in points], _HALF)
    parts = [scale.frame(x_label, y_label)]
    for band in bands:
        corners = [*band.low, *reversed(band.high)]
        path = " ".join(f"{scale.x(x):.1f},{scale.y(y):.1f}" for x, y in corners)
        parts.append(f'<polygon points="{path}" fill="{band.color}" opacity=".18"/>')
    for line in lines:
        parts.append(_polyline(line, scale))
    labels = [(line.label, line.color) for line in lines] + [(b.label, b.color) for b in bands]
    return _figure(parts, labels, _HALF)


def stacked_bars(
    names: Sequence[str], stacks: Sequence[Stack], x_label: str, y_label: str, unit: str = ""
) -> str:
    """One bar per name, layers from the bottom up, each with its value as a tooltip."""
    if not names or not stacks:
        return ""
    tops = [sum(stack.values[i] for stack in stacks) for i in range(len(names))]
    scale = _Scale.of([-0.5, len(names) - 0.5], [0.0, max([*tops, 1e-9])], _WHOLE)
    parts = [scale.frame("", y_label, x_ticks=False)]
    wide = (scale.x(1) - scale.x(0)) * (0.82 if len(names) < 120 else 1.0)
    for i, name in enumerate(names):
        level = 0.0
        for stack in stacks:
            value = stack.values[i]
            if value > 0:
                top, bottom = scale.y(level + value), scale.y(level)
                parts.append(
                    f'<rect x="{scale.x(i) - wide / 2:.1f}" y="{top:.1f}" width="{wide:.1f}" '
                    f'height="{bottom - top:.2f}" fill="{stack.color}"><title>'
                    f"{escape(name)}: {escape(stack.label)} {value:.3g}{escape(unit)}"
                    "</title></rect>"
                )
                level += value
    every = max(1, math.ceil(len(names) / 24))
    for i in range(0, len(names), every):
        parts.append(_text(scale.x(i), _HEIGHT - 14, names[i].removeprefix("step "), "middle"))
    parts.append(_text(_WHOLE - _RIGHT, _HEIGHT - 2, x_label, "end"))
    return _figure(parts, [(stack.label, stack.color) for stack in stacks], _WHOLE)


def histogram(groups: Sequence[tuple[str, str, Sequence[int]]], x_label: str) -> str:
    """Counts of whole numbers in common bins, one outline per (label, colour, numbers)."""
    numbers = [n for _, _, values in groups for n in values]
    if not numbers:
        return ""
    width = max(1, math.ceil((max(numbers) + 1) / 40))
    bins = max(numbers) // width + 1
    outlines = []
    for label, color, values in groups:
        shares = [0.0] * bins
        for n in values:
            shares[n // width] += 100 / len(values)
        corners = [(b * width + e * width, s) for b, s in enumerate(shares) for e in (0, 1)]
        zero = [(x, 0.0) for x, _ in corners]
        outlines.append((Line(label, color, corners), Band("", color, zero, corners)))
    return line_chart(
        [line for line, _ in outlines], [band for _, band in outlines], x_label, "% of samples"
    )


def bars(rows: Sequence[Bar], label_width: float = 150) -> str:
    """Horizontal bars from zero; `label_width` is the room for their names."""
    if not rows:
        return ""
    most = max(max(row.value for row in rows), 1e-12)
    note_width = max(200, _LETTER * max(len(row.note) for row in rows) + 18)
    parts = []
    for i, row in enumerate(rows):
        y = 6 + i * 26
        long = max(1.0, row.value / most * (_WHOLE - label_width - note_width))
        parts.append(_text(label_width, y + 13, row.label, "end", small=False))
        parts.append(
            f'<rect x="{label_width + 10:.0f}" y="{y}" width="{long:.1f}" height="18" rx="2" '
            f'fill="{row.color}"/>'
        )
        parts.append(_text(label_width + 18 + long, y + 13, row.note, "start", small=False))
    return _svg(parts, _WHOLE, len(rows) * 26 + 10)


def nice_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from `low` to `high`, at most `most` + 1 of them."""
    span = high - low
    if not span > 0 or not math.isfinite(span):
        return [low]
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(m * power for m in (1, 2, 5, 10, 20) if span / (m * power) <= most)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclass(frozen=True, slots=True)
class _Scale:
    x_low: float
    x_high: float
    y_low: float
    y_high: float
    width: float

    @staticmethod
    def of(xs: Sequence[float], ys: Sequence[float], width: float) -> "_Scale":
        low, high = min(ys), max(ys)
        room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
        bottom = low if low == 0 else low - room
        left, right = min(xs), max(xs)
        if left == right:
            left, right = left - 1, right + 1
        return _Scale(left, right, bottom, high + room, width)

    def x(self, value: float) -> float:
        share = (value - self.x_low) / (self.x_high - self.x_low)
        return _LEFT + share * (self.width - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.y_low) / (self.y_high - self.y_low)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _BOTTOM - _TOP)

    def frame(self, x_label: str, y_label: str, x_ticks: bool = True) -> str:
        parts = []
        for tick in nice_ticks(self.y_low, self.y_high, 5):
            y = self.y(tick)
            parts.append(
                f'<line class="rule" x1="{_LEFT}" x2="{self.width - _RIGHT}" y1="{y:.1f}" '
                f'y2="{y:.1f}"/>'
            )
            parts.append(_text(_LEFT - 6, y + 4, _number(tick), "end"))
        for tick in nice_ticks(self.x_low, self.x_high, 8) if x_ticks else ():
            if tick == round(tick):
                parts.append(_text(self.x(tick), _HEIGHT - 14, _number(tick), "middle"))
        parts.append(_text(self.width - _RIGHT, _HEIGHT - 2, x_label, "end"))
        parts.append(
            f'<text class="label" text-anchor="middle" transform="translate(11 '
            f'{(_HEIGHT - _BOTTOM) / 2:.0f}) rotate(-90)">{escape(y_label)}</text>'
        )
        return "".join(parts)


def _polyline(line: Line, scale: _Scale) -> str:
    path = " ".join(f"{scale.x(x):.1f},{scale.y(y):.1f}" for x, y in line.points)
    width = 1.2 if line.dots else 2
    drawn = f'<polyline points="{path}" fill="none" stroke="{line.color}" stroke-width="{width}"/>'
    if line.dots or len(line.points) == 1:
        drawn += "".join(
            f'<circle cx="{scale.x(x):.1f}" cy="{scale.y(y):.1f}" r="3.6" fill="{line.color}">'
            f"<title>{escape(line.label)}, step {x:g}: {y:.4g}</title></circle>"
            for x, y in line.points
        )
    return drawn


def _finite(points: Points) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _figure(parts: Sequence[str], labels: Sequence[tuple[str, str]], width: float) -> str:
    keys = "".join(
        f'<li><span class="swatch" style="--c:{color}"></span>{escape(label)}</li>'
        for label, color in labels
        if label
    )
    picture = _svg(parts, width, _HEIGHT)
    return f'{picture}<ul class="keys">{keys}</ul>'


def _svg(parts: Sequence[str], width: float, height: float) -> str:
    drawn = (
        f'<svg class="chart" viewBox="0 0 {width:.0f} {height:.0f}" role="img">'
        f"{''.join(parts)}</svg>"
    )
    return f'<div class="wide">{drawn}</div>' if width == _WHOLE else drawn


def _text(x: float, y: float, text: str, anchor: str, small: bool = True) -> str:
    kind = "label" if small else "label big"
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _number(value: float) -> str:
    return f"{value:.10g}" if abs(value) >= 1e-9 else "0"
