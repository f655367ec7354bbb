"""A run directory, read back: by the report, by summary.json and by the benchmarks."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.tracking.jsonl import COMPLETIONS_FILE, METRICS_FILE, read_jsonl


@dataclass(frozen=True)
class History:
    """The metrics of a run: per metric, (step, value) in ascending order of steps, nulls left out.

    Example: History({"reward/mean": [(1, 0.41), (2, 0.44)], "val/accuracy": [(0, 0.35)]})
    """

    series: Mapping[str, list[tuple[int, float]]]

    def of(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of a metric; empty if the run did not log it."""
        return self.series.get(name, [])

    def values(self, name: str) -> list[float]:
        """Values of a metric in the order of steps."""
        return [value for _, value in self.of(name)]

    def first(self, name: str) -> float | None:
        """First value of a metric, None if there is none."""
        return self.values(name)[0] if self.of(name) else None

    def before(self, name: str) -> float | None:
        """Value from before the first training step, None if it was not measured."""
        points = self.of(name)
        return points[0][1] if points and points[0][0] == 0 else None

    def last(self, name: str) -> float | None:
        """Last value of a metric, None if there is none."""
        return self.values(name)[-1] if self.of(name) else None

    @property
    def last_step(self) -> int:
        """Highest step that was logged, 0 for none."""
        return max((points[-1][0] for points in self.series.values() if points), default=0)


def read_history(run_dir: Path) -> History:
    """metrics.jsonl of a run. Where a step has several lines the later line wins, metric by metric."""
    return history(read_jsonl(run_dir / METRICS_FILE))


def history(records: Iterable[Mapping[str, Any]]) -> History:
    """Columns from records {"step": step, name: value, ...}."""
    columns: defaultdict[str, dict[int, float]] = defaultdict(dict)
    for record in records:
        step = int(record["step"])
        for name, value in record.items():
            if name != "step" and isinstance(value, (int, float)):
                columns[name][step] = float(value)
    return History({name: sorted(column.items()) for name, column in columns.items()})


def read_completions(run_dir: Path) -> Iterator[dict[str, Any]]:
    """Rows of completions.jsonl, as written by JsonlSink."""
    return read_jsonl(run_dir / COMPLETIONS_FILE)


def read_summary(run_dir: Path) -> dict[str, Any]:
    """summary.json, {} for a run that has not ended."""
    path = run_dir / "summary.json"
    if not path.exists():
        return {}
    summary = json.loads(path.read_text())
    assert isinstance(summary, dict)
    return summary
