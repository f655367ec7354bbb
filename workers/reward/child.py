"""The process that runs the reward function: receives chunks of samples, sends results back.

Started by `workers.reward.pool` as a fresh interpreter, never forked, and imports only the standard library and the
reward function. What runs here is the user's code, so the process expects the worst: each call has a time limit, kept
by a timer signal as long as Python code runs; the parent watches the progress record and kills what does not react.

Messages to the child: a list of samples `(data_source, solution_str, ground_truth, extra_info)`.
Messages from the child: None once (the reward function is loaded) or a string (why it could not be loaded), then
lists of `Result`, as many in all as samples came in.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import signal
import struct
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any

from workers.reward.function import ARGUMENTS, RewardFunction, RewardSpec, load_reward_function

Sample = tuple[str, str, Any, dict[str, Any]]
"""data_source, solution_str, ground_truth, extra_info."""

Result = tuple[float, dict[str, float], str]
"""score, parts, error ("" or what went wrong)."""

PROGRESS_BYTES = 16
FLUSH_SECONDS = 0.01
FLOAT32_MAX = 3.4e38
"""Rewards travel and are used in float32; what does not fit is as good as infinite."""
_PR_SET_PDEATHSIG = 1
_MAX_ERROR_CHARS = 300


@dataclass(frozen=True, slots=True)
class ChildArgs:
    """What the parent tells a new child.

    connection_fd, progress_fd: inherited file descriptors of the message pipe and of the shared progress record.
    parent_pid: the process to die with.
    timeout_s: seconds one call of the reward function may take.
    """

    connection_fd: int
    progress_fd: int
    parent_pid: int
    timeout_s: float
    path: str | None
    name: str


class Progress:
    """One record in shared memory: which sample of its chunk the child works on, and since when.

    The time is written before the index: a parent that reads between the two sees a sample that is not late.
    """

    def __init__(self, fd: int) -> None:
        self._memory = mmap.mmap(fd, PROGRESS_BYTES)

    def set(self, index: int) -> None:
        """The sample `index` starts now; -1: none yet, the length of the chunk: all done."""
        struct.pack_into("d", self._memory, 0, time.monotonic())
        struct.pack_into("q", self._memory, 8, index)

    def get(self) -> tuple[float, int]:
        """Start on the system's monotonic clock (the same in all processes), and index."""
        return struct.unpack_from("d", self._memory, 0)[0], struct.unpack_from("q", self._memory, 8)[0]

    def close(self) -> None:
        """Unmap the record."""
        self._memory.close()


class _CallTimeoutError(BaseException):
    """Not an Exception, so that `except Exception` in a reward function does not swallow it."""


def main(args: ChildArgs) -> None:
    """Serve until the parent closes the connection or dies."""
    _die_with(args.parent_pid)
    os.set_inheritable(args.connection_fd, False)  # what the reward function starts must not hold the pipe open
    os.set_inheritable(args.progress_fd, False)
    connection: Connection[Any, Any] = Connection(args.connection_fd)
    progress = Progress(args.progress_fd)
    try:
        function = load_reward_function(RewardSpec(args.path, args.name))
    except ValueError as error:
        connection.send(str(error))
        return
    try:
        connection.send(None)
        while True:
            _score_chunk(function, connection.recv(), connection, progress, args.timeout_s)
    except (EOFError, OSError):
        os._exit(0)  # the parent has gone; do not wait for threads of the reward function


def _die_with(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent dies, whatever it is doing then."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it died before the call above
        os._exit(0)


def _score_chunk(
    function: RewardFunction,
    samples: list[Sample],
    connection: Connection[Any, Any],
    progress: Progress,
    timeout_s: float,
) -> None:
    """Score in order; send results in batches so that a later crash costs no finished slow call."""
    results: list[Result] = []
    sent = time.monotonic()
    for index, sample in enumerate(samples):
        progress.set(index)
        results.append(_score(function, sample, timeout_s))
        if time.monotonic() - sent > FLUSH_SECONDS:
            progress.set(index + 1)
            connection.send(results)
            results, sent = [], time.monotonic()
    progress.set(len(samples))
    if results:
        connection.send(results)


def _score(function: RewardFunction, sample: Sample, timeout_s: float) -> Result:
    try:
        signal.signal(signal.SIGALRM, _interrupt)  # each time: reward functions use SIGALRM themselves
        signal.setitimer(signal.ITIMER_REAL, timeout_s)
        try:
            value = function(**dict(zip(ARGUMENTS, sample, strict=True)))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        return interpret(value)
    except _CallTimeoutError:
        return 0.0, {}, timed_out(timeout_s)
    except BaseException as error:  # SystemExit and KeyboardInterrupt too: a sample cannot end the run
        return 0.0, {}, _raised(error)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise _CallTimeoutError


def timed_out(timeout_s: float) -> str:
    """The error of a sample whose call took too long."""
    return f"timed out after {timeout_s:g} s"


def interpret(value: Any) -> Result:
    """What a reward function returned, as a result: a number, or a dictionary with a number under "score".

    The other numbers of a dictionary become parts; its other entries are dropped. Anything else is an error.
    """
    if not isinstance(value, dict):
        return _number(value, "returned")
    if "score" not in value:
        return 0.0, {}, f'returned a dictionary without "score" (keys: {", ".join(map(str, value))})'
    score, _, error = _number(value["score"], "returned score")
    if error:
        return 0.0, {}, error
    candidates = {str(name): _number(part, "") for name, part in value.items() if name != "score"}
    return score, {name: part for name, (part, _, bad) in candidates.items() if not bad}, ""


def _number(value: Any, what: str) -> Result:
    try:
        # float() would take "1.0"; a function that returns text has mixed something up
        number = None if isinstance(value, str | bytes | bytearray) else float(value)
    except (TypeError, ValueError):
        number = None
    except OverflowError:
        number = math.inf
    if number is None:
        return 0.0, {}, f"{what} {_short(value)} ({type(value).__name__}), not a number"
    fits = abs(number) <= FLOAT32_MAX  # not so for nan
    return (number, {}, "") if fits else (0.0, {}, f"{what} {number}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _raised(error: BaseException) -> str:
    try:
        message = f": {error}".rstrip(": ")
    except Exception:  # the user's own exception class may be broken, too
        message = ""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    return f"raised {type(error).__name__}{message}"[:_MAX_ERROR_CHARS] + where
