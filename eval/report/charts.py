"""Numbers -> the geometry of charts, in the units of an SVG's viewBox. The page draws and colours.

Charts are small (about as wide as a phone) and repeated, so that their text keeps its size on any
screen.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH = 340.0
LABEL_WIDTH = 92.0  # of bars: the model's name on the left, its value on the right
VALUE_WIDTH = 52.0
ROW_HEIGHT = 26.0
MAX_LABEL = 14  # characters
LINE_HEIGHT = 190.0
LEFT, RIGHT, TOP, BOTTOM = 40.0, 12.0, 10.0, 24.0  # margins of line charts
MAX_POINTS = 240  # of one line


@dataclass(frozen=True)
class Tick:
    """A labelled place on an axis."""

    at: float
    text: str


@dataclass(frozen=True)
class Bar:
    """One model's value: the bar, and the line from low to high."""

    label: str
    name: str
    color: int
    y: float
    x: float
    width: float
    low: float | None
    high: float | None
    value: str


@dataclass(frozen=True)
class BarChart:
    """Horizontal bars of several models."""

    bars: Sequence[Bar]
    ticks: Sequence[Tick]
    chance: float | None
    height: float
    width: float = WIDTH


@dataclass(frozen=True)
class Line:
    """One series: its points as an SVG polyline, its last point, and what it is called."""

    name: str
    style: str  # a class of the page's stylesheet
    points: str
    markers: Sequence[tuple[float, float]]
    last: str


@dataclass(frozen=True)
class LineChart:
    """One or two series over the steps of training."""

    title: str
    lines: Sequence[Line]
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    width: float = WIDTH
    height: float = LINE_HEIGHT
    left: float = LEFT
    right: float = WIDTH - RIGHT
    top: float = TOP
    bottom: float = LINE_HEIGHT - BOTTOM


def nice_ticks(low: float, high: float, number: int = 4) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that lie between low and high."""
    if not high > low:
        return [low]
    rough = (high - low) / number
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def short_number(value: float) -> str:
    """12, 0.25, 3,400, 12k: for axes."""
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def short_label(name: str) -> str:
    """A name that fits beside its bar; the end of a long one tells models apart better."""
    return name if len(name) <= MAX_LABEL else "…" + name[-(MAX_LABEL - 1) :]


def bar_chart(
    values: Sequence[tuple[str, int, float, float | None, float | None, str]],
    *,
    top: float,
    is_share: bool,
    chance: float | None = None,
) -> BarChart:
    """Bars for (name, colour, value, low, high, value as text); ``top`` is the axis' end."""
    left, right = LABEL_WIDTH, WIDTH - VALUE_WIDTH

    def x(value: float) -> float:
        return round(left + (right - left) * min(max(value / top, 0.0), 1.0), 1)

    bars = [
        Bar(
            label=short_label(name),
            name=name,
            color=color,
            y=TOP + index * ROW_HEIGHT,
            x=left,
            width=round(x(value) - left, 1),
            low=None if low is None else x(low),
            high=None if high is None else x(high),
            value=text,
        )
        for index, (name, color, value, low, high, text) in enumerate(values)
    ]
    places = [0.0, 0.5, 1.0] if is_share else nice_ticks(0.0, top, 3)
    ticks = [Tick(x(at), f"{at:.0%}" if is_share else short_number(at)) for at in places]
    height = TOP + len(bars) * ROW_HEIGHT + 18
    return BarChart(bars, ticks, None if chance is None else x(chance), height)


def thinned(points: Sequence[tuple[float, float]], number: int) -> list[tuple[float, float]]:
    """At most so many points: each the mean of a stretch, the last one kept as it is."""
    if len(points) <= number:
        return list(points)
    size = math.ceil(len(points) / (number - 1))
    body = points[:-1]
    stretches = [body[start : start + size] for start in range(0, len(body), size)]
    means = [
        (sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part))
        for part in stretches
    ]
    return [*means, points[-1]]


def line_chart(
    title: str, series: Sequence[tuple[str, str, Sequence[tuple[float, float]]]]
) -> LineChart:
    """Lines for (name, style, (step, value) points); at least one point in all."""
    steps = [x for _, _, points in series for x, _ in points]
    values = [y for _, _, points in series for _, y in points]
    first, last = min(steps), max(steps)
    low, high = min(values), max(values)
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    low, high = low - room, high + room
    right, bottom = WIDTH - RIGHT, LINE_HEIGHT - BOTTOM

    def x(step: float) -> float:
        share = (step - first) / (last - first) if last > first else 0.5
        return round(LEFT + (right - LEFT) * share, 1)

    def y(value: float) -> float:
        return round(bottom - (bottom - TOP) * (value - low) / (high - low), 1)

    lines = []
    for name, style, points in series:
        drawn = [(x(step), y(value)) for step, value in thinned(points, MAX_POINTS)]
        lines.append(
            Line(
                name=name,
                style=style,
                points=" ".join(f"{a:g},{b:g}" for a, b in drawn),
                markers=drawn if len(drawn) <= 40 and style == "held-out" else [],
                last=f"{points[-1][1]:.3g}",
            )
        )
    return LineChart(
        title=title,
        lines=lines,
        x_ticks=[Tick(x(at), short_number(at)) for at in nice_ticks(first, last, 4)],
        y_ticks=[Tick(y(at), short_number(at)) for at in nice_ticks(low, high, 4)],
    )
