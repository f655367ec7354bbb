"""TensorBoard event files, written with the `tensorboard` package alone: importing torch's writer costs seconds."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.tracking.records import CompletionRow, Metrics


class TensorBoardSink:
    """Scalars into `<run_dir>/tensorboard`. Completions are left to completions.jsonl and the report.

    resume_step: last step that counts of an earlier process; TensorBoard hides what that one wrote after it.
    Raises ValueError if the package is not installed.
    """

    def __init__(self, run_dir: Path, *, resume_step: int | None = None) -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.event_file_writer import (
                EventFileWriter,
            )
        except ImportError as error:
            raise ValueError(
                "trainer.logger has tensorboard, which is not installed: pip install tensorboard, or remove it there"
            ) from error
        self._event, self._session, self._summary = event_pb2.Event, event_pb2.SessionLog, summary_pb2.Summary
        self._writer = EventFileWriter(str(run_dir / "tensorboard"))
        first = 0 if resume_step is None else resume_step + 1
        session = self._session(status=event_pb2.SessionLog.START)
        self._writer.add_event(self._event(wall_time=time.time(), step=first, session_log=session))

    def log(self, step: int, metrics: Metrics) -> None:
        """One event with all scalars of the step."""
        values = [self._summary.Value(tag=name, simple_value=float(value)) for name, value in metrics.items()]
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=self._summary(value=values)))

    def completions(self, step: int, rows: Sequence[CompletionRow]) -> None:
        """Nothing: TensorBoard's text panel shows tables badly."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Flush and close."""
        self._writer.close()
