"""The line that says how much memory each phase of a step took; printed when there is something new."""

from __future__ import annotations

from collections.abc import Mapping

from trainer.tracking.progress import PHASES

_GIB = 1 << 30
_GROWTH = 1.05
_OFFLOADED = "memory/offloaded_bytes/"


class MemoryLine:
    """Remembers the most that was shown, and speaks again when a phase needs over 5 % more than that, or something else
    is offloaded."""

    def __init__(self) -> None:
        self._shown: dict[str, float] = {}
        self._offloaded: set[str] = set()

    def step(self, numbers: Mapping[str, float]) -> str | None:
        """The line of a step, or None. numbers: its metrics."""
        peaks = {phase: numbers[name] for phase in PHASES if (name := f"memory/{phase}_peak_bytes") in numbers}
        offloaded = {name.removeprefix(_OFFLOADED): v for name, v in numbers.items() if name.startswith(_OFFLOADED)}
        has_grown = any(size > _GROWTH * self._shown.get(phase, 0.0) for phase, size in peaks.items())
        if not has_grown and offloaded.keys() <= self._offloaded:
            return None
        self._shown |= {phase: max(size, self._shown.get(phase, 0.0)) for phase, size in peaks.items()}
        self._offloaded |= offloaded.keys()
        of = f" of {_gib(total)}" if (total := numbers.get("memory/device_bytes")) else ""
        line = f"memory, GiB: {', '.join(f'{phase} {_gib(size)}' for phase, size in peaks.items())}{of}"
        away = ", ".join(f"{part.replace('_', ' ')} {_gib(size)}" for part, size in offloaded.items())
        return f"{line}; offloaded: {away}" if away else line


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / _GIB:.1f}"
