"""Look at the machine: memory, shared memory, limits, disk, ports. Reads /proc and /sys; takes milliseconds."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from trainer.diagnosis.facts import Host

RAY_PORT = 6379
_SHM = "/dev/shm"
_LIMITS = {"open files": "RLIMIT_NOFILE", "processes": "RLIMIT_NPROC", "locked memory": "RLIMIT_MEMLOCK"}


def look_at_host(environ: Mapping[str, str], *, network: bool = True) -> Host:
    """The facts of this machine. network: try ports of the loopback too."""
    total, free = _memory()
    shm_total, shm_free = _space(_SHM)
    temp = environ.get("RAY_TMPDIR") or environ.get("TMPDIR") or "/tmp"
    temp_total, temp_free = _space(temp)
    return Host(
        system=platform.system(),
        machine=platform.machine(),
        libc=" ".join(platform.libc_ver()).strip() if sys.platform.startswith("linux") else "",
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_total=total,
        memory_free=free,
        shm_total=shm_total,
        shm_free=shm_free,
        shm_writable=os.access(_SHM, os.W_OK),
        memfd=_memfd(),
        limits={name: _limit(constant) for name, constant in _LIMITS.items()},
        infiniband=bool(_listed("/sys/class/infiniband")),
        loopback_error=_loopback() if network else "",
        ray_port_taken=network and _answers(RAY_PORT),
        temp=temp,
        temp_total=temp_total or 0,
        temp_free=temp_free,
        interfaces=tuple(_listed("/sys/class/net")),
    )


def _memory() -> tuple[int, int]:
    """Total and free, of the container where it has less than the machine."""
    lines = (line.split() for line in _text("/proc/meminfo").splitlines())
    kib = {line[0].rstrip(":"): int(line[1]) for line in lines if len(line) > 1}
    total, free = kib.get("MemTotal", 0) << 10, kib.get("MemAvailable", 0) << 10
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        allowed, taken = _text(limit).strip(), _text(used).strip()
        if allowed.isdigit() and taken.isdigit() and int(allowed) < total:
            return int(allowed), min(free, int(allowed) - int(taken))
    return total, free


def _space(path: str) -> tuple[int | None, int]:
    """Size and free bytes of the file system of a path; None where it is not there."""
    try:
        found = os.statvfs(path)
    except OSError:
        return None, 0
    return found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize


def _memfd() -> bool:
    """Whether memory can be shared through anonymous files, as the weight sync does."""
    try:
        os.close(os.memfd_create("tandem-diagnose"))
    except (AttributeError, OSError):
        return False
    return True


def _limit(constant: str) -> tuple[int | None, int | None]:
    soft, hard = resource.getrlimit(getattr(resource, constant))
    return (None if soft == resource.RLIM_INFINITY else soft, None if hard == resource.RLIM_INFINITY else hard)


def _loopback() -> str:
    """Why no port can be opened on the loopback; empty if one can."""
    try:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(1)
            with socket.create_connection(listener.getsockname(), timeout=0.5):
                return ""
    except OSError as error:
        return str(error)


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=0.2):
        return True
    return False


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


def _listed(directory: str) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except OSError:
        return []
