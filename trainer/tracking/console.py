"""What the terminal shows: start-up tables, a line per step, completions, and the result.

Tables and panels are plain functions that return something rich can print; `ConsoleSink` decides when. On a terminal a
step is one row under a repeated heading; in a log file it is one self-contained line without control codes.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from trainer.tracking.memory import MemoryLine
from trainer.tracking.progress import ProgressLines
from trainer.tracking.records import CompletionRow, Metrics
from trainer.tracking.text import duration, score, shorten, size, visible

_LOG_WIDTH = 120
_CELL_LIMIT = 240
_MAX_TABLE_ROWS = 6


def make_console() -> Console:
    """Standard output; 120 columns wide where it is not a terminal."""
    return Console(width=None if sys.stdout.isatty() else _LOG_WIDTH, highlight=False)


def startup_table(rows: Sequence[Mapping[str, object]]) -> Table:
    """What runs where: one row per role, with the columns that the rows name (role, devices, engine, parallelism)."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = _table("Roles")
    for position, name in enumerate(columns):
        table.add_column(name, style="bold" if position == 0 else "", overflow="fold")
    for row in rows:
        table.add_row(*(_plain(row[name]) if name in row else "" for name in columns))
    return table


def engine_table(version: str, choices: Sequence[tuple[str, str, str]]) -> Table:
    """What was chosen for the installed vLLM: (what, value, why) of each."""
    table = _table(f"vLLM {version}")
    table.show_header = False
    for what, value, why in choices:
        table.add_row(_plain(what), _plain(value), Text(why, style="dim"))
    return table


def batch_table(sizes: Mapping[str, object]) -> Table:
    """The sizes that follow from the configuration, and the keys they come from: name to value."""
    table = _table("Batch sizes")
    table.show_header = False
    table.add_column("what")
    table.add_column("size", justify="right", style="bold")
    for name, value in sizes.items():
        table.add_row(_plain(name), _plain(f"{value:,}" if isinstance(value, int) else value))
    return table


def memory_table(title: str, rows: Sequence[Mapping[str, str]]) -> Table:
    """Memory of devices by phase: columns as the rows name them; numbers are made by the caller."""
    table = _table(title)
    for name in rows[0]:
        table.add_column(name, justify="left" if name == "phase" else "right", style="bold" if name == "in all" else "")
    for row in rows:
        table.add_row(*(_plain(cell) for cell in row.values()))
    return table


def completions_table(step: int, rows: Sequence[CompletionRow]) -> Table:
    """Prompt, response, reward and advantage of sample completions; text is shown as it is, never as markup."""
    phases = {"train": "training", "val": "held-out"}
    names = " and ".join(sorted({phases.get(row.phase, row.phase) for row in rows}))
    table = _table(f"Completions of step {step}, {names}")
    table.show_lines = any(len(row.prompt) + len(row.response) > 100 for row in rows)
    truth = any(row.ground_truth for row in rows)
    advantage = any(row.advantage is not None for row in rows)
    table.add_column("prompt", overflow="fold", ratio=3)
    table.add_column("response", overflow="fold", ratio=4)
    if truth:
        table.add_column("expected", overflow="fold", ratio=1, min_width=8)
    table.add_column("reward", justify="right", no_wrap=True)
    if advantage:
        table.add_column("advantage", justify="right", no_wrap=True)
    for row in rows:
        cells = [_quoted(row.prompt), _response(row)]
        cells += [_quoted(row.ground_truth)] if truth else []
        cells.append(Text(f"{row.reward:.2f}", style="green" if row.reward > 0 else "red"))
        cells += [Text("-" if row.advantage is None else f"{row.advantage:+.2f}")] if advantage else []
        table.add_row(*cells)
    table.expand = table.show_lines
    return table


def summary_panel(summary: Mapping[str, Any]) -> Panel:
    """The result: accuracy before and after, steps and speed. `summary` is the content of summary.json."""
    grid = Table.grid(padding=(0, 3))
    grid.add_column(style="dim")
    grid.add_column()
    for label, kind in (("Held-out accuracy", "accuracy"), ("  greedy", "greedy")):
        before, after = summary[f"{kind}_before"], summary[f"{kind}_after"]
        if before is not None or after is not None:
            grid.add_row(label, _from_to(before, after))
    steps, seconds = summary["steps"], summary["seconds_total"]
    grid.add_row("Steps", Text(f"{steps} in {duration(seconds)}"))
    if summary["tokens_per_second"] is not None:
        grid.add_row("Throughput", Text(f"{summary['tokens_per_second']:,.0f} tokens/s"))
    if summary["peak_memory_bytes"] is not None:
        grid.add_row("Peak memory", Text(size(summary["peak_memory_bytes"])))
    return Panel(grid, title="Result", title_align="left", border_style="dim", padding=(1, 2), expand=False)


def _from_to(before: float | None, after: float | None) -> Text:
    start = (score(before), (" -> ", "dim")) if before is not None else ()
    return Text.assemble(*start, (score(after), "bold green"))


class ConsoleSink:
    """Prints a line per step, completions every `completions_freq` steps (0: never), and the result at the end.

    Only training completions are shown; those of validations are in completions.jsonl and the report.
    """

    def __init__(
        self,
        console: Console,
        *,
        total_steps: int,
        completions_freq: int = 0,
        report: Path | None = None,
        next_command: str = "",
    ) -> None:
        self._console = console
        self._completions_freq = completions_freq
        self._report = report
        self._next_command = next_command
        self._memory = MemoryLine()
        self._lines = ProgressLines(
            total_steps=total_steps, width=console.width if console.is_terminal else None, color=_has_color(console)
        )

    def log(self, step: int, metrics: Metrics) -> None:
        """Print the step, and what a person should know about it: failed rewards, skipped updates, more memory."""
        self._lines.resize(self._console.width)
        for line in self._lines.step(step, metrics):
            self._console.print(line, soft_wrap=True)
        if step > 0 and (memory := self._memory.step(metrics)):
            self._console.print(Text(f"  {memory}", style="dim"), soft_wrap=True)

    def completions(self, step: int, rows: Sequence[CompletionRow]) -> None:
        """Print some of the training completions if it is their turn."""
        shown = [row for row in rows if row.phase == "train"][:_MAX_TABLE_ROWS]
        if shown and self._completions_freq > 0 and step % self._completions_freq == 0:
            self._console.print()
            self._console.print(completions_table(step, shown))
            self._lines.repeat_heading()

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Print the result. Path and command stand on lines of their own, whole, to be copied."""
        self._console.print()
        self._console.print(summary_panel(summary))
        if self._report is not None and self._report.exists():
            self._pointer("Report", str(self._report))
        if self._next_command:
            self._pointer("Try next", self._next_command)

    def _pointer(self, label: str, value: str) -> None:
        self._console.print(Text.assemble((f"  {label:<10}", "dim"), (value, "bold")), soft_wrap=True)


def _has_color(console: Console) -> bool:
    return console.is_terminal and console.color_system is not None and not console.no_color


def _table(title: str) -> Table:
    return Table(
        title=title, title_justify="left", title_style="bold", header_style="dim", box=box.SIMPLE_HEAD, pad_edge=False
    )


def _plain(value: object) -> Text:
    return Text(visible(str(value)))


def _quoted(text: str) -> Text:
    return Text(visible(shorten(text, _CELL_LIMIT)))


def _response(row: CompletionRow) -> Text:
    text = _quoted(row.response)
    if row.finish_reason != "stop":
        text.append(f" [{row.finish_reason}]", style="yellow")
    return text
