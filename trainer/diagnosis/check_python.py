"""Checks of the interpreter, the operating system and the machine's resources. Pure: facts in, items out."""

from __future__ import annotations

from collections.abc import Iterator

from trainer.diagnosis import database
from trainer.diagnosis.facts import GIB, Facts, Host
from trainer.diagnosis.items import MACHINE, SHELL, Command, Item, broken, ok, pip, warning

OLDEST, END = (3, 11), (3, 14)
"""Of Python; the same as `tandem.python` of the database, for where nothing can read a range."""

_FEWEST_FILES, _WANTED_FILES = 1024, 65536
_FEWEST_PROCESSES, _WANTED_PROCESSES = 512, 4096
_SHM_WANTED, _TEMP_WANTED, _MEMORY_WANTED = 2 * GIB, 5 * GIB, 4 * GIB


def python(facts: Facts) -> Iterator[Item]:
    """Its version; whether pip may write here; whether versions can be read at all."""
    name, version = "Python", facts.python_version
    remedy = "make an environment with a supported one", Command(SHELL, "PYTHON=python3.12 bash scripts/install.sh")
    if facts.python[:2] < OLDEST:
        yield broken(name, f"{version} is too old: Tandem needs 3.11 to 3.13", *remedy)
    elif facts.python[:2] >= END:
        yield broken(name, f"{version} is newer than what Tandem and vLLM are made for: 3.11 to 3.13", *remedy)
    elif facts.managed:
        reason = f"{version} of the system, where pip may not write; vLLM needs versions of its own of many projects"
        yield warning(name, reason, "use an environment", Command(SHELL, "bash scripts/install.sh"))
    else:
        yield ok(name, f"{version} in {facts.prefix}" + ("" if facts.virtual else " (no virtual environment)"))
    if not facts.packaging:
        reason = "neither packaging nor pip is there to read versions with; nothing is said about versions"
        yield broken("packaging", reason, "", Command("shell", "python -m ensurepip"), pip("install", "packaging"))


def operating_system(facts: Facts) -> Iterator[Item]:
    """vLLM runs on Linux; its wheels are built for x86_64 and aarch64."""
    host = facts.host
    shown = " ".join(part for part in (host.system, host.machine, host.libc) if part)
    if host.system != "Linux":
        yield broken("system", f"{shown}: vLLM runs on Linux only", "use the image of docker/Dockerfile.cpu")
    elif host.machine not in ("x86_64", "aarch64"):
        yield warning("system", f"{shown}: vLLM has no wheels for this processor", "build vLLM from source")
    else:
        yield ok("system", f"{shown}, {host.cores} cores")


def memory(facts: Facts) -> Iterator[Item]:
    """Host memory: a model's optimizer state and weights on their way pass through it."""
    host = facts.host
    shown = f"{_gib(host.memory_free)} free of {_gib(host.memory_total)}"
    if host.memory_total and host.memory_free < _MEMORY_WANTED:
        reason = f"{shown}: Ray ends processes when the machine is at 95 %"
        yield warning("memory", reason, "end what else runs here (ps aux --sort=-rss | head)")
    else:
        yield ok("memory", shown)


def shared_memory(facts: Facts) -> Iterator[Item]:
    """/dev/shm holds Ray's object store; the weight sync uses anonymous files of its own."""
    host, name = facts.host, "shared memory"
    grow = Command(MACHINE, "sudo mount -o remount,size=16g /dev/shm")
    docker = "in a container: docker run --shm-size=16g; else"
    if host.shm_total is None or not host.shm_writable:
        what = "there is no /dev/shm" if host.shm_total is None else "/dev/shm cannot be written"
        mount = Command(MACHINE, "sudo mount -t tmpfs -o mode=1777,size=16g tmpfs /dev/shm")
        yield broken(name, f"{what}: Python's locks between processes and Ray's object store live there", docker, mount)
    elif not host.memfd:
        yield broken(
            name, "memfd_create is refused, and the weight sync needs it", "allow it in the container's seccomp"
        )
    elif host.shm_free < _SHM_WANTED:
        reason = f"/dev/shm has {_gib(host.shm_free)} free of {_gib(host.shm_total)}: Ray will use the disk, slowly"
        yield warning(name, reason, docker, grow)
    else:
        yield ok(name, f"/dev/shm {_gib(host.shm_free)} free of {_gib(host.shm_total)}")


def limits(facts: Facts) -> Iterator[Item]:
    """What the shell allows: Ray opens many files and starts many threads."""
    found = [
        *_limit(facts.host, "open files", "-n", _FEWEST_FILES, _WANTED_FILES, 4096),
        *_limit(facts.host, "processes", "-u", _FEWEST_PROCESSES, _WANTED_PROCESSES, _WANTED_PROCESSES),
    ]
    soft, _ = facts.host.limits.get("locked memory", (None, None))
    if soft is not None and facts.host.infiniband:
        reason = f"locked memory is limited to {soft >> 10} KiB: NCCL cannot register memory with InfiniBand"
        found.append(
            warning("limits", reason, "docker run --ulimit memlock=-1, or", Command(SHELL, "ulimit -l unlimited"))
        )
    yield from found
    if not found:
        shown = ", ".join(f"{k} {'unlimited' if s is None else s}" for k, (s, _) in facts.host.limits.items())
        yield ok("limits", shown.replace("locked memory", "locked bytes") or "not read")


def ports(facts: Facts) -> Iterator[Item]:
    """Ray's processes, and torch's, talk over the loopback."""
    host = facts.host
    if host.loopback_error:
        reason = f"no port can be opened on 127.0.0.1: {host.loopback_error}"
        yield broken("ports", reason, "bring the loopback up", Command(MACHINE, "sudo ip link set lo up"))
    elif host.ray_port_taken and not facts.environ.get("RAY_ADDRESS"):
        reason = "loopback works; a server answers on 6379: if it is Ray's, RAY_ADDRESS=auto joins it"
        yield ok("ports", reason)
    else:
        yield ok("ports", "loopback works")


def disk(facts: Facts) -> Iterator[Item]:
    """Ray's temporary directory: it stops spilling objects when the disk is at 95 %."""
    host = facts.host
    shown = f"{host.temp} has {_gib(host.temp_free)} free of {_gib(host.temp_total)}"
    name = "disk"
    if not host.temp_total:
        reason = f"{host.temp}, where Ray puts sessions and overflow, is not there"
        yield warning(name, reason, "make it, or name another place", Command(SHELL, "export RAY_TMPDIR=/tmp"))
    elif host.temp_free < _TEMP_WANTED or host.temp_free < 0.05 * host.temp_total:
        remedy = "make room there, or name another place"
        yield warning(
            name, f"{shown}: Ray puts sessions and overflow there", remedy, Command(SHELL, "export RAY_TMPDIR=...")
        )
    else:
        yield ok(name, shown)


def _limit(host: Host, what: str, flag: str, fewest: int, wanted: int, enough: int) -> Iterator[Item]:
    soft, hard = host.limits.get(what, (None, None))
    if soft is None or soft >= enough:
        return
    to = wanted if hard is None else min(wanted, hard)
    raise_it = Command(SHELL, f"ulimit {flag} {to}")
    above = (
        f"; the hard limit of {hard} is set in /etc/security/limits.conf" if hard is not None and hard < enough else ""
    )
    reason = f"{what}: at most {soft}{above}; Ray and vLLM need some thousands"
    yield (broken if soft < fewest else warning)("limits", reason, "", raise_it)


def supported_python() -> str:
    """The range in the database, for a test that holds both equal."""
    return database.load().tandem["python"]


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
