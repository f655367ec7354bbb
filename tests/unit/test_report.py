"""The HTML report: complete, closed to hostile text, and robust against odd runs."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trainer.tracking import report as report_module
from trainer.tracking.charts import Series, line_chart, stacked_chart
from trainer.tracking.jsonl import JsonlSink
from trainer.tracking.records import CompletionRow
from trainer.tracking.report import learning_curve_svg, main, write_report
from trainer.tracking.run_data import history, read_history
from trainer.tracking.scales import domain, downsample, readable, step_ticks, tick_labels, ticks
from trainer.tracking.summary import write_summary

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> & \"q\" 'q' ${x} $command \x1b[31m\u202e"


class Page(HTMLParser):
    """Elements and texts of a page, and whether its tags nest."""

    VOID = ("meta", "input", "br", "line", "circle", "path", "rect", "link", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)

    def charts(self) -> list[dict[str, Any]]:
        return [json.loads(attrs["data-chart"] or "") for tag, attrs in self.tags if "data-chart" in attrs]

    def samples(self) -> list[dict[str, Any]]:
        return json.loads(self.texts["script"][0])  # type: ignore[no-any-return]


def write_run(run_dir: Path, num_steps: int, *, text: str = "1+1=") -> Path:
    sink = JsonlSink(run_dir)
    sink.log(0, {"val/accuracy": 0.35, "val/greedy_accuracy": 0.54, "time/validate": 0.4, "time/step": 0.4})
    for step in range(1, num_steps + 1):
        metrics = {
            "reward/mean": 1 - 0.6 * math.exp(-step / 10),
            "actor/ppo_kl": 1e-10,
            "actor/grad_norm": 500.0 if step == 20 else 0.5 + 0.01 * (step % 3),
            "actor/entropy": float("nan"),
            "response_length/mean": 4.0,
            "time/generate": 0.2,
            "time/update": 0.3,
            "time/step": 0.5,
            "perf/tokens": 100,
        }
        sink.log(step, metrics | ({"val/accuracy": 0.9} if step % 10 == 0 else {}))
        sink.completions(step, [CompletionRow("train", text, text, float(step % 2), 0.5, "stop", text)])
    (run_dir / "config.yaml").write_text(f"model:\n  path: '{text}'\n", encoding="utf-8", errors="replace")
    return run_dir


def finish(run_dir: Path, command: str = "python -m trainer.main --config-name quickstart") -> None:
    write_summary(
        run_dir,
        command=command,
        seconds_total=64.0,
        seconds_to_first_step=21.0,
        seconds_per_phase={"generate": 12.0, "update": 18.0},
    )


def page_of(run_dir: Path) -> Page:
    return Page(write_report(run_dir).read_text(encoding="utf-8"))


def test_report_of_a_finished_run(tmp_path: Path) -> None:
    finish(write_run(tmp_path, 60))
    page = page_of(tmp_path)
    text = "".join("".join(texts) for texts in page.texts.values())
    for expected in ("35.0 %", "90.0 %", "54.0 %", "--config-name quickstart", "Learning curve", "Where the time goes"):
        assert expected in text, expected
    assert "1 off the scale, as far as 500" in text
    assert "Entropy" not in page.texts["h3"]  # logged, but never a number
    assert len(page.samples()) == 60
    names = {series["n"] for chart in page.charts() for series in chart["s"]}
    assert {"training reward", "held-out accuracy", "generate", "update"} <= names


def test_report_needs_no_network(tmp_path: Path) -> None:
    finish(write_run(tmp_path, 3))
    text = write_report(tmp_path).read_text()
    addresses = set(re.findall(r"https?://[^\s\"'<]+", text)) - {"http://www.w3.org/2000/svg"}
    assert addresses == set()
    assert not re.search(r"""(src|href)=|@import|url\((?!#)""", text)
    assert "default-src 'none'" in text


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    run_dir = tmp_path / "<b>run"
    finish(write_run(run_dir, 2, text=HOSTILE), command=HOSTILE)
    page = page_of(run_dir)
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert not any(tag == "img" or "onerror" in attrs for tag, attrs in page.tags)
    sample = page.samples()[0]
    assert sample["prompt"] == HOSTILE.replace("\x1b", "\\e").replace("\u202e", "\\u202e")
    assert "<b>run" in page.texts["h1"]


@settings(max_examples=50)
@given(st.text(max_size=60))
def test_any_text_survives(text: str) -> None:
    rows = [{"step": 1, "prompt": text}]
    script = report_module._as_script(rows)
    assert not set(script) & set("<>&") and json.loads(script) == rows


@pytest.mark.parametrize("num_steps", [0, 1, 2])
def test_tiny_runs(tmp_path: Path, num_steps: int) -> None:
    page = page_of(write_run(tmp_path, num_steps))
    assert any("summary.json" in text for text in page.texts["dd"])
    assert len(page.samples()) == num_steps


def test_run_with_hardly_any_metrics(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 4, "mine/own": 3}\n{"step": 5, "reward/mean": nul')
    page = page_of(tmp_path)
    assert page.charts() == [] and page.samples() == []
    assert ("p", {"class": "empty", "": None}) in page.tags or "This run kept no completions." in page.texts["p"]


def test_no_metrics_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"metrics\.jsonl is missing or empty"):
        write_report(tmp_path)
    assert main([str(tmp_path)]) == 1 and "metrics.jsonl" in capsys.readouterr().err
    assert main([]) == 2 and "usage" in capsys.readouterr().err


def test_long_run_is_downsampled(tmp_path: Path) -> None:
    records = [
        {
            "step": step,
            "reward/mean": step / 1e4,
            "actor/entropy": 0.5 + 0.1 * (step % 2),
            "time/update": 1.0,
            "time/step": 1.0,
        }
        for step in range(1, 10001)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    path = write_report(tmp_path)
    assert path.stat().st_size < 600_000
    charts = Page(path.read_text()).charts()
    assert all(len(series["p"]) <= 570 for chart in charts for series in chart["s"])
    assert charts[0]["s"][0]["p"][0] == [1, 0.0001] and charts[0]["s"][0]["p"][-1] == [10000, 1]
    assert 'class="band"' in path.read_text()


def test_too_many_completions_are_thinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_module, "MAX_SAMPLE_CHARACTERS", 2000)
    page = page_of(write_run(tmp_path, 100, text="x"))
    steps = [sample["step"] for sample in page.samples()]
    assert 2 <= len(steps) <= 14 and steps[0] == 1 and steps[-1] == 100
    assert any("of 100 steps are shown" in text for text in page.texts["p"])


def test_command_line(tmp_path: Path) -> None:
    write_run(tmp_path, 2)
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "trainer.tracking.report", str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path / "report.html") and done.stderr == ""


def test_learning_curve_is_a_picture_of_its_own(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, 30) for name in ("a", "b", "c")]
    for chosen in (runs[:1], runs, [read_history(runs[0])]):
        svg = learning_curve_svg(chosen, title="A < B & C")
        root = ElementTree.fromstring(svg)
        words = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
        assert {"A < B & C", "35.0 %", "90.0 %", "training reward", "held-out accuracy", "step"} <= set(words)
        assert "prefers-color-scheme: dark" in svg
    assert learning_curve_svg([history([{"step": 1, "reward/mean": 0.5}])], title="one step")
    with pytest.raises(ValueError, match="no learning curve"):
        learning_curve_svg([tmp_path / "nothing"], title="x")


