"""Versions and requirements, read with `packaging` wherever a copy of it can be found.

Diagnose runs where nothing is installed, so pip's and setuptools' own copies do too, and the pip that Python carries to
make environments with. `available()` is False where none is there: then nothing is said about versions but that.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

_PLACES = ("packaging", "pip._vendor.packaging", "setuptools._vendor.packaging", "setuptools.extern.packaging")
_MODULES = ("version", "specifiers", "requirements", "markers")


@lru_cache(maxsize=1)
def _packaging() -> dict[str, Any] | None:
    """Its modules. A copy from elsewhere is made known as `packaging`, for those who import it by that name."""
    modules = _import_from(_PLACES)
    if modules is None and _carried_pip() is not None:
        sys.path.append(str(_carried_pip()))
        modules = _import_from(_PLACES[1:2])
    return modules


def _import_from(places: tuple[str, ...]) -> dict[str, Any] | None:
    for place in places:
        try:
            modules = {name: importlib.import_module(f"{place}.{name}") for name in _MODULES}
        except Exception:  # a broken copy may raise anything; the next one is tried
            continue
        if place != "packaging":
            sys.modules["packaging"] = sys.modules[place]
            sys.modules.update({f"packaging.{name}": module for name, module in modules.items()})
        return modules
    return None


def _carried_pip() -> Path | None:
    """The wheel of pip inside `ensurepip`."""
    spec = importlib.util.find_spec("ensurepip")
    folder = Path(spec.origin).parent / "_bundled" if spec and spec.origin else Path("/nonexistent")
    return next(iter(sorted(folder.glob("pip-*.whl"))), None)


def available() -> bool:
    """Whether versions can be read at all."""
    return _packaging() is not None


def version(text: str) -> Version | None:
    """The version, None if it is none (a development build with a name of its own)."""
    modules = _packaging()
    try:
        return modules["version"].Version(text) if modules else None
    except ValueError:
        return None


def specifier(text: str) -> SpecifierSet:
    """A range such as ">=2.48,<3". Raises ValueError if it is none."""
    modules = _packaging()
    assert modules is not None, "asked for without available()"
    found: SpecifierSet = modules["specifiers"].SpecifierSet(text)
    return found


def inside(text: str, wanted: str) -> bool:
    """Whether a version lies in a range; one that cannot be read does. Pre-releases count as what they precede."""
    found = version(text)
    if found is not None and found.is_prerelease:
        found = version(found.base_version)
    return found is None or specifier(wanted).contains(found, prereleases=True)


def overlap(one: str, other: str) -> bool:
    """Whether some version lies in both ranges: then the larger of their lower bounds does."""
    lower = (">=", "==", "~=")
    bounds = [part.version.replace(".*", "") for part in (*specifier(one), *specifier(other)) if part.operator in lower]
    return not bounds or any(inside(bound, one) and inside(bound, other) for bound in bounds)


def requirement(line: str) -> Requirement | None:
    """A line of Requires-Dist, None where it is not for this machine (or cannot be read)."""
    modules = _packaging()
    if modules is None:
        return None
    try:
        found: Requirement = modules["requirements"].Requirement(line)
        applies = found.marker is None or found.marker.evaluate({"extra": ""})
    except Exception:
        return None
    return found if applies else None
