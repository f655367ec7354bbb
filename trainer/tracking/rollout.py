"""What the rollout replicas did, second by second: rollout.jsonl, and a few numbers of it for each step.

tail -f <run>/rollout.jsonl
{"time": 1760000000.1, "replica": 0, "running": 64, "waiting": 3, "cache_use": 0.41, ...}
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import IO, TYPE_CHECKING

from trainer.tracking.jsonl import remove_partial_line
from trainer.tracking.records import json_number

if TYPE_CHECKING:
    from workers.rollout.watch import Reading

ROLLOUT_FILE = "rollout.jsonl"


class RolloutLog:
    """Takes readings. One line each in the file, which is opened at the first one; `take` reduces them."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / ROLLOUT_FILE
        self._file: IO[bytes] | None = None
        self._readings: list[Reading] = []

    def observe(self, reading: Reading) -> None:
        """One more reading."""
        self._readings.append(reading)
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            remove_partial_line(self._path)
            self._file = self._path.open("ab")
        self._file.write(json.dumps(_record(reading), allow_nan=False).encode() + b"\n")
        self._file.flush()

    def take(self) -> dict[str, float]:
        """Metrics rollout/* of the readings since the last call; what vLLM does not tell is left out."""
        readings, self._readings = self._readings, []
        if not readings:
            return {}
        seconds: defaultdict[int, float] = defaultdict(float)
        for reading in readings:
            seconds[reading.replica] += reading.seconds
        cache_use = [r.status.cache_use for r in readings if not math.isnan(r.status.cache_use)]
        metrics = {
            "rollout/running_max": float(max(r.status.running for r in readings)),
            "rollout/waiting_max": float(max(r.status.waiting for r in readings)),
            "rollout/preemptions": float(sum(r.preemptions for r in readings)),
            "rollout/tokens_per_second": _rate(sum(r.tokens for r in readings), max(seconds.values())),
        }
        return metrics | ({"rollout/cache_use_max": max(cache_use)} if cache_use else {})


def _record(reading: Reading) -> dict[str, float | int | None]:
    status = reading.status
    return {
        "time": round(reading.time, 3),
        "replica": reading.replica,
        "pid": status.pid,
        "running": status.running,
        "waiting": status.waiting,
        "cache_use": json_number(status.cache_use),
        "preemptions": status.preemptions,
        "tokens": status.tokens,
        "tokens_per_second": round(_rate(reading.tokens, reading.seconds), 1),
    }


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0
