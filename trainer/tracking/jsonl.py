"""metrics.jsonl and completions.jsonl: the record of a run that everything else is made from."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from trainer.tracking.records import CompletionRow, Metrics, json_number

METRICS_FILE = "metrics.jsonl"
COMPLETIONS_FILE = "completions.jsonl"


class JsonlSink:
    """Appends one line per step (metrics) and per response (completions), each flushed at once.

    Opening removes the partial last line that a killed process may have left.
    """

    def __init__(self, run_dir: Path) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._paths = (run_dir / METRICS_FILE, run_dir / COMPLETIONS_FILE)
        self._open()

    def log(self, step: int, metrics: Metrics) -> None:
        """One line {"step": step, name: value, ...}; a value that is not finite is null."""
        record: dict[str, Any] = {"step": step}
        record.update((name, json_number(value)) for name, value in metrics.items())
        self._write(self._metrics, [record])

    def completions(self, step: int, rows: Sequence[CompletionRow]) -> None:
        """One line per row."""
        self._write(self._completions, [row.as_json(step) for row in rows])

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Close both files."""
        self._metrics.close()
        self._completions.close()

    def truncate_after(self, step: int) -> None:
        """Drop what was written for steps after `step`: on resume, those steps are done again. -1 empties."""
        self.finish({})
        for path in self._paths:
            _keep_until(path, step)
        self._open()

    def _open(self) -> None:
        for path in self._paths:
            remove_partial_line(path)
        self._metrics, self._completions = (path.open("ab") for path in self._paths)

    @staticmethod
    def _write(file: IO[bytes], records: Sequence[dict[str, Any]]) -> None:
        text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
        file.write(text.encode())
        file.flush()


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file; none if it is missing. Lines cut short by a kill are skipped."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                yield record


def remove_partial_line(path: Path) -> None:
    """Cut the file after its last newline."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        position = end
        while position > 0:
            start = max(0, position - 65536)
            file.seek(start)
            newline = file.read(position - start).rfind(b"\n")
            if newline >= 0:
                position = start + newline + 1
                break
            position = start
        if position < end:
            file.truncate(position)


def _keep_until(path: Path, step: int) -> None:
    """Rewrite the file, atomically, with only the lines of steps up to `step`."""
    kept = path.with_name(path.name + ".tmp")
    with kept.open("wb") as file:
        for record in read_jsonl(path):
            if int(record["step"]) <= step:
                file.write(json.dumps(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(kept, path)
