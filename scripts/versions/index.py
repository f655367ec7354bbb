"""Finds and fetches wheels with pip, so that its settings (indexes, certificates, proxies) hold here too."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .command import VersionsError

WHEELS_ONLY = (
    "--no-deps",
    "--only-binary",
    ":all:",
    "--ignore-requires-python",
)  # we read or unzip, pip builds nothing


@dataclass(frozen=True, slots=True)
class Wheel:
    """A wheel on an index. requires: its Requires-Dist lines."""

    url: str
    requires: tuple[str, ...]


def find(project: str, version: str) -> Wheel:
    """The wheel pip would install here. Downloads its metadata only, where the index offers it alone."""
    arguments = ("install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-", *WHEELS_ONLY)
    report = json.loads(_pip(project, version, *arguments))
    found: dict[str, Any] = report["install"][0]
    return Wheel(found["download_info"]["url"], tuple(found["metadata"].get("requires_dist", ())))


def download(project: str, version: str, directory: Path) -> Path:
    """Download the wheel into an empty directory; returns the file."""
    _pip(project, version, "download", "--quiet", "--dest", str(directory), *WHEELS_ONLY)
    return next(directory.glob("*.whl"))


def certificates() -> str | None:
    """The certificate file pip is told to use (option `cert`, PIP_CERT), if any."""
    done = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False)
    settings = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    value = settings.get(":env:.cert") or settings.get("global.cert")
    return value.strip("'\"") if value else None


def _pip(project: str, version: str, *arguments: str) -> str:
    command = [sys.executable, "-m", "pip", *arguments, f"{project}=={version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise VersionsError(explain(project, version, done.stderr))
    return done.stdout


def explain(project: str, version: str, errors: str) -> str:
    """What pip's complaint means."""
    lines = [line.removeprefix("ERROR: ") for line in errors.splitlines() if line.startswith("ERROR: ")]
    said = lines[-1] if lines else errors.strip()[-300:]
    if "(from versions: none)" in errors:
        return (
            f"{project} {version}: no package index could be reached, or it has no wheel for this machine (pip: {said})"
        )
    if "from versions:" in errors:
        known = errors.split("from versions:", 1)[1].split(")", 1)[0].strip().split(", ")
        newest = ", ".join(known[-5:])
        return f"{project} {version} does not exist, or has no wheel for this machine. The newest there are: {newest}"
    return f"{project} {version}: pip failed: {said}"
