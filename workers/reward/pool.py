"""Run a reward function in processes of its own, so that nothing it does can stop the run or pass unseen.

    with RewardPool(RewardSpec("my_reward.py"), num_workers=2, timeout_s=10.0) as pool:
        scores = pool.score([("openai/gsm8k", "... #### 42", "42", {})])

A call that raises, hangs, returns nonsense or takes its process down is an error of that sample alone. Processes live
across calls; samples go to them in chunks. Left out: threads (a hang in one cannot be ended, and timer signals only
reach the main thread) and multiprocessing pools (they cannot replace one killed process and keep the others' work).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection, Pipe, wait
from types import TracebackType
from typing import Any, Self

import numpy as np

from workers.protocol import Scores
from workers.reward.child import PROGRESS_BYTES, ChildArgs, Progress, Result, Sample, timed_out
from workers.reward.function import RewardSpec

MAX_CHUNK = 64
MIN_CHUNKS_PER_WORKER = 4
STARTUP_TIMEOUT_S = 120.0
GRACE_S = 0.25
"""A call that has not reacted to its interrupt this long after its time is up gets its process killed."""
PICKUP_GRACE_S = 10.0
"""The same for the moments between calls (receiving and sending), which only a starved machine makes long."""
MAX_IDLE_DEATHS = 3

_BOOT = """
import json, sys
a = json.loads(sys.argv[1])
sys.path[:] = a.pop("sys_path")
from workers.reward.child import ChildArgs, main
main(ChildArgs(**a))
"""


class _Child:
    """One reward process: its pipe, its progress record and the chunk it works on."""

    def __init__(self, spec: RewardSpec, timeout_s: float) -> None:
        self.connection: Connection[Any, Any]
        self.connection, theirs = Pipe()
        fd = os.memfd_create("tandem-reward")
        try:
            os.ftruncate(fd, PROGRESS_BYTES)
            self.progress = Progress(fd)
            args = ChildArgs(theirs.fileno(), fd, os.getpid(), timeout_s, spec.path, spec.name)
            boot = json.dumps({**asdict(args), "sys_path": [str(path) or os.getcwd() for path in sys.path]})
            self.process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, boot],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), fd),
                start_new_session=True,  # Ctrl-C is the driver's; and a kill reaches what the reward function started
            )
        finally:
            theirs.close()
            os.close(fd)
        self.timeout_s = timeout_s
        self.ready = False
        self.rows: list[int] = []  # of the chunk it works on
        self.num_done = 0
        self.progress.set(-1)

    def assign(self, samples: Sequence[Sample], rows: list[int]) -> None:
        """Send a chunk. OSError if the process has died meanwhile."""
        self.progress.set(-1)
        self.rows, self.num_done = rows, 0
        self.connection.send([samples[row] for row in rows])

    def deadline(self) -> float:
        """Monotonic time after which the process counts as hung."""
        if not self.ready:
            return self.progress.get()[0] + STARTUP_TIMEOUT_S
        if not self.rows:
            return math.inf
        since, index = self.progress.get()
        return since + self.timeout_s + (GRACE_S if 0 <= index < len(self.rows) else PICKUP_GRACE_S)

    def next_look(self) -> float:
        """Monotonic time at which to read the progress record again: a sample may have started since the last look."""
        soon = self.progress.get()[0] + self.timeout_s + GRACE_S
        busy = self.ready and self.rows
        return soon if busy and soon > time.monotonic() else self.deadline()

    def kill(self) -> int:
        """End the process and all that it started; its exit code, negative for a signal."""
        if self.process.returncode is None:  # else the number may belong to another process by now
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()

    def close(self) -> None:
        """Kill, and free the pipe and the shared memory."""
        self.kill()
        self.connection.close()
        self.progress.close()


class RewardPool:
    """`num_workers` processes that run the reward function `spec`, at most `timeout_s` seconds a call.

    Starting waits until every process has loaded the function; ValueError if it cannot be loaded there.
    Not for use from several threads; the thread that creates a pool must outlive it (its processes die with it).
    """

    def __init__(self, spec: RewardSpec, num_workers: int, timeout_s: float) -> None:
        if num_workers < 1:
            raise ValueError(f"reward.num_workers={num_workers}: at least one process must run the reward function")
        if timeout_s <= 0:
            raise ValueError(f"reward.timeout_s={timeout_s:g} must be a positive number of seconds")
        self._spec = spec.resolved()
        self._timeout_s = timeout_s
        self._samples: Sequence[Sample] = ()
        self._results: list[Result | None] = []
        self._chunks: deque[list[int]] = deque()
        self._idle_deaths = 0
        self._children: list[_Child] = []
        try:
            for _ in range(num_workers):
                self._children.append(_Child(self._spec, timeout_s))
            while not all(child.ready for child in self._children):
                self._wait()
        except BaseException:
            self.close()
            raise

    def score(self, samples: Sequence[Sample]) -> Scores:
        """Rewards of (data_source, solution_str, ground_truth, extra_info), in order. Never raises for a sample."""
        if not self._children:
            raise RuntimeError("the reward pool is closed")
        self._samples, self._results = samples, [None] * len(samples)
        self._chunks.extend(_chunks(len(samples), len(self._children)))
        try:
            while self._chunks or any(child.rows for child in self._children):
                self._assign()
                self._wait()
        except BaseException:  # Ctrl-C, say: a result of this call must not turn up in the next one
            self.close()
            raise
        results = [result for result in self._results if result is not None]
        assert len(results) == len(samples)
        return _scores(results)

    def pids(self) -> list[int]:
        """Process ids of the reward processes."""
        return [child.process.pid for child in self._children]

    def close(self) -> None:
        """Kill the processes. May be called again."""
        while self._children:
            self._children.pop().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _assign(self) -> None:
        """Give every idle process a chunk."""
        for child in list(self._children):
            if self._chunks and child.ready and not child.rows:
                try:
                    child.assign(self._samples, self._chunks.popleft())
                except OSError:
                    self._replace(child, overdue=False)

    def _wait(self) -> None:
        """Sleep until a process says something, dies, or is overdue; deal with it."""
        next_look = min(child.next_look() for child in self._children)
        by_connection = {child.connection: child for child in self._children}
        timeout = None if math.isinf(next_look) else max(0.0, next_look - time.monotonic())
        for connection in wait(list(by_connection), timeout):
            child = by_connection[connection]  # type: ignore[index]  # we passed connections only
            if not self._receive(child):
                self._replace(child, overdue=False)
        for child in list(self._children):
            if time.monotonic() > child.deadline():
                self._replace(child, overdue=True)

    def _receive(self, child: _Child) -> bool:
        """Take one message; False if the pipe has ended."""
        try:
            message = child.connection.recv()
        except (EOFError, OSError):
            return False
        if not child.ready:
            if message is not None:
                raise ValueError(message)
            child.ready = True
            return True
        for row, result in zip(child.rows[child.num_done :], message, strict=False):
            self._results[row] = result
        child.num_done += len(message)
        if child.num_done == len(child.rows):
            child.rows = []
        self._idle_deaths = 0
        return True

    def _replace(self, child: _Child, *, overdue: bool) -> None:
        """A dead or hung process: the sample it worked on is an error, the rest of its chunk goes back to the queue."""
        exit_code = child.kill()  # from here on its progress record and its pipe stand still
        while child.connection.poll() and self._receive(child):
            pass
        since, index = child.progress.get()
        if not child.ready:
            raise ValueError(_startup_failure(self._spec, overdue, exit_code))
        remaining = child.rows[child.num_done :]
        hung = time.monotonic() > since + self._timeout_s
        if remaining and child.num_done <= index < len(child.rows) and (hung or not overdue):
            error = f"{timed_out(self._timeout_s)} and had to be killed" if overdue else _crashed(exit_code)
            self._results[child.rows[index]] = (0.0, {}, error)
            remaining.remove(child.rows[index])
        else:
            self._count_idle_death(exit_code)
        if remaining:
            self._chunks.appendleft(remaining)
        child.close()
        self._children[self._children.index(child)] = _Child(self._spec, self._timeout_s)

    def _count_idle_death(self, exit_code: int) -> None:
        self._idle_deaths += 1
        if self._idle_deaths > MAX_IDLE_DEATHS:
            raise RuntimeError(
                f"reward processes ended {self._idle_deaths} times in a row without working on a sample "
                f"({_crashed(exit_code)}); is the machine out of memory?"
            )


def summarise_errors(scores: Scores) -> list[tuple[str, int]]:
    """The distinct errors with how often each occurred, most common first; equally common ones in order of rows."""
    return Counter(error for error in scores.errors if error).most_common()


def _chunks(num_samples: int, num_workers: int) -> list[list[int]]:
    """Rows cut into chunks small enough to balance the processes, large enough to cost nothing each."""
    size = max(1, min(MAX_CHUNK, math.ceil(num_samples / (num_workers * MIN_CHUNKS_PER_WORKER))))
    return [list(range(start, min(start + size, num_samples))) for start in range(0, num_samples, size)]


def _scores(results: list[Result]) -> Scores:
    names = sorted({name for _, parts, _ in results for name in parts})
    columns = {name: [parts.get(name, math.nan) for _, parts, _ in results] for name in names}
    return Scores(
        rewards=np.array([score for score, _, _ in results], dtype=np.float32),
        parts={name: np.array(column, dtype=np.float32) for name, column in columns.items()},
        errors=tuple(error for _, _, error in results),
    )


def _crashed(exit_code: int) -> str:
    if exit_code >= 0:
        return f"ended its process (exit code {exit_code})"
    return f"crashed its process ({signal.strsignal(-exit_code)})"


def _startup_failure(spec: RewardSpec, overdue: bool, exit_code: int) -> str:
    what = f"took longer than {STARTUP_TIMEOUT_S:g} s" if overdue else _crashed(exit_code)
    return f"reward.custom_reward_function.path={spec.path}: importing it in a reward process {what}"
