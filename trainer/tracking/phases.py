"""Where the time of a step goes.

    phases = Phases()
    phases.step(1)
    with phases("generate"):
        ...
    metrics = phases.metrics()  # time/generate, time/step, time/other, memory/driver_rss_bytes

Every second belongs to exactly one phase: a phase opened inside another stops the outer one's clock, so phases and
`time/other` always add up to `time/step`. One thread only: the driver's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil


class Phases:
    """Wall-clock time by phase, of the current step and of the whole run."""

    def __init__(self, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._process = psutil.Process()
        self._open: list[str] = []
        self._mark = clock()
        self._step: int | None = None
        self._step_start = self._mark
        self._seconds: dict[str, float] = {}
        self._rss_bytes = 0
        self._totals: dict[str, float] = {}

    def step(self, step: int) -> None:
        """Begin a step; the one before ends here."""
        assert not self._open, f"step {step} began inside phase {self._open[-1]!r}"
        self._totals = self.totals
        self._step = step
        self._step_start = self._clock()
        self._seconds = {}
        self._rss_bytes = 0

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count the time inside as phase `name`, and name the phase in an exception that passes through."""
        self._charge()
        self._open.append(name)
        try:
            yield
        except BaseException as error:
            error.add_note(f"while in phase {name!r}" + ("" if self._step is None else f" of step {self._step}"))
            raise
        finally:
            self._charge()
            self._open.pop()
            self._read_memory()

    def metrics(self) -> dict[str, float]:
        """`time/<phase>` (seconds) of each phase of this step so far, `time/step`, `time/other`, and
        `memory/driver_rss_bytes`, the highest of the readings taken at the end of each phase."""
        now = self._charge()
        self._read_memory()
        total = now - self._step_start
        times = {f"time/{name}": seconds for name, seconds in self._seconds.items()}
        other = max(0.0, total - sum(times.values()))
        return times | {"time/step": total, "time/other": other, "memory/driver_rss_bytes": float(self._rss_bytes)}

    @property
    def totals(self) -> dict[str, float]:
        """Seconds per phase since the start. "other" is the rest of the time since the first step; phases before the
        first step (start-up) have their entry but no rest."""
        now = self._charge()
        totals = dict(self._totals)
        for name, seconds in self._seconds.items():
            totals[name] = totals.get(name, 0.0) + seconds
        if self._step is not None:
            rest = now - self._step_start - sum(self._seconds.values())
            totals["other"] = totals.get("other", 0.0) + max(0.0, rest)
        return totals

    def _charge(self) -> float:
        """Give the time since the last mark to the innermost open phase; returns the present."""
        now = self._clock()
        if self._open:
            name = self._open[-1]
            self._seconds[name] = self._seconds.get(name, 0.0) + now - self._mark
        self._mark = now
        return now

    def _read_memory(self) -> None:
        self._rss_bytes = max(self._rss_bytes, self._process.memory_info().rss)
