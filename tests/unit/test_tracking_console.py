"""What the terminal shows, at several widths, in a log, and with hostile text."""

from __future__ import annotations

import io
import re
import time
from pathlib import Path

import pytest
from rich.console import Console, RenderableType
from rich.text import Text

from trainer.tracking.console import ConsoleSink, batch_table, completions_table, startup_table, summary_panel
from trainer.tracking.jsonl import JsonlSink
from trainer.tracking.memory import MemoryLine
from trainer.tracking.progress import ProgressLines, phase_bar, phase_labels, phase_shares
from trainer.tracking.records import CompletionRow
from trainer.tracking.text import duration, score, shorten, size, visible
from trainer.tracking.tracker import Tracker

SUMMARY = {
    "accuracy_before": 0.352,
    "accuracy_after": 0.971,
    "greedy_before": None,
    "greedy_after": None,
    "steps": 60,
    "seconds_total": 64.0,
    "tokens_per_second": None,
    "peak_memory_bytes": 3e9,
}


def metrics(step: int) -> dict[str, float]:
    values = {
        "reward/mean": 0.5,
        "actor/ppo_kl": 1e-10 * step,
        "actor/kl_loss": 0.01,
        "response_length/mean": 4.25,
        "mismatch/logprob_abs_diff_mean": 2e-6,
        "actor/grad_norm": 12345.0 if step == 3 else 0.5,
        "time/generate": 0.2,
        "time/update": 0.3,
        "time/score": 0.004,
        "time/other": 0.05,
        "time/step": 0.554,
    }
    return values | ({"val/accuracy": 0.9, "val/greedy_accuracy": 1.0} if step % 2 == 0 else {})


