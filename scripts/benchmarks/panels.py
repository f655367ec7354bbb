"""Curves side by side as one standalone SVG picture: a small panel each, mean and spread over seeds, one scale for all.

The first panel's mean is repeated, faintly, in all others, so that each can be compared with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from trainer.tracking.charts import Frame, axis_ticks, path
from trainer.tracking.scales import Point, step_ticks
from trainer.tracking.text import score

_COLUMNS = 4
_WIDTH, _HEIGHT = 210, 150
"""Of a panel."""
_TOP, _EDGE = 76, 16
_STYLE = """
:root{--ground:#ffffff;--edge:#d8dde3;--ink:#1f2328;--soft:#59636e;--grid:#e6e9ed;--other:#9aa4af;--mean:#c8552b}
@media (prefers-color-scheme: dark){
:root{--ground:#0d1117;--edge:#30363d;--ink:#e6edf3;--soft:#9198a1;--grid:#21262d;--other:#5b6570;--mean:#f0865c}}
text{font:11px system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif;fill:var(--soft)}
.title{font-size:16px;font-weight:600;fill:var(--ink)}
.name{font-size:12px;font-weight:600;fill:var(--ink)}
.value{font-weight:600;fill:var(--mean)}
.grid{stroke:var(--grid)}
.mean{fill:none;stroke:var(--mean);stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.other{fill:none;stroke:var(--other);stroke-width:1.2;stroke-dasharray:3 3}
.band{fill:var(--mean);opacity:.22}
"""


@dataclass(frozen=True, slots=True)
class Curve:
    """Values of several seeds at the same steps. low, high: the extremes at each step."""

    name: str
    steps: Sequence[int]
    mean: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]

    def points(self, values: Sequence[float]) -> list[Point]:
        """(step, value) of one of the three."""
        return [(float(step), value) for step, value in zip(self.steps, values, strict=True)]


def panels_svg(curves: Sequence[Curve], *, title: str, subtitle: str) -> str:
    """The picture. Raises ValueError if there is no curve."""
    if not curves:
        raise ValueError("no curve to draw")
    rows = -(-len(curves) // _COLUMNS)
    width = 2 * _EDGE + _WIDTH * min(_COLUMNS, len(curves))
    height = _TOP + rows * _HEIGHT + _EDGE
    steps = [step for curve in curves for step in curve.steps]
    marks = axis_ticks([value for curve in curves for value in (*curve.low, *curve.high)])
    frame = Frame(_WIDTH, _HEIGHT, (min(steps), max(steps)), marks, left=40, right=10, top=26, bottom=24)
    body = [_panel(frame, curve, number, curves[0] if number else None) for number, curve in enumerate(curves)]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img" '
        f'aria-label="{escape(title)}">\n<style>{_STYLE}</style>\n'
        f'<rect x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="10" fill="var(--ground)" '
        f'stroke="var(--edge)"/>\n<text x="22" y="33" class="title">{escape(title)}</text>\n'
        f'<text x="22" y="54">{escape(subtitle)}</text>\n' + "\n".join(body) + "\n</svg>\n"
    )


def _panel(frame: Frame, curve: Curve, number: int, first: Curve | None) -> str:
    """One curve at its place in the grid of panels."""
    row, column = divmod(number, _COLUMNS)
    band = curve.points(curve.high) + curve.points(curve.low)[::-1]
    parts = [f'<g transform="translate({_EDGE + column * _WIDTH} {_TOP + row * _HEIGHT})">', *_axes(frame)]
    parts.append(f'<text x="10" y="14" class="name">{escape(curve.name)}</text>')
    end, floor = frame.width - frame.right, frame.height - frame.bottom - 7  # where a curve that rises is not
    parts.append(f'<text x="{end:g}" y="{floor:g}" text-anchor="end" class="value">{score(curve.mean[-1])}</text>')
    if len(curve.steps) > 1:
        parts.append(f'<path d="{path(frame, band)}Z" class="band"/>')
        if first is not None and len(first.steps) > 1:
            parts.append(f'<path d="{path(frame, first.points(first.mean))}" class="other"/>')
        parts.append(f'<path d="{path(frame, curve.points(curve.mean))}" class="mean"/>')
    return "".join([*parts, "</g>"])


def _axes(frame: Frame) -> list[str]:
    parts, end = [], frame.width - frame.right
    for value in frame.y_ticks:
        y = frame.y(value)
        parts.append(f'<line x1="{frame.left:g}" x2="{end:g}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(
            f'<text x="{frame.left - 6:g}" y="{y:.1f}" dy=".32em" text-anchor="end">{100 * value:.0f} %</text>'
        )
    base = frame.height - frame.bottom + 15
    for value in step_ticks(*frame.x_range, 4):
        parts.append(f'<text x="{frame.x(value):.1f}" y="{base:g}" text-anchor="middle">{value:,.0f}</text>')
    return parts
