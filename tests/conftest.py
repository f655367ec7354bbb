"""Shared by all tests: the quick-start task to train on, and the seed of what tests leave to chance."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SEED_VARIABLE = "TANDEM_TEST_SEED"


def pytest_configure(config: pytest.Config) -> None:
    """Choose the seed, unless it is given."""
    os.environ.setdefault(SEED_VARIABLE, str(secrets.randbelow(1 << 31)))


def pytest_report_header(config: pytest.Config) -> str:
    """Say how to repeat what was left to chance."""
    return f"{SEED_VARIABLE}={os.environ[SEED_VARIABLE]} (set it to repeat the random moments of these tests)"


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
