"""Line charts as inline SVG: pure functions from numbers to text.

Colors are classes of the page's style, so that they follow the screen's scheme. A wide chart is drawn a second time
for phones, because its labels would be too small when scaled down.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

Point = tuple[float, float]
Place = Callable[[Point], Point]  # from values to coordinates

MOST_POINTS = 600  # of a line; more than a screen shows
SMOOTHED_FROM = 20  # steps
WIDE, NARROW, HEIGHT = 900, 420, 250
LEFT, RIGHT, TOP, BOTTOM = 66, 14, 12, 30

STYLE = """
figure { margin: 0; padding: .7rem .7rem .3rem; border: 1px solid var(--line); border-radius: 8px; min-width: 0; }
figcaption { font-size: .9rem; } figcaption b { font-weight: 600; }
.legend { display: flex; flex-wrap: wrap; gap: 0 1rem; color: var(--muted); font-size: .85rem; }
.legend i { display: inline-block; width: .9rem; height: 0; border-top: 3px solid; margin-right: .35rem;
  vertical-align: middle; }
.legend i.dots { width: .5rem; height: .5rem; border: 0; border-radius: 50%; background: currentColor; }
svg { display: block; width: 100%; height: auto; } svg text { font-size: 13px; fill: var(--muted); }
svg .grid { stroke: var(--line); } svg path, svg .grid { fill: none; vector-effect: non-scaling-stroke; }
.faint { color: var(--first); opacity: .4; } .line { color: var(--first); } .dots { color: var(--second); }
svg path.faint, svg path.line, svg path.dots { stroke: currentColor; stroke-width: 1.8; stroke-linejoin: round; }
svg path.faint { stroke-width: 1.2; } svg circle { fill: var(--second); } svg circle.best { fill: var(--good); }
svg.narrow { display: none; }
@media (max-width: 40rem) { svg.wide { display: none; } svg.narrow { display: block; } }
"""


@dataclass(frozen=True)
class Series:
    """Points by ascending x. ``dots`` has a circle at each point; ``best`` is the x of a point to emphasize.

    The legend has the last value, or the ``peak``.
    """

    name: str
    points: Sequence[Point]
    kind: Literal["faint", "line", "dots"] = "line"
    best: float | None = None
    peak: bool = False

    @property
    def value(self) -> float:
        return max(y for _, y in self.points) if self.peak else self.points[-1][1]


def chart(title: str, unit: str, series: Sequence[Series], *, wide: bool = False, from_zero: bool = False) -> str:
    """A figure of lines over the steps; empty without two points. ``wide``: for the whole width of the page."""
    series = [each for each in series if each.points]
    if sum(len(each.points) for each in series) < 2:
        return ""
    drawings = {WIDE: "wide", NARROW: "narrow"} if wide else {NARROW: "only"}
    return (
        f"<figure><figcaption><b>{escape(title)}</b> <span class=muted>{escape(unit)}</span>{_legend(series)}"
        "</figcaption>"
        + "".join(
            f'<svg class="{kind}" viewBox="0 0 {width} {HEIGHT}" role="img" aria-label="{escape(title)}">'
            f"{_drawing(series, width, from_zero)}</svg>"
            for width, kind in drawings.items()
        )
        + "</figure>"
    )


def smoothed(points: Sequence[Point]) -> list[Point]:
    """The mean over a twentieth of the points around each one, and over fewer near the ends."""
    sums = list(itertools.accumulate((y for _, y in points), initial=0.0))
    half, found = len(points) // 40, []
    for position, (x, _) in enumerate(points):
        first, last = max(0, position - half), min(len(points), position + half + 1)
        found.append((x, (sums[last] - sums[first]) / (last - first)))
    return found


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most about ``most`` points that keep the shape: the lowest and the highest of each group of neighbors."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(2 * len(points) / most)
    found = [points[0]]
    for start in range(0, len(points), size):
        group = points[start : start + size]
        ends = {min(group, key=lambda point: point[1]), max(group, key=lambda point: point[1])}
        found += sorted(ends - {found[-1]})
    return found if found[-1] == points[-1] else [*found, points[-1]]


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """At most ``most`` round numbers between two others: multiples of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(factor * power for factor in (1, 2, 5, 10, 20) if (high - low) / (factor * power) < most)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float, step: float = 0.0) -> str:
    """A label: 12k, 250, 1.35 or 5e-05. ``step``: the distance to the next label, which it shows."""
    size = max(abs(value), step)
    if size >= 10_000:
        return f"{value / 1000:,.{0 if step >= 1000 or not step else 1}f}k"
    if 0 < size < 0.001:
        return f"{value:.2g}"
    if not step:
        return f"{value:.4g}"
    return f"{value:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def _drawing(series: Sequence[Series], width: int, from_zero: bool) -> str:
    xs = [x for each in series for x, _ in each.points]
    ys = [y for each in series for _, y in each.points]
    low_x, high_x = min(xs), max(xs)
    low, high = (0.0 if from_zero else min(ys)), max(ys)
    margin = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    low, high = (low if from_zero else low - margin), high + margin

    def place(point: Point) -> Point:
        x, y = point
        across = (x - low_x) / ((high_x - low_x) or 1)
        return LEFT + across * (width - LEFT - RIGHT), TOP + (high - y) / (high - low) * (HEIGHT - TOP - BOTTOM)

    lines = [_line(each, place) for each in series]
    return "".join([*_grid(low, high, width, place), *_steps(low_x, high_x, place), *lines])


def _grid(low: float, high: float, width: int, place: Place) -> list[str]:
    levels = ticks(low, high)
    step = levels[1] - levels[0] if len(levels) > 1 else 0.0
    drawn = []
    for level in levels:
        _, y = place((0, level))
        drawn.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{width - RIGHT}"/>')
        drawn.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{number(level, step)}</text>')
    return drawn


def _steps(low: float, high: float, place: Place) -> list[str]:
    levels = [level for level in ticks(low, high, 4) if level == round(level)] or [low]
    return [
        f'<text x="{place((level, 0))[0]:.1f}" y="{HEIGHT - 8}" text-anchor="{"start" if level == low else "middle"}">'
        f"{'step ' if position == 0 else ''}{number(level, 1)}</text>"
        for position, level in enumerate(levels)
    ]


def _line(series: Series, place: Place) -> str:
    placed = [(point, place(point)) for point in thinned(series.points)]
    path = "L".join(f"{x:.1f} {y:.1f}" for _, (x, y) in placed)
    drawn = f'<path class="{series.kind}" d="M{path}"/>'
    for (step, value), (x, y) in placed if series.kind == "dots" else ():
        best = step == series.best
        circle = f'<circle{" class=best" if best else ""} cx="{x:.1f}" cy="{y:.1f}" r="{6 if best else 4}">'
        drawn += f"{circle}<title>step {step:.0f}: {value:.4f}{', the lowest' if best else ''}</title></circle>"
    return drawn


def _legend(series: Sequence[Series]) -> str:
    entries = (f'<span><i class="{each.kind}"></i>{escape(each.name)} {number(each.value)}</span>' for each in series)
    return f'<span class="legend">{"".join(entries)}</span>'
