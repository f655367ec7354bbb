"""Memory of the devices as the driver sees it: room for the replicas, and what a step took of it."""

from __future__ import annotations

from collections.abc import Sequence

from workers.group import WorkerGroup
from workers.memory import MemoryReport
from workers.train_worker import TrainWorker

PHASE_OF = {"forward": "annotate", "update": "update", "publish": "sync"}
"""The phase of a step that a rank's call belongs to; other calls are not part of one."""


class TrainingMemory:
    """What the training ranks hold. groups: all; beside: of each replica, the ranks on devices that it uses too."""

    def __init__(
        self, groups: Sequence[WorkerGroup], beside: Sequence[Sequence[WorkerGroup]], *, timeout_s: float
    ) -> None:
        self._groups = tuple(groups)
        self._beside = tuple(beside)
        self._timeout_s = timeout_s

    def make_room(self, num_bytes: int, share: float = 0.0, replica: int | None = None) -> None:
        """Frees so much on every device of a replica, or of all, as far as training can do without it for now.

        share: if not 0, the replica starts, and wants at least this share of each device.
        """
        if num_bytes or share:
            chosen = self._beside if replica is None else (self._beside[replica],)
            calls = [ranks.broadcast(TrainWorker.make_room, num_bytes, share) for beside in chosen for ranks in beside]
            for call in calls:
                call.result(self._timeout_s)

    def is_crowded(self) -> bool:
        """Whether not all that training holds, or will make, fits beside the replicas: some of it is in host memory,
        or optimizer state that was not made yet finds no room."""
        return any(report.offloaded or report.lacking_bytes for report in self._reports(take=False))

    def take_metrics(self, peaks: dict[str, int]) -> dict[str, float]:
        """memory/* of all devices since the last call. peaks: by phase, as the replicas saw them."""
        peaks, total = dict(peaks), 0
        offloaded: dict[str, int] = {}
        for report in self._reports(take=True):
            for call, size in report.peaks.items():
                if phase := PHASE_OF.get(call):
                    peaks[phase] = max(peaks.get(phase, 0), size)
            for part, size in report.offloaded.items():
                offloaded[part] = max(offloaded.get(part, 0), size)
            total = max(total, report.total_bytes)
        metrics = {f"memory/{phase}_peak_bytes": float(size) for phase, size in peaks.items()}
        metrics |= {f"memory/offloaded_bytes/{part}": float(size) for part, size in offloaded.items()}
        return metrics | {"memory/device_bytes": float(total)}

    def _reports(self, *, take: bool) -> list[MemoryReport]:
        calls = [group.broadcast(TrainWorker.memory_report, take) for group in self._groups]
        return [report for call in calls for report in call.result(self._timeout_s)]
