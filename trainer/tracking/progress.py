"""The line that each step prints, with or without colour, for a terminal of any width or for a log file."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from rich.style import Style
from rich.text import Text

from trainer.tracking.records import Metrics, json_number
from trainer.tracking.text import duration

PHASES = {
    "generate": ("gen", "#4a8fd9"),
    "score": ("scr", "#a98a1f"),
    "annotate": ("ann", "#c06a97"),
    "update": ("upd", "#d0673a"),
    "sync": ("syn", "#2b9b72"),
    "validate": ("val", "#8a78d0"),
    "checkpoint": ("ckp", "#5b9440"),
    "other": ("oth", "#84847f"),
}
"""Phases in the order of a step: abbreviation and colour, readable on black and on white."""

_HEADING_EVERY = 20
_BAR = "\u2501"
_MIN_SHARES, _MAX_SHARES = 12, 60  # cells for the shares of the phases
_SHORT_BAR, _LONG_BAR = 10, 20
_ETA_WINDOW, _ETA_WIDTH = 20, 7


@dataclass(frozen=True)
class Column:
    """A number of the step: the first of `metrics` that the run logs."""

    title: str
    width: int
    metrics: tuple[str, ...]
    format: Callable[[float], str]
    style: str = ""


def _fixed(digits: int) -> Callable[[float], str]:
    return lambda value: f"{value:.{digits}f}"


def _tiny(value: float) -> str:
    """Seven characters at most: 0.0312, 1.2e-05, 0."""
    if value == 0:
        return "0"
    return f"{value:.4f}" if 0.001 <= abs(value) < 10 else f"{value:.1e}"


COLUMNS = (
    Column("reward", 6, ("reward/mean",), _fixed(3), "bold"),
    Column("acc", 6, ("val/accuracy",), _fixed(3), "bold green"),
    Column("greedy", 6, ("val/greedy_accuracy",), _fixed(3), "green"),
    Column("kl", 7, ("actor/kl_loss", "kl/reward_kl"), _tiny),
    Column("ppo_kl", 7, ("actor/ppo_kl",), _tiny),
    Column("length", 6, ("response_length/mean",), _fixed(1)),
    Column("mismatch", 8, ("mismatch/logprob_abs_diff_mean",), _tiny),
    Column("grad", 6, ("actor/grad_norm",), lambda value: f"{value:.2f}" if value < 1000 else f"{value:.0e}"),
    Column("time", 6, ("time/step",), lambda value: f"{value:.2f}s" if value < 100 else duration(value)),
)
_DROP_ORDER = ("greedy", "ppo_kl", "mismatch", "grad", "length", "kl", "acc")


class ProgressLines:
    """Turns the metrics of a step into lines to print.

    width: columns of the terminal; None for a log, where each line names its numbers.
    color: whether the share of each phase can be a coloured bar; percentages otherwise.
    """

    def __init__(self, *, total_steps: int, width: int | None, color: bool) -> None:
        self._total_steps = total_steps
        self._width = width
        self._color = color
        self._seen: set[str] = set()
        self._columns: tuple[Column, ...] = ()
        self._until_heading = 0
        self._recent: deque[float] = deque(maxlen=_ETA_WINDOW)

    def resize(self, width: int) -> None:
        """Use the terminal's present width."""
        if self._width is not None and width != self._width:
            self._width = width
            self.repeat_heading()

    def repeat_heading(self) -> None:
        """Print the column titles again before the next step."""
        self._until_heading = 0

    def step(self, step: int, metrics: Metrics) -> list[Text]:
        """The lines of a step: column titles now and then, the numbers, and warnings."""
        numbers = {name: float(number) for name, value in metrics.items() if (number := json_number(value)) is not None}
        if "time/step" in numbers and step > 0:
            self._recent.append(numbers["time/step"])
        self._seen.update(numbers)
        as_sentence = self._width is None or step == 0
        lines = [self._log_line(step, numbers)] if as_sentence else self._rows(step, numbers)
        return lines + warnings(numbers)

    def _rows(self, step: int, numbers: dict[str, float]) -> list[Text]:
        lines = []
        columns = self._fitting_columns()
        if columns != self._columns or self._until_heading <= 0:
            self._columns = columns
            self._until_heading = _HEADING_EVERY
            lines.append(self._heading(numbers))
        self._until_heading -= 1
        row = Text()
        row.append(f"{self._counter(step):>{self._counter_width}}", style="dim")
        for column in columns:
            value = _value(column, numbers)
            text = "-" if value is None else column.format(value)
            row.append(
                f" {text:>{column.width}}", style=Style.parse("dim" if value is None else column.style or "none")
            )
        row.append(" ")
        row.append_text(self._shares(numbers))
        row.append(f" {self._eta(step):>{_ETA_WIDTH}}", style="dim")
        return [*lines, row]

    def _heading(self, numbers: dict[str, float]) -> Text:
        titles = "".join(f" {column.title:>{column.width}}" for column in self._columns)
        heading = Text()
        heading.append(f"{'step':>{self._counter_width}}{titles} ", style="dim")
        heading.append_text(self._legend(numbers))
        heading.append(f" {'eta':>{_ETA_WIDTH}}", style="dim")
        return heading

    def _log_line(self, step: int, numbers: dict[str, float]) -> Text:
        parts = [f"step {self._counter(step)}"]
        for column in COLUMNS[:-1]:
            value = _value(column, numbers)
            if value is not None:
                parts.append(f"{column.title} {column.format(value)}")
        if "time/step" in numbers:
            parts.append(f"time {numbers['time/step']:.2f}s ({_percentages(phase_shares(numbers))})")
        eta = self._eta(step)
        return Text("  ".join([*parts, f"eta {eta}"] if eta else parts))

    def _shares(self, numbers: dict[str, float]) -> Text:
        """Bar, then percentages where there is room for some."""
        shares = phase_shares(numbers)
        room = self._share_width
        if not self._color:
            return phase_labels(shares, room, color=False)
        bar = phase_bar(shares, self._bar_width)
        return bar if len(bar) == room else Text(" ").join([bar, phase_labels(shares, room - len(bar) - 1, color=True)])

    def _legend(self, numbers: dict[str, float]) -> Text:
        """The names of the largest phases in their colours, for a bar that has no room for percentages beside it."""
        if not self._color or self._bar_width < self._share_width:
            return Text(f"{'phases':<{self._share_width}}", style="dim")
        shares = phase_shares(numbers)
        largest = sorted(shares, key=lambda name: -shares[name])[: (self._share_width + 1) // 4]
        legend = Text(" ").join(Text(_short(name), style=_color(name)) for name in shares if name in largest)
        legend.pad_right(self._share_width - len(legend))
        return legend

    def _fitting_columns(self) -> tuple[Column, ...]:
        columns = [column for column in COLUMNS if any(name in self._seen for name in column.metrics)]
        for title in _DROP_ORDER:
            if self._room(columns) >= _MIN_SHARES:
                break
            columns = [column for column in columns if column.title != title]
        return tuple(columns)

    def _room(self, columns: list[Column] | tuple[Column, ...]) -> int:
        """Columns left for the bar."""
        assert self._width is not None
        return self._width - self._counter_width - sum(column.width + 1 for column in columns) - 2 - _ETA_WIDTH

    @property
    def _share_width(self) -> int:
        return max(_MIN_SHARES, min(_MAX_SHARES, self._room(self._columns)))

    @property
    def _bar_width(self) -> int:
        room = self._share_width
        return _LONG_BAR if room >= 48 else _SHORT_BAR if room >= 24 else room

    @property
    def _counter_width(self) -> int:
        return max(4, 2 * len(str(self._total_steps)) + 1)

    def _counter(self, step: int) -> str:
        return f"{step}/{self._total_steps}"

    def _eta(self, step: int) -> str:
        if not self._recent or step <= 0:
            return ""
        return duration(sum(self._recent) / len(self._recent) * max(0, self._total_steps - step))


def warnings(numbers: dict[str, float]) -> list[Text]:
    """What went wrong in a step without ending the run."""
    lines = []
    if errors := numbers.get("reward/errors", 0):
        lines.append(
            f"the reward function failed for {errors:.0f} responses ({numbers.get('reward/error_rate', 0):.1%})"
        )
    if skipped := numbers.get("actor/skipped_updates", 0):
        lines.append(f"{skipped:.0f} updates skipped: the gradient was not finite")
    return [Text(f"  warning: {line}", style="yellow") for line in lines]


def phase_shares(numbers: dict[str, float]) -> dict[str, float]:
    """Share of the step of each phase that took any time, in the order of a step; phases of no name we know go last."""
    total = numbers.get("time/step", 0.0)
    if total <= 0:
        return {}
    names = [name.removeprefix("time/") for name in numbers if name.startswith("time/") and name != "time/step"]
    order = list(PHASES)
    names.sort(key=lambda name: order.index(name) if name in PHASES else len(order))
    return {name: numbers[f"time/{name}"] / total for name in names if numbers[f"time/{name}"] > 0}


def phase_bar(shares: dict[str, float], width: int) -> Text:
    """A thin bar of `width` cells, one coloured segment per phase."""
    bar = Text()
    for name, cells in zip(shares, _apportion(list(shares.values()), width), strict=True):
        bar.append(_BAR * cells, style=_color(name))
    bar.pad_right(width - len(bar))
    return bar


def phase_labels(shares: dict[str, float], width: int, *, color: bool) -> Text:
    """Abbreviation and percentage of the largest phases, as many as fit, in the order of a step."""
    texts = {name: f"{_short(name)} {100 * share:.0f}%" for name, share in shares.items() if share >= 0.005}
    used, chosen = 0, set()
    for name in sorted(texts, key=lambda name: -shares[name]):
        used += len(texts[name]) + 1
        if used - 1 > width:
            break
        chosen.add(name)
    labels = Text(" ").join(
        Text(text, style=_color(name) if color else "") for name, text in texts.items() if name in chosen
    )
    labels.pad_right(width - len(labels))
    return labels


def _color(name: str) -> str:
    return PHASES[name][1] if name in PHASES else PHASES["other"][1]


def _short(name: str) -> str:
    return PHASES[name][0] if name in PHASES else name[:3]


def _apportion(shares: list[float], width: int) -> list[int]:
    """Whole cells in proportion to the shares, `width` in all (largest remainders)."""
    total = sum(shares)
    exact = [share / total * width for share in shares]
    cells = [int(value) for value in exact]
    by_remainder = sorted(range(len(shares)), key=lambda index: cells[index] - exact[index])
    for index in by_remainder[: width - sum(cells)]:
        cells[index] += 1
    return cells


def _percentages(shares: dict[str, float]) -> str:
    return " ".join(f"{name} {100 * share:.0f}%" for name, share in shares.items() if share >= 0.005)


def _value(column: Column, numbers: dict[str, float]) -> float | None:
    return next((numbers[name] for name in column.metrics if name in numbers), None)
