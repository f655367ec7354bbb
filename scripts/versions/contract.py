"""Subcommand contract: downloads the sources of every release and holds the seam's assumptions against them."""

from __future__ import annotations

import subprocess
import sys
from argparse import ArgumentParser, Namespace

from rich.console import Console
from subcommands import Command

from . import releases, sources
from .command import ROOT, python_path

TEST = "tests/seam/test_contract.py"


def add_options(parser: ArgumentParser) -> None:
    """Command line of the subcommand."""
    parser.add_argument("versions", nargs="*", metavar="VERSION", help="releases that are not in the list yet")


def run(options: Namespace, console: Console) -> int:
    """Download what is not there, and run the test; status 1 if either fails."""
    options.versions = [*releases.CONTRACT, *options.versions]
    lacking = sources.run(options, console)
    command = [sys.executable, "-m", "pytest", "-m", "contract", "--tb=short", TEST]
    done = subprocess.run(command, cwd=ROOT, env=python_path(ROOT), check=False)
    return 1 if lacking or done.returncode else 0


COMMAND = Command("contract", "check what the seam assumes against the sources of releases", add_options, run)
