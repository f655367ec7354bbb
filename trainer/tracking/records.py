"""What sinks receive: plain numbers per step, and sample completions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

Metrics = Mapping[str, float]
"""Metric name (see docs/metrics.md) to value."""


@dataclass(frozen=True, slots=True)
class CompletionRow:
    """One response as shown to people and kept in completions.jsonl.

    phase: "train" or "val".
    advantage: of the response, averaged over its tokens; None where there is none (validation).
    finish_reason: "stop", "length", "abort" or "error".
    ground_truth: as text; "" where the data has none.
    """

    phase: str
    prompt: str
    response: str
    reward: float
    advantage: float | None = None
    finish_reason: str = "stop"
    ground_truth: str = ""

    def as_json(self, step: int) -> dict[str, Any]:
        """The row as a JSON object, numbers that JSON lacks as null."""
        row = {"step": step, **asdict(self)}
        row["reward"] = json_number(self.reward)
        row["advantage"] = json_number(self.advantage)
        return row


class Sink(Protocol):
    """A place that metrics go to. A sink that is off does not exist: nothing asks whether it is on."""

    def log(self, step: int, metrics: Metrics) -> None:
        """Take the metrics of a step. Step 0 is the validation before the first step."""

    def completions(self, step: int, rows: Sequence[CompletionRow]) -> None:
        """Take sample completions of a step."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Flush and close. `summary` is the content of summary.json."""


def json_number(value: Any) -> int | float | None:
    """A number as JSON can hold it: numpy scalars unwrapped; NaN, infinities and None become None."""
    if value is None:
        return None
    if isinstance(value, int):
        return int(value)
    number = float(value)
    return number if math.isfinite(number) else None
