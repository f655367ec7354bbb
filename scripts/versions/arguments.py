"""Subcommand arguments: since when, and until when, vLLM has had each engine argument.

The table lets the program say which version has an argument that the installed one refuses.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace

from rich.console import Console
from subcommands import Command

from workers.rollout.vllm.installed import Sources

from . import releases
from .command import ROOT, VersionsError
from .sources import available, directory

TABLE = ROOT / "workers" / "rollout" / "vllm" / "engine_arguments.json"


def add_options(parser: ArgumentParser) -> None:
    """Command line of the subcommand: nothing."""


def run(options: Namespace, console: Console) -> int:
    """Write the table from the sources that `sources` downloaded. Raises VersionsError if some are missing."""
    missing = [version for version in releases.CONTRACT if version not in available()]
    if missing:
        raise VersionsError(f"sources are missing: {' '.join(missing)}; python scripts/vllm_versions.py sources")
    table = history()
    rows = [f"  {json.dumps(name)}: {json.dumps(span)}" for name, span in sorted(table.items())]
    TABLE.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")
    console.print(f"{len(table)} arguments in {TABLE.relative_to(ROOT)}")
    return 0


def history() -> dict[str, tuple[str, str | None]]:
    """Argument to its first release and its last; None: the newest release has it."""
    versions = [version for version in available() if version in releases.CONTRACT]
    first: dict[str, str] = {}
    last: dict[str, str] = {}
    for version in versions:
        for name in Sources(directory(version) / "vllm").fields("engine.arg_utils", "EngineArgs"):
            first.setdefault(name, version)
            last[name] = version
    return {name: (first[name], None if last[name] == versions[-1] else last[name]) for name in first}


COMMAND = Command("arguments", "write the table of engine arguments and the releases that have them", add_options, run)
