"""Runs the program as a user would, and describes the machine it ran on."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.markup import escape

from trainer.tracking.run_data import History, read_history, read_summary

ROOT = Path(__file__).resolve().parents[2]
RUNS = Path("runs/benchmarks")
LOG = "console.log"


class RunFailed(Exception):
    """The program ended with an error."""


def add_common_options(parser: ArgumentParser, *, out: str) -> None:
    """Options of every subcommand."""
    parser.add_argument("--out", type=Path, default=RUNS / out, help="the result as JSON (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="exit status 1 if a floor is missed")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a configuration override; may be repeated"
    )


@dataclass(frozen=True, slots=True)
class Finished:
    """A run that ended well. command: relative to the repository, to be typed by anyone."""

    command: str
    run_dir: Path
    history: History
    summary: dict[str, Any]
    load_before: float


def run(console: Console, name: str, overrides: Sequence[str], *, recipe: str) -> Finished:
    """One run of `recipe` in a fresh directory below runs/benchmarks. Raises RunFailed with the end of its output."""
    relative = new_run_dir(name)
    run_dir = ROOT / relative
    arguments = ["-m", "trainer.main", "--config-name", recipe, *overrides, f"trainer.default_local_dir={relative}"]
    command = shlex.join(["python", *arguments])
    load = os.getloadavg()[0]
    console.print(f"{escape(command)}  [dim](load {load:.1f})[/dim]", soft_wrap=True)
    with (run_dir / LOG).open("w") as log:
        status = subprocess.run([sys.executable, *arguments], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT).returncode
    if status:
        tail = "\n".join((run_dir / LOG).read_text(errors="replace").splitlines()[-30:])
        raise RunFailed(f"exit status {status} of: {command}\n{tail}")
    return Finished(command, run_dir, read_history(run_dir), read_summary(run_dir), load)


def new_run_dir(name: str) -> Path:
    """A fresh directory below runs/benchmarks, relative to the repository."""
    relative = RUNS / name / time.strftime("%Y%m%d-%H%M%S")
    (ROOT / relative).mkdir(parents=True)
    return relative


def command_line() -> str:
    """The command that measures this again."""
    return shlex.join(["python", "scripts/benchmark.py", *sys.argv[1:]])


def machine() -> dict[str, Any]:
    """Processor, cores this process may use, memory and GPUs."""
    return {
        "cpu": _cpu_model(),
        "cores": len(psutil.Process().cpu_affinity()) if sys.platform == "linux" else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": _lines("nvidia-smi", "--query-gpu=name", "--format=csv,noheader"),
        "system": f"{platform.system()} {platform.machine()}",
    }


def commit() -> str:
    """The commit of this source tree, "+" where files differ from it; "unknown" without git."""
    found = _lines("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
    changed = _lines("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return found[0] + ("+" if changed else "") if found else "unknown"


def write(path: Path, result: dict[str, Any]) -> None:
    """The result as JSON, folders made as needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or "unknown"


def _lines(program: str, *arguments: str) -> list[str]:
    """Output of a program, line by line; nothing if it is missing or fails."""
    if shutil.which(program) is None:
        return []
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60)
    return done.stdout.split("\n")[:-1] if done.returncode == 0 else []