def test_history_merges_lines_of_a_step() -> None:
    run = history([{"step": 2, "a": 1, "b": None}, {"step": 1, "a": 3}, {"step": 2, "a": 5.0, "c": "text"}])
    assert run.of("a") == [(1, 3.0), (2, 5.0)] and run.of("b") == [] and run.of("c") == []
    assert run.first("a") == 3.0 and run.last("b") is None and run.last_step == 2


# Scales

finite = st.floats(-1e12, 1e12, allow_nan=False)


@given(st.lists(finite, min_size=1, max_size=50), st.booleans())
@example([5e-324], True)
@example([0.0, 5e-324], False)
def test_axis_covers_what_it_shows(values: list[float], zero: bool) -> None:
    low, high = domain(values, zero=zero)
    assert low < high and (not zero or low <= 0 <= high)
    marks = ticks(low, high, 4)
    slack = 1e-6 * (high - low) + 1e-9 * max(abs(low), abs(high))
    assert marks[0] <= low + slack and marks[-1] >= high - slack and 2 <= len(marks) <= 12
    assert len(tick_labels(marks)) == len(marks)


def test_a_spike_does_not_flatten_the_rest() -> None:
    assert domain([1.0] * 30 + [2.0, 1000.0]) == (1.0, 2.0)
    assert domain([0.0] * 5) == (0.0, 1.0)


@given(st.lists(finite, min_size=1, max_size=400), st.integers(3, 50))
def test_downsampling_keeps_ends_and_range(values: list[float], limit: int) -> None:
    points = [(float(step), value) for step, value in enumerate(values)]
    short = downsample(points, limit)
    assert len(short.points) == min(limit, len(points))
    assert short.points[0] == points[0] and short.points[-1] == points[-1]
    assert [x for x, _ in short.points] == sorted(x for x, _ in short.points)
    if short.low:
        assert min(short.low) == min(values) and max(short.high) == max(values)


def test_labels() -> None:
    assert tick_labels([0, 0.25, 0.5]) == ["0", "0.25", "0.50"]
    assert tick_labels([0, 2e-6, 4e-6]) == ["0", "2e-6", "4e-6"]
    assert tick_labels([0, 5000, 10000]) == ["0", "5e3", "1e4"]
    assert [readable(value) for value in (0, 0.0123, 45.12, 3.21e-6, 12345, 999.9)] == [
        "0", "0.0123", "45.1", "3.2e-6", "12,345", "1,000",
    ]  # fmt: skip
    assert step_ticks(0, 60, 6) == [0, 10, 20, 30, 40, 50, 60]
    assert step_ticks(3, 3, 6) == [3] and step_ticks(1, 2, 6) == [1, 2]


def test_charts_are_well_formed_and_in_bounds() -> None:
    series = [Series("a<b", [(1, 0.5), (2, 0.75)], "red"), Series("gap", [(2, 0.1)], "blue", dots=True)]
    for draw in (line_chart, stacked_chart):
        svg = draw(series, key="k", label='say "it"', x_range=(1, 2), width=400, height=190)
        root = ElementTree.fromstring(svg)
        assert root.attrib["aria-label"] == 'say "it"'
        for shape in root.iter("path"):
            numbers = [float(number) for number in re.findall(r"-?\d+\.?\d*", shape.attrib["d"])]
            assert all(0 <= x <= 400 for x in numbers[::2]) and all(0 <= y <= 190 for y in numbers[1::2])
