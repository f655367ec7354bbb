"""Subcommand own-environment: the seam's tests with older CPU builds, each with its own PyTorch and transformers.

environments.toml says what an environment holds: exact versions, installed without looking at what they ask for, since
a build names PyTorch's CPU build (not on PyPI) and much that is not used here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import tomllib
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from subcommands import Command

from . import cuda_placeholders, matrix, symbol_versions
from .command import CACHE, ROOT, VersionsError, python_path

TABLE = Path(__file__).with_name("environments.toml")
ENVIRONMENTS = CACHE / "environments"
PYTHON = (3, 11)
"""The builds before 0.14 have one wheel for every Python; this is the one all of them were tried with."""
INSTALL = ("install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-compile", "--only-binary", ":all:")


@dataclass(frozen=True, slots=True)
class Recipe:
    """What an environment holds. optional_symbol_versions: of vLLM's C extension (symbol_versions.py)."""

    packages: tuple[str, ...]
    optional_symbol_versions: tuple[str, ...]
    variables: dict[str, str]

    @property
    def fingerprint(self) -> str:
        """Tells an environment of an earlier recipe."""
        return sha256(repr((self.packages, self.optional_symbol_versions)).encode()).hexdigest()


def add_options(parser: ArgumentParser) -> None:
    """Command line of the subcommand."""
    known = ", ".join(recipes())
    parser.add_argument("versions", nargs="*", metavar="VERSION", help=f"of {known} (default: all, 2 to 3 GB each)")
    parser.add_argument("--tests", type=Path, default=matrix.TESTS, help="what pytest runs (default: %(default)s)")
    parser.add_argument("--only-build", action="store_true", help="make the environments, and run nothing")


def run(options: Namespace, console: Console) -> int:
    """One version after another; status 1 unless all passed."""
    failed = 0
    for version in options.versions or recipes():
        console.print(f"vLLM {version}: environment ...")
        python = build(version, ENVIRONMENTS / version)
        if options.only_build:
            continue
        started = time.monotonic()
        passed, detail = run_tests(version, python, options.tests)
        failed += not passed
        outcome = "[green]passed[/]" if passed else "[red]failed[/]"
        console.print(f"vLLM {version}: {outcome} in {time.monotonic() - started:.0f} s: {escape(detail)}")
    return 1 if failed else 0


def recipes() -> dict[str, Recipe]:
    """The table, by version of vLLM."""
    table: dict[str, Any] = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    common: dict[str, str] = table["common"]
    found = {}
    for version, entry in table["vllm"].items():
        pins = {name: pin for name, pin in {**common, **entry["packages"]}.items() if pin}
        found[version] = Recipe(
            tuple(f"{name}=={pin}" for name, pin in pins.items()),
            tuple(entry.get("optional_symbol_versions", ())),
            entry.get("variables", {}),
        )
    return found


def recipe_of(version: str) -> Recipe:
    """The recipe of one version. Raises VersionsError if there is none."""
    known = recipes()
    if version not in known:
        raise VersionsError(f"{TABLE.name} has no environment for vLLM {version}; it has: {', '.join(known)}")
    return known[version]


def build(version: str, directory: Path) -> Path:
    """The environment's Python; made if it is not there, or if the recipe changed since. Raises VersionsError."""
    recipe = recipe_of(version)
    python, mark = directory / "bin" / "python", directory / "recipe"
    if mark.is_file() and mark.read_text(encoding="utf-8") == recipe.fingerprint:
        return python
    if sys.version_info[:2] != PYTHON:
        raise VersionsError(f"these environments need Python {'.'.join(map(str, PYTHON))}; start this script with it")
    if directory.exists() and not (directory / "pyvenv.cfg").is_file():
        raise VersionsError(f"{directory} is there and is no environment; move it away")
    shutil.rmtree(directory, ignore_errors=True)
    call(sys.executable, "-m", "venv", str(directory))
    call(str(python), "-m", "pip", *INSTALL, *recipe.packages)
    packages = directory / "lib" / f"python{PYTHON[0]}.{PYTHON[1]}" / "site-packages"
    cuda_placeholders.write(packages / "torch" / "lib")
    for name in recipe.optional_symbol_versions:
        for extension in (packages / "vllm").glob("_C*.so"):
            symbol_versions.make_optional(extension, name)
    call(str(python), "-c", "import torch, vllm")
    mark.write_text(recipe.fingerprint, encoding="utf-8")
    return python


def call(*command: str) -> None:
    """Run a program. Raises VersionsError with the end of its complaint."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip() or "no message"
        raise VersionsError(f"{' '.join(command[:4])} ... failed: {said[-600:]}")


def run_tests(version: str, python: Path, tests: Path) -> tuple[bool, str]:
    """Whether all passed in the version's environment, and the counts."""
    environment = {**python_path(ROOT), **recipe_of(version).variables}
    environment["PATH"] = os.pathsep.join((str(python.parent), environment.get("PATH", "")))
    return matrix.run_tests(python, tests, environment, ENVIRONMENTS / f"{version}.log")


COMMAND = Command("own-environment", "run the seam's tests with older CPU builds and their PyTorch", add_options, run)