def render(item: RenderableType, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(item)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("width", [40, 80, 100, 120, 200])
@pytest.mark.parametrize("color", [True, False])
@pytest.mark.parametrize("total", [60, 100000])
def test_rows_fit_the_terminal_and_line_up(width: int, color: bool, total: int) -> None:
    progress = ProgressLines(total_steps=total, width=width, color=color)
    rows = [line.plain for step in range(1, 8) for line in progress.step(step, metrics(step))]
    if width >= 80:
        assert all(len(row) <= width for row in rows), max(rows, key=len)
    headings = [row for row in rows if "reward" in row]
    assert len(headings) == 2 or width < 80  # the accuracy of step 2 brings a column of its own
    assert len({len(row) for row in rows[-5:]}) == 1
    for word in ("reward", "acc", "mismatch", "grad", "length", "time", "eta"):
        assert word in headings[-1] or width < 80 or total > 1000, word


def test_log_lines_name_their_numbers() -> None:
    progress = ProgressLines(total_steps=60, width=None, color=False)
    (line,) = progress.step(4, metrics(4))
    assert line.plain == (
        "step 4/60  reward 0.500  acc 0.900  greedy 1.000  kl 0.0100  ppo_kl 4.0e-10  length 4.2  mismatch 2.0e-06  "
        "grad 0.50  time 0.55s (generate 36% score 1% update 54% other 9%)  eta 31s"
    )


def test_log_has_no_control_codes() -> None:
    file = io.StringIO()
    sink = ConsoleSink(Console(file=file, width=100), total_steps=3, completions_freq=1, next_command="x " * 100)
    for step in range(4):
        sink.log(step, metrics(step))
        sink.completions(step, [CompletionRow("train", "p", "\x1b[2Jboo", 0.0, 1.0)])
    sink.finish(SUMMARY)
    text = file.getvalue()
    assert re.findall(r"[\x00-\x09\x0b-\x1f\x7f]", text) == []
    assert sum(line.startswith("step ") for line in text.splitlines()) == 4
    assert "x " * 99 in text  # a command is never broken into lines


def test_missing_and_strange_values() -> None:
    for width in (None, 80):
        progress = ProgressLines(total_steps=5, width=width, color=True)
        assert progress.step(1, {})
        assert progress.step(2, {"reward/mean": float("nan"), "time/step": 0.0, "time/generate": 0.0})
        assert progress.step(3, {"reward/mean": 1.0, "time/step": 1.0, "time/generate": 0.2, "time/mine": 0.8})


def test_trouble_is_pointed_out() -> None:
    progress = ProgressLines(total_steps=5, width=None, color=False)
    lines = progress.step(1, {"reward/errors": 3, "reward/error_rate": 0.006, "actor/skipped_updates": 1})
    assert [line.plain for line in lines[1:]] == [
        "  warning: the reward function failed for 3 responses (0.6%)",
        "  warning: 1 updates skipped: the gradient was not finite",
    ]


@pytest.mark.parametrize("width", [10, 13, 47])
def test_bar_fills_its_cells(width: int) -> None:
    shares = phase_shares(metrics(1))
    assert list(shares) == ["generate", "score", "update", "other"]
    assert len(phase_bar(shares, width)) == width
    assert len(phase_bar({}, width)) == width
    assert len(phase_labels(shares, width, color=True)) == width


def test_eta_counts_down() -> None:
    progress = ProgressLines(total_steps=100, width=None, color=False)
    progress.step(0, {"time/step": 1000.0, "val/accuracy": 0.1})  # the first validation says nothing about steps
    (line,) = progress.step(1, {"time/step": 2.0})
    assert line.plain.endswith("eta 3:18")


def test_tables_show_text_as_it_is() -> None:
    rows = [
        CompletionRow("train", "[bold]1+1=[/bold]", "2\n\x1b[31m\u202e", 0.0, -1.5, "length", "[red]2"),
        CompletionRow("train", "a", "b", 1.0, 0.5),
    ]
    text = render(completions_table(7, rows), 120)
    assert "Completions of step 7, training" in text
    assert "[bold]1+1=[/bold]" in text and "2\\n\\e[31m\\u202e [length]" in text and "[red]2" in text
    assert "-1.50" in text and "+0.50" in text
    roles = [{"role": "actor", "engine": "[fsdp]"}, {"role": "rollout", "devices": 1}]
    assert "[fsdp]" in render(startup_table(roles))
    assert "16,384" in render(batch_table({"tokens": 16384, "mode": "x"}))


def test_validation_rows_have_no_advantage_column() -> None:
    assert "advantage" not in render(completions_table(1, [CompletionRow("val", "p", "r", 1.0)]))


def test_completions_come_when_it_is_their_turn() -> None:
    file = io.StringIO()
    sink = ConsoleSink(Console(file=file, width=100), total_steps=30, completions_freq=10)
    for step in (9, 10, 11, 20):
        sink.completions(
            step, [CompletionRow("train", f"prompt {step}", "r", 1.0), CompletionRow("val", "no", "r", 1.0)]
        )
    assert re.findall(r"prompt \d+", file.getvalue()) == ["prompt 10", "prompt 20"] and "no " not in file.getvalue()
    silent = ConsoleSink(Console(file=io.StringIO()), total_steps=30)
    silent.completions(10, [CompletionRow("train", "p", "r", 1.0)])


def test_result_names_report_and_next_command(tmp_path: Path) -> None:
    file, report = io.StringIO(), tmp_path / "report.html"
    console = Console(file=file, width=60)
    ConsoleSink(console, total_steps=1, report=report, next_command="do [this]").finish(SUMMARY)
    assert "report.html" not in file.getvalue()
    report.write_text("")
    ConsoleSink(console, total_steps=1, report=report, next_command="do [this]").finish(SUMMARY)
    text = file.getvalue()
    assert "35.2 % -> 97.1 %" in text and "greedy" not in text and "60 in 1:04" in text
    assert f"Report    {report}" in text and "Try next  do [this]" in text
    assert "-" in render(summary_panel(SUMMARY | {"accuracy_after": None}))


def test_small_words() -> None:
    assert visible("abc \u00e9 \u4e2d") == "abc \u00e9 \u4e2d"
    assert visible("a\nb", keep="\n") == "a\nb" and visible("a\tb\x00\u2066") == "a\\tb\\x00\\u2066"
    assert shorten("x" * 10, 10) == "x" * 10 and len(shorten("x" * 11, 10)) == 10
    assert [duration(seconds) for seconds in (3.4, 61, 3700, 55200)] == ["3s", "1:01", "1:01:40", "15h20m"]
    assert [size(number) for number in (12, 2048, 3e9)] == ["12 B", "2.0 KiB", "2.8 GiB"]
    assert [score(value) for value in (None, 0.5, -0.25)] == ["-", "50.0 %", "-0.250"]


@pytest.mark.quiet
def test_a_step_costs_little(tmp_path: Path) -> None:
    """50 metrics to console and files: a guard against something quadratic, generous for a busy machine."""
    console = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", width=120)
    tracker = Tracker([JsonlSink(tmp_path), ConsoleSink(console, total_steps=200)])
    many = {f"extra/{index}": index / 7 for index in range(40)}
    started = time.perf_counter()
    for step in range(1, 101):
        tracker.log(step, metrics(step) | many)
    assert (time.perf_counter() - started) / 100 < 0.03


def test_color_follows_the_console() -> None:
    progress = ProgressLines(total_steps=5, width=120, color=False)
    line = progress.step(1, metrics(1))[-1]
    assert isinstance(line, Text) and "gen 36%" in line.plain and "\u2501" not in line.plain


def test_memory_is_told_when_it_is_news() -> None:
    """At first, when a phase takes over 5 % more, and when something else is offloaded."""
    gib = float(1 << 30)
    peaks = {"memory/generate_peak_bytes": 74.1 * gib, "memory/update_peak_bytes": 98.7 * gib}
    first = peaks | {"memory/device_bytes": 139.8 * gib, "reward/mean": 0.5}
    line = MemoryLine()
    assert line.step(first) == "memory, GiB: generate 74.1, update 98.7 of 139.8"
    assert line.step(first) is None
    assert line.step(first | {"memory/update_peak_bytes": 103 * gib}) is None
    told = line.step(first | {"memory/offloaded_bytes/ref_weights": 2.94 * gib})
    assert told == "memory, GiB: generate 74.1, update 98.7 of 139.8; offloaded: ref weights 2.9"
    assert line.step(first | {"memory/update_peak_bytes": 104 * gib}) is not None
    assert MemoryLine().step({"reward/mean": 0.5}) is None


def test_memory_that_goes_up_and_down_is_told_once() -> None:
    line, peaks = MemoryLine(), [float(gib << 30) for gib in (100, 50, 100, 104, 106)]
    told = [line.step({"memory/update_peak_bytes": peak}) is not None for peak in peaks]
    assert told == [True, False, False, False, True]
    told = [line.step({"memory/update_peak_bytes": 50.0, f"memory/offloaded_bytes/{p}": 1.0}) for p in "ab"]
    assert None not in told and line.step({"memory/update_peak_bytes": 106.0 * (1 << 30)}) is None
