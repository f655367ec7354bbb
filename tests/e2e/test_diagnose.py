"""Diagnose on the real installation: in time, on one screen, nothing broken; and --deep through the real engine."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def diagnose(*arguments: str, timeout: float = 60) -> tuple[subprocess.CompletedProcess[str], float]:
    """The program's outcome, and the seconds it took."""
    began = time.monotonic()
    command = [sys.executable, str(ROOT / "scripts" / "diagnose.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    return done, time.monotonic() - began


@pytest.mark.quiet
def test_this_installation_is_well_and_told_in_time_on_one_screen() -> None:
    done, seconds = diagnose()
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 110
    assert "Training can start" in done.stdout
    assert seconds < 5, done.stdout


def test_vllm_compatibility_names_what_it_adapts_to() -> None:
    done, _ = diagnose("--check-vllm-compatibility", "--json")
    tree = json.loads(done.stdout)
    assert tree["can_start"] and tree["nearest"]["installed"]
    assert {row["what"] for row in tree["adaptation"]} >= {"engine", "weight loading", "log-probs"}
    assert all(fault["remedy"] for fault in tree["faults"])


def test_deep_runs_the_engine() -> None:
    done, _ = diagnose("--deep", "--json", timeout=600)
    tree = json.loads(done.stdout)
    deep = [item for item in tree["items"] if item["name"].startswith("deep")]
    assert done.returncode == 0, deep
    assert len(deep) >= 4 and all(item["verdict"] == "ok" for item in deep)
