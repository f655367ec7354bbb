"""What the subcommands of scripts/vllm_versions.py share."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "vllm"


class VersionsError(Exception):
    """Something the user has to know: the message says what and what to do."""


def python_path(*directories: Path) -> dict[str, str]:
    """The environment for a child that looks for modules there first."""
    given = os.environ.get("PYTHONPATH")
    parts = [*map(str, directories), *([given] if given else [])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(parts)}
