"""Run the real command line as a user does, and read what it leaves behind.

    with launch(tmp_path / "run", "trainer.total_training_steps=4") as process:
        outcome = process.wait()
    assert outcome.status == 0, outcome.told
    steps = outcome.steps()

Every process that a run starts belongs to its session or carries its mark in the environment (processes that set their
title lose the one, processes that start a session the other), so that a test can prove that none is left, and end those
of its own runs only, whoever else uses Ray on the machine.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[2]
MAIN_STEPS = 25
"""Steps of the run that others are compared with."""
NO_VALIDATION = ("data.val_files=null", "trainer.test_freq=-1")
RUN_TIMEOUT_S = 240.0
CLEANUP_TIMEOUT_S = 20.0
MARK = "TANDEM_E2E_MARK"
_NOT_INHERITED = ("RAY_ADDRESS", "RAY_AUTH_MODE", "PYTHONPATH", "WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL")
_LINGERING = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Ray 2.60's own helpers: after the driver was killed they wait a minute for a cluster that is no more, then end."""
_VARYING = ("time/", "perf/", "memory/", "rollout/")
Record = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Outcome:
    """A process that has ended. directory: of the run; seconds: how long the process lived."""

    directory: Path
    arguments: tuple[str, ...]
    status: int
    stdout: str = field(repr=False)
    stderr: str = field(repr=False)
    seconds: float

    @property
    def told(self) -> str:
        """All that a person saw, for messages of failed assertions."""
        return (
            f"status {self.status} after {self.seconds:.1f} s: {' '.join(self.arguments)}\n"
            f"--- stdout\n{self.stdout[-3000:]}\n--- stderr\n{self.stderr[-3000:]}"
        )

    @property
    def complaints(self) -> str:
        """Stderr without what Ray says of a disk that is nearly full: of the machine and not of the run."""
        lines = self.stderr.splitlines(keepends=True)
        return "".join(line for line in lines if "file_system_monitor.cc" not in line)

    def records(self) -> list[Record]:
        """All lines of metrics.jsonl."""
        return read_jsonl(self.directory / "metrics.jsonl")

    def steps(self) -> list[Record]:
        """Lines of training steps, in the order written."""
        return [record for record in self.records() if record["step"] > 0]

    def summary(self) -> Record:
        """summary.json."""
        content: Record = json.loads((self.directory / "summary.json").read_text())
        return content

    def checkpoints(self) -> list[Path]:
        """Directories of complete checkpoints, oldest first."""
        return sorted((self.directory / "checkpoints").glob("step_*"))


class Process:
    """A run under way, in a process group of its own like a job of an interactive shell."""

    def __init__(self, directory: Path, arguments: tuple[str, ...], environment: Mapping[str, str]) -> None:
        self.directory = directory
        self._mark = uuid.uuid4().hex
        self._killed = False
        self._arguments = arguments
        directory.parent.mkdir(parents=True, exist_ok=True)
        self._out = directory.with_name(f"{directory.name}.{self._mark[:6]}.out")
        self._err = self._out.with_suffix(".err")
        inherited = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
        self._started = time.monotonic()
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self._popen = subprocess.Popen(
                [sys.executable, "-m", "trainer.main", *arguments],
                cwd=ROOT,
                env={**inherited, "NETRC": os.devnull, **environment, MARK: self._mark},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    def wait(self, timeout_s: float = RUN_TIMEOUT_S) -> Outcome:
        """Wait for the end; AssertionError with the output if it does not come."""
        try:
            status = self._popen.wait(max(0.0, timeout_s - (time.monotonic() - self._started)))
        except subprocess.TimeoutExpired:
            stuck = self._outcome(-1)
            raise AssertionError(f"the run did not end in {timeout_s:.0f} s\n{stuck.told}") from None
        return self._outcome(status)

    def wait_for_step(self, step: int) -> Record:
        """Wait until the line of a training step is written; returns it."""

        def written() -> Record | None:
            status = self._popen.poll()
            found = [r for r in read_jsonl(self.directory / "metrics.jsonl") if r["step"] >= step]
            if not found and status is not None:
                raise AssertionError(f"the run ended before step {step}\n{self._outcome(status).told}")
            return found[-1] if found else None

        return wait_until(written, RUN_TIMEOUT_S, f"step {step}")

    def kill(self) -> None:
        """SIGKILL to the driver alone: it can tell nobody."""
        self._killed = True
        self._popen.kill()
        self._popen.wait()

    def interrupt(self) -> None:
        """SIGINT to the process group: what Ctrl-C does in a terminal."""
        os.killpg(self._popen.pid, signal.SIGINT)

    def survivors(self) -> dict[int, str]:
        """Processes of this run that still live: pid to command line; after a kill without those that end later."""
        alive = started_by(self._popen.pid, self._mark)
        ignored = _LINGERING if self._killed else ()
        return {pid: command for pid, command in alive.items() if not command.startswith(ignored)}

    def close(self) -> None:
        """The run has ended: AssertionError unless all that it started ends too."""
        try:
            assert self._popen.poll() is not None, "wait for the run, or kill it"
            wait_until(lambda: not self.survivors(), CLEANUP_TIMEOUT_S, "the end of the run's processes")
        finally:
            self.end_survivors()

    def end_survivors(self) -> None:
        """SIGKILL to every process of this run."""
        end_processes(started_by(self._popen.pid, self._mark))

    def _outcome(self, status: int) -> Outcome:
        return Outcome(
            directory=self.directory,
            arguments=self._arguments,
            status=status,
            stdout=self._out.read_text(errors="replace"),
            stderr=self._err.read_text(errors="replace"),
            seconds=time.monotonic() - self._started,
        )


@contextmanager
def launch(
    directory: Path, *overrides: str, config: str = "quickstart", environment: Mapping[str, str] | None = None
) -> Iterator[Process]:
    """Start `python -m trainer.main --config-name <config> <overrides>`; at the end no process of it may be left."""
    arguments = ("--config-name", config, f"trainer.default_local_dir={directory}", *overrides)
    process = Process(directory, arguments, environment or {})
    try:
        yield process
    except BaseException:
        process.end_survivors()
        raise
    process.close()


def run(
    directory: Path, *overrides: str, config: str = "quickstart", environment: Mapping[str, str] | None = None
) -> Outcome:
    """A whole run, from the command to its end."""
    with launch(directory, *overrides, config=config, environment=environment) as process:
        return process.wait()


def read_jsonl(path: Path) -> list[Record]:
    """Objects of a JSON-lines file that may be written to at this moment; none if it is missing."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """A data set of these rows."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def reproducible(record: Record) -> dict[str, float]:
    """The metrics of a step that must be the same whenever and wherever it is computed."""
    return {name: value for name, value in record.items() if not name.startswith(_VARYING)}


def started_by(session: int, mark: str) -> dict[int, str]:
    """Living processes of a session or with a mark in their environment: pid to command line."""
    wanted = f"{MARK}={mark}".encode()
    found: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, _, _, its_session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                marked = wanted in (entry / "environ").read_bytes().split(b"\0")
                if state != "Z" and (marked or int(its_session) == session):
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    found[int(entry.name)] = command.strip()
            except OSError:
                continue  # it ended while we looked, or is somebody else's
    return found


def end_processes(pids: Iterable[int]) -> None:
    """SIGKILL to each that still lives."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def wait_until(condition: Callable[[], T | None], timeout_s: float, what: str) -> T:
    """The first true result of `condition`; AssertionError after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        result = condition()
        if result:
            return result
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout_s:.0f} s in vain for {what}")
        time.sleep(0.02)
