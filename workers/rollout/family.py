"""The processes of one replica: its own and those its engine started. They end together, wherever they run."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from workers.group import Call, WorkerError

END_TIMEOUT_S = 60.0
"""Until killed processes must be gone, seconds: the driver of a GPU may hold them while it frees their memory."""


@dataclass(frozen=True, slots=True)
class Family:
    """node: Ray's id of it. members: (pid, start time in clock ticks since boot) of each, the replica's own first."""

    node: str
    members: tuple[tuple[int, int], ...]

    @property
    def pid(self) -> int:
        """Of the replica."""
        return self.members[0][0]


def family_of(actor: Any, group: str, rank: int) -> Family:
    """The processes of an actor that is up, and idle. Raises WorkerLost if it is dead."""
    call: Call[Family] = Call(group, "ping", (actor.__ray_call__.remote(_here),), (rank,))
    return call.result(END_TIMEOUT_S)[0]


def end_family(family: Family, group: str, rank: int) -> None:
    """Kills all of them, stopped ones too, and returns when they are gone and their devices free.

    Raises WorkerError naming processes that do not end. (`ray.kill` alone takes 5 s for a stopped process, and knows
    nothing of those that the engine started.)
    """
    beside = NodeAffinitySchedulingStrategy(family.node, soft=False)
    end = ray.remote(_end).options(num_cpus=0, scheduling_strategy=beside)
    call: Call[list[int]] = Call(group, "end", (end.remote(family.members),), (rank,))
    left = call.result(2 * END_TIMEOUT_S)[0]
    if left:
        raise WorkerError(f"{group} rank {rank}: killed processes do not end: {', '.join(map(str, left))}")


def _here(_: object) -> Family:
    pids = [os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))]
    births = [(pid, _birth(pid)) for pid in pids]
    return Family(ray.get_runtime_context().get_node_id(), tuple((pid, b) for pid, b in births if b is not None))


def _end(members: tuple[tuple[int, int], ...]) -> list[int]:
    """Kills the processes; those that are still there at the end of the time."""
    deadline = time.monotonic() + END_TIMEOUT_S
    while True:
        alive = [pid for pid, birth in members if _birth(pid) == birth]  # another birth: somebody else has the pid now
        if not alive or time.monotonic() > deadline:
            return alive
        for pid in alive:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _birth(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None if it is gone, or a zombie, which holds nothing."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
