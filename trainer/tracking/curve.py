"""The learning curve as a standalone SVG picture, for a README: it follows the reader's light or dark scheme."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from html import escape
from pathlib import Path

from trainer.tracking.charts import Frame, Series, axis_ticks, path
from trainer.tracking.run_data import History, read_history
from trainer.tracking.scales import Point, downsample, step_ticks, tick_labels
from trainer.tracking.text import score

_WIDTH, _HEIGHT = 760, 340
_LINES = (
    ("reward/mean", "training reward", "var(--reward)"),
    ("val/accuracy", "held-out accuracy", "var(--accuracy)"),
)
_STYLE = """
:root{--ground:#ffffff;--edge:#d8dde3;--ink:#1f2328;--soft:#59636e;--grid:#e6e9ed;--reward:#7fa8d6;--accuracy:#c8552b}
@media (prefers-color-scheme: dark){
:root{--ground:#0d1117;--edge:#30363d;--ink:#e6edf3;--soft:#9198a1;--grid:#21262d;--reward:#4a7fb5;--accuracy:#f0865c}}
text{font:13px system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif;fill:var(--soft)}
.title{font-size:16px;font-weight:600;fill:var(--ink)}
.value{font-weight:600;fill:var(--accuracy)}
.grid{stroke:var(--grid)}
.line{fill:none;stroke-width:2.2;stroke-linejoin:round;stroke-linecap:round}
.dot{stroke:var(--ground);stroke-width:1.5}
"""


def learning_curve_svg(runs: Sequence[Path | History], *, title: str) -> str:
    """Training reward and held-out accuracy against the step, of one run or of several (faint, with their mean).

    runs: run directories, or their metrics. Raises ValueError if no run logged either metric.
    """
    histories = [run if isinstance(run, History) else read_history(run) for run in runs]
    lines = [_average(name, label, color, histories) for name, label, color in _LINES]
    lines = [line for line in lines if line.points]
    if not lines:
        raise ValueError(f"no learning curve in {[str(run) for run in runs]}: no reward/mean, no val/accuracy logged")
    faint = _single_runs(histories) if len(histories) > 1 else []
    everything = [point for line in lines + faint for point in line.points]
    x_range = (min(x for x, _ in everything), max(x for x, _ in everything))
    marks = axis_ticks([y for _, y in everything])
    frame = Frame(_WIDTH, _HEIGHT, x_range, marks, left=62, right=34, top=78, bottom=46)
    body = [*_axes(frame), *(_draw(frame, line) for line in faint + lines), *_legend(lines), *_ends(frame, lines[-1])]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" role="img" '
        f'aria-label="{escape(title)}">\n<style>{_STYLE}</style>\n'
        f'<rect x=".5" y=".5" width="{_WIDTH - 1}" height="{_HEIGHT - 1}" rx="10" fill="var(--ground)" '
        f'stroke="var(--edge)"/>\n<text x="22" y="33" class="title">{escape(title)}</text>\n'
        + "\n".join(body)
        + "\n</svg>\n"
    )


def _average(name: str, label: str, color: str, histories: Sequence[History]) -> Series:
    """Mean over the runs at each step that all runs with this metric have reached."""
    values: defaultdict[int, list[float]] = defaultdict(list)
    for one in histories:
        for step, value in one.of(name):
            values[step].append(value)
    most = max((len(found) for found in values.values()), default=0)
    points: list[Point] = [(step, sum(found) / most) for step, found in sorted(values.items()) if len(found) == most]
    return Series(label, points, color, dots=name == "val/accuracy")


def _single_runs(histories: Sequence[History]) -> list[Series]:
    return [
        Series(label, [(float(step), value) for step, value in one.of(name)], color, opacity=0.3)
        for one in histories
        for name, label, color in _LINES
        if one.of(name)
    ]


def _axes(frame: Frame) -> list[str]:
    low, high = frame.y_range
    percent = low >= 0 and high <= 1
    labels = [f"{100 * value:.0f} %" for value in frame.y_ticks] if percent else tick_labels(frame.y_ticks)
    parts, x_end = [], frame.width - frame.right
    for value, label in zip(frame.y_ticks, labels, strict=True):
        y = frame.y(value)
        parts.append(f'<line x1="{frame.left:g}" x2="{x_end:g}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(f'<text x="{frame.left - 10:g}" y="{y:.1f}" dy=".32em" text-anchor="end">{label}</text>')
    base = frame.height - frame.bottom + 22
    for value in step_ticks(*frame.x_range, 8):
        parts.append(f'<text x="{frame.x(value):.1f}" y="{base:g}" text-anchor="middle">{value:,.0f}</text>')
    middle = (frame.left + frame.width - frame.right) / 2
    return [*parts, f'<text x="{middle:g}" y="{base + 16:g}" text-anchor="middle">step</text>']


def _draw(frame: Frame, line: Series) -> str:
    points = downsample(line.points, frame.max_points).points
    opacity = f' opacity="{line.opacity:g}"' if line.opacity < 1 else ""
    drawn = f'<path d="{path(frame, points)}" stroke="{line.color}" class="line"{opacity}/>' if len(points) > 1 else ""
    if (line.dots and len(points) <= 40) or len(points) == 1:
        drawn += "".join(
            f'<circle cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="4" fill="{line.color}" class="dot"/>'
            for x, y in points
        )
    return drawn


def _legend(lines: Sequence[Series]) -> list[str]:
    parts, x = [], 22.0
    for line in lines:
        parts.append(f'<line x1="{x:g}" x2="{x + 18:g}" y1="52" y2="52" stroke="{line.color}" class="line"/>')
        parts.append(f'<text x="{x + 25:g}" y="52" dy=".32em">{line.name}</text>')
        x += 25 + 7.2 * len(line.name) + 22
    return parts


def _ends(frame: Frame, line: Series) -> list[str]:
    """The first and the last value of the accuracy, in figures."""
    parts = []
    for (x, y), anchor in ((line.points[0], "start"), (line.points[-1], "end")):
        low, high = frame.y_range
        below = anchor == "start" or (y - low) / (high - low) > 0.9
        shift = 20 if below and (y - low) / (high - low) > 0.15 else -12
        dx = 8 if anchor == "start" else 6
        parts.append(
            f'<text x="{frame.x(x) + dx:.1f}" y="{frame.y(y) + shift:.1f}" text-anchor="{anchor}" class="value">'
            f"{score(y)}</text>"
        )
    return parts if len(line.points) > 1 else parts[:1]
