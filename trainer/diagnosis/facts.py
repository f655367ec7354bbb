"""What the checks look at: one picture of an installation and a machine, taken once (`gather.py`), or made by a test.

Nothing here looks anything up. Sizes in bytes, times in seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.diagnosis.distributions import Damage, Distribution, Distributions

if TYPE_CHECKING:
    from workers.rollout.vllm.capabilities import Capabilities

GIB = 1 << 30


@dataclass(frozen=True)
class Torch:
    """The torch that would be imported. cuda, hip: what it was built for, None for neither (a CPU build)."""

    version: str
    cuda: str | None = None
    hip: str | None = None

    @property
    def device(self) -> str:
        """The kind of device its build is for."""
        return "cuda" if self.cuda or self.hip else "cpu"


@dataclass(frozen=True)
class Vllm:
    """The vLLM that would be imported. root: None if there is no package.

    problem: why its version cannot be told. hollow: a folder of that name without code hides it, or is what is left.
    capabilities_problem: why looking up what it can do failed.
    """

    root: Path | None = None
    version: str | None = None
    distribution: Distribution | None = None
    hollow: bool = False
    problem: str | None = None
    capabilities: Capabilities | None = None
    capabilities_problem: str | None = None
    damage: Damage | None = None


@dataclass(frozen=True)
class Extension:
    """What the child process said that loads compiled libraries. state: "loaded", "failed", "late" or "not tried".

    errors: library -> why it does not load. operators: how many vLLM's registered; missing: those its Python code
    calls and that are not there. flash_attn: why flash-attn's own library does not load, empty if it does.
    """

    state: str = "not tried"
    seconds: float = 0.0
    torch_error: str = ""
    errors: Mapping[str, str] = field(default_factory=dict)
    operators: int = 0
    missing: tuple[str, ...] = ()
    flash_attn: str = ""


@dataclass(frozen=True)
class Gpu:
    """One GPU as nvidia-smi shows it."""

    index: int
    name: str
    total: int
    free: int


@dataclass(frozen=True)
class Gpus:
    """What nvidia-smi said. state: "found", "none", "no driver tools", "failed" or "late".

    cuda: the newest CUDA the driver runs. users: who holds memory, "name (pid): size". topology: how pairs are linked.
    """

    state: str = "no driver tools"
    error: str = ""
    driver: str = ""
    cuda: str = ""
    devices: tuple[Gpu, ...] = ()
    users: tuple[str, ...] = ()
    links: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Host:
    """The machine. memory: what this process may use (of the container, where there is one). limits: soft, hard (None:
    no limit). cores: that this process may run on."""

    system: str = "Linux"
    machine: str = "x86_64"
    libc: str = ""
    cores: int = 1
    memory_total: int = 0
    memory_free: int = 0
    shm_total: int | None = None
    shm_free: int = 0
    shm_writable: bool = True
    memfd: bool = True
    limits: Mapping[str, tuple[int | None, int | None]] = field(default_factory=dict)
    infiniband: bool = False
    loopback_error: str = ""
    ray_port_taken: bool = False
    temp: str = "/tmp"
    temp_total: int = 0
    temp_free: int = 0
    interfaces: tuple[str, ...] = ()


@dataclass(frozen=True)
class Facts:
    """All of it. device: "cpu" or "cuda", what a run here would use. virtual: in an environment of its own.

    managed: the system's package manager forbids pip to write here. root: Tandem's directory.
    """

    python: tuple[int, int, int]
    device: str = "cpu"
    prefix: str = ""
    virtual: bool = True
    managed: bool = False
    root: str = "."
    environ: Mapping[str, str] = field(default_factory=dict)
    distributions: Distributions = field(default_factory=dict)
    leftovers: tuple[str, ...] = ()
    packaging: bool = True
    torch: Torch | None = None
    vllm: Vllm = Vllm()
    extension: Extension = Extension()
    gpus: Gpus = Gpus()
    host: Host = Host()

    def version(self, name: str) -> str | None:
        """The version of an installed project that Python takes first."""
        copies = self.distributions.get(name)
        return copies[0].version if copies else None

    @property
    def python_version(self) -> str:
        """As text: 3.11.7."""
        return ".".join(map(str, self.python))
