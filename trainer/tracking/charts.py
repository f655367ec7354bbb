"""Charts as SVG text: lines and stacked areas against the step, and the learning curve of the README.

Colours are CSS variables (`var(--c1)`), so that one drawing serves light and dark pages; see assets/report.css.
Charts inside the report carry their numbers in a data attribute, from which assets/report.js makes the read-out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from trainer.tracking.scales import Point, domain, downsample, readable, step_ticks, tick_labels, ticks

MIN_POINTS = 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 14, 12, 24


@dataclass(frozen=True)
class Series:
    """One line. points: (step, value), ascending. color: a CSS colour. dots: mark each point (few, measured now and
    then). band: also shade the spread of what downsampling merged."""

    name: str
    points: Sequence[Point]
    color: str
    dots: bool = False
    band: bool = True
    opacity: float = 1.0


@dataclass(frozen=True)
class Frame:
    """Plot area of a chart and the mapping from data to it. Sizes in units of the SVG, which a card shows about 1:1."""

    width: float
    height: float
    x_range: tuple[float, float]
    y_ticks: Sequence[float]
    left: float = _LEFT
    right: float = _RIGHT
    top: float = _TOP
    bottom: float = _BOTTOM

    @property
    def y_range(self) -> tuple[float, float]:
        """The vertical axis, from the first tick to the last."""
        return self.y_ticks[0], self.y_ticks[-1]

    @property
    def max_points(self) -> int:
        """Points of a line beyond which more cannot be told apart."""
        return max(MIN_POINTS, int(self.width) // 2)

    def x(self, value: float) -> float:
        """Horizontal position of a step."""
        low, high = self.x_range
        share = (value - low) / (high - low) if high > low else 0.5
        return self.left + share * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        """Vertical position of a value."""
        low, high = self.y_range
        return self.height - self.bottom - (value - low) / (high - low) * (self.height - self.top - self.bottom)


def line_chart(
    series: Sequence[Series], *, key: str, label: str, x_range: tuple[float, float], width: int, height: int
) -> str:
    """Lines against the step. key: unique on the page, letters and digits. label: the chart in words, for those who
    cannot see it."""
    values = [y for one in series for _, y in one.points]
    frame = Frame(width, height, x_range, axis_ticks(values))
    drawn = [(one, downsample(one.points, frame.max_points)) for one in series if one.points]
    body = []
    for one, short in drawn:
        if short.low and one.band:
            edge = [(x, y) for (x, _), y in zip(short.points, short.high, strict=True)]
            back = [(x, y) for (x, _), y in zip(short.points, short.low, strict=True)]
            body.append(f'<path d="{path(frame, edge + back[::-1])}Z" fill="{one.color}" class="band"/>')
    body += [_line(frame, one, short.points) for one, short in drawn]
    data = [{"n": one.name, "c": one.color, "p": _compact(short.points)} for one, short in drawn]
    return _svg(frame, "".join(body), key=key, label=label, data=data)


def stacked_chart(
    series: Sequence[Series], *, key: str, label: str, x_range: tuple[float, float], width: int, height: int
) -> str:
    """Values that add up, one area upon the other; a series without a value at a step counts 0 there."""
    steps = sorted({step for one in series for step, _ in one.points})
    columns = [dict(one.points) for one in series]
    frame = Frame(width, height, x_range, axis_ticks(step_totals(series), zero=True))
    layers = [
        downsample([(step, column.get(step, 0.0)) for step in steps], frame.max_points).points for column in columns
    ]
    body, floor = [], [(x, 0.0) for x, _ in layers[0]]
    for one, layer in zip(series, layers, strict=True):
        top = [(x, base + y) for (x, base), (_, y) in zip(floor, layer, strict=True)]
        body.append(f'<path d="{_area(frame, top, floor)}" fill="{one.color}" class="area"/>')
        floor = top
    data = [{"n": one.name, "c": one.color, "p": _compact(layer)} for one, layer in zip(series, layers, strict=True)]
    return _svg(frame, "".join(body), key=key, label=label, data=data)


def step_totals(series: Sequence[Series]) -> list[float]:
    """Sum over the series at each step."""
    totals: dict[float, float] = {}
    for one in series:
        for step, value in one.points:
            totals[step] = totals.get(step, 0.0) + value
    return [totals[step] for step in sorted(totals)]


def off_scale(values: Sequence[float], *, zero: bool = False) -> str:
    """A remark on the values that the axis leaves out; "" if it shows all."""
    marks = axis_ticks(values, zero=zero)
    low, high = marks[0], marks[-1]
    outside = [value for value in values if not low <= value <= high]
    if not outside:
        return ""
    return f"{len(outside)} off the scale, as far as {readable(max(outside, key=abs))}"


def axis_ticks(values: Sequence[float], *, zero: bool = False) -> list[float]:
    """Ticks of a vertical axis for the values; from zero if asked, or if all are shares of one."""
    shares = all(0 <= value <= 1 for value in values) and max(values) > 0.5
    return ticks(*domain(values, zero=zero or shares), 4)


def grid(frame: Frame) -> str:
    """Horizontal lines with labels, and labels of the steps below."""
    parts = []
    for value, text in zip(frame.y_ticks, tick_labels(frame.y_ticks), strict=True):
        y, x_end = frame.y(value), frame.width - frame.right
        parts.append(f'<line x1="{frame.left:g}" x2="{x_end:g}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(f'<text x="{frame.left - 7:g}" y="{y:.1f}" dy=".32em" text-anchor="end">{text}</text>')
    steps = step_ticks(*frame.x_range, max(2, int(frame.width / 90)))
    base = frame.height - frame.bottom + 16
    for index, value in enumerate(steps):
        text = f"{value:,.0f}" if index else f"step {value:,.0f}"
        parts.append(f'<text x="{frame.x(value):.1f}" y="{base:g}" text-anchor="middle">{text}</text>')
    return "".join(parts)


def path(frame: Frame, points: Sequence[Point]) -> str:
    """SVG path data through the points."""
    return "M" + "L".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in points)


def _line(frame: Frame, one: Series, points: Sequence[Point]) -> str:
    style = f'stroke="{one.color}"' + (f' opacity="{one.opacity:g}"' if one.opacity < 1 else "")
    parts = [f'<path d="{path(frame, points)}" {style} class="line"/>'] if len(points) > 1 else []
    if (one.dots and len(points) <= 60) or len(points) == 1:
        parts += [
            f'<circle cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3.2" fill="{one.color}" class="dot"/>'
            for x, y in points
        ]
    return "".join(parts)


def _area(frame: Frame, top: Sequence[Point], floor: Sequence[Point]) -> str:
    """Between two curves: a step per bar, so that a single step shows as well and no phase leaks into its
    neighbours."""
    return _stairs(frame, top) + "L" + _stairs(frame, floor, backwards=True)[1:] + "Z"


def _stairs(frame: Frame, points: Sequence[Point], *, backwards: bool = False) -> str:
    low, high = frame.x_range
    middles = [(a + b) / 2 for (a, _), (b, _) in pairwise(points)]
    edges = [low, *middles, high]
    corners = [(x, y) for index, (_, y) in enumerate(points) for x in (edges[index], edges[index + 1])]
    return path(frame, corners[::-1] if backwards else corners)


def _compact(points: Sequence[Point]) -> list[list[float]]:
    return [[round(x, 1), float(f"{y:.4g}")] for x, y in points]


def _svg(frame: Frame, marks: str, *, key: str, label: str, data: Sequence[object]) -> str:
    """The chart as an element of the report: focusable, with its numbers and geometry for the read-out."""
    geometry = {
        "x": list(frame.x_range),
        "y": list(frame.y_range),
        "l": frame.left,
        "r": frame.width - frame.right,
        "t": frame.top,
        "b": frame.height - frame.bottom,
        "s": data,
    }
    clip = (
        f'<clipPath id="clip-{key}"><rect x="{frame.left - 4:g}" y="{frame.top - 4:g}" '
        f'width="{frame.width - frame.left - frame.right + 8:g}" '
        f'height="{frame.height - frame.top - frame.bottom + 4.5:g}"/></clipPath>'
    )
    return (
        f'<svg class="chart" viewBox="0 0 {frame.width:g} {frame.height:g}" role="img" tabindex="0" '
        f'aria-label="{escape(label)}" data-chart="{escape(json.dumps(geometry, separators=(",", ":")))}">'
        f'{clip}{grid(frame)}<g clip-path="url(#clip-{key})">{marks}</g>'
        f'<line class="cursor" y1="{frame.top:g}" y2="{frame.height - frame.bottom:g}"/></svg>'
    )


def describe(series: Series) -> str:
    """A line in words: "reward: 0.412 at step 1, 0.953 at step 60"."""
    (first, start), (last, end) = series.points[0], series.points[-1]
    if len(series.points) == 1:
        return f"{series.name}: {readable(start)} at step {first:g}"
    return f"{series.name}: {readable(start)} at step {first:g}, {readable(end)} at step {last:g}"
