"""Shared by all tests: the quick-start task to train on, and the seed of what tests leave to chance."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SEED_VARIABLE = "TANDEM_TEST_SEED"
LONGEST_FIRST = ("e2e", "engine", "seam", "unit")
"""Directories, as several streams take them: the last things that are left for one alone are short."""
SHARED_RUNS = {
    f"tests/e2e/test_{name}.py"
    for name in ("bad_input", "cluster", "devices", "grpo", "megatron", "resume", "variants")
}
"""Files that look at `main_run`: in one stream, so that it is made once."""


def pytest_configure(config: pytest.Config) -> None:
    """Choose the seed, unless it is given."""
    os.environ.setdefault(SEED_VARIABLE, str(secrets.randbelow(1 << 31)))


def pytest_report_header(config: pytest.Config) -> str:
    """Say how to repeat what was left to chance."""
    return f"{SEED_VARIABLE}={os.environ[SEED_VARIABLE]} (set it to repeat the random moments of these tests)"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put what takes longest first, if there are several streams."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: LONGEST_FIRST.index(item.path.relative_to(HERE).parts[0]))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """What the streams of `pytest -n 2` take, one after another: a file, or the files that look at the same run."""
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "the main run" if file in SHARED_RUNS else file

    config.option.loadscopereorder = False
    return Files(config, log)


@pytest.fixture(scope="session")
def chance_seed() -> int:
    """Seed of everything that is random in a test on purpose."""
    return int(os.environ[SEED_VARIABLE])


@pytest.fixture(scope="session")
def task() -> Path:
    """Directory of the quick-start task; made by the script (a minute or two) if it is not there."""
    directory = ROOT / ".cache" / "quickstart"
    if not (directory / "task.json").is_file():
        subprocess.run([sys.executable, "scripts/make_addition_task.py"], cwd=ROOT, check=True)
    return directory
