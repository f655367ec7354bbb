"""Which releases of vLLM Tandem is checked against. A new release is a new entry here."""

from __future__ import annotations

from collections.abc import Iterable

from packaging.version import InvalidVersion, Version

from .command import VersionsError

_READ = """
0.7.0 0.7.1 0.7.2 0.7.3
0.8.0 0.8.1 0.8.2 0.8.3 0.8.4 0.8.5 0.8.5.post1
0.9.0 0.9.0.1 0.9.1 0.9.2
0.10.0 0.10.1 0.10.1.1 0.10.2
0.11.0 0.11.1 0.11.2
0.12.0 0.13.0 0.14.0 0.14.1 0.15.0 0.15.1 0.16.0 0.17.0 0.17.1 0.18.0 0.18.1 0.19.0 0.19.1
0.20.0 0.20.1 0.20.2 0.21.0 0.22.0 0.22.1 0.23.0 0.24.0 0.25.0 0.25.1 0.26.0 0.27.0 0.27.1 0.28.0 0.29.0
0.30.0 0.31.0 0.32.0 0.33.0
"""

CONTRACT = tuple(_READ.split())
"""Every release from 0.7.0 on, so that the version in which something changed is known exactly."""

MATRIX = ("0.27.0", "0.28.0", "0.30.0", "0.31.0")
"""CPU builds made for the PyTorch of requirements/cpu.txt, beside the one that is installed."""


def parse(versions: Iterable[str], default: tuple[str, ...]) -> list[str]:
    """The versions to work on, as vLLM's index spells them, oldest first, each once. Raises VersionsError."""
    chosen = set()
    for text in versions:
        try:
            chosen.add(Version(text))
        except InvalidVersion:
            raise VersionsError(f"{text!r} is not a version; write it like {default[-1]}") from None
    return [str(version) for version in sorted(chosen)] or list(default)
