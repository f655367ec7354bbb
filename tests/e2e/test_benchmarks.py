"""The benchmarks that run on a GPU as well, small and on a CPU: they end, and write what they promise."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from harness import ROOT


def benchmark(out: Path, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "scripts/benchmark.py", *arguments, "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def test_generation_costs_little_more_than_vllms_own_loop(tmp_path: Path) -> None:
    """The floor of the benchmark itself is 90 %, on a quiet machine with more rounds; this notices a broken path."""
    result = benchmark(tmp_path / "rollout.json", "rollout", "--rounds", "4", "--prompts", "24", "--tokens", "64")
    assert set(result["logprobs"]) == {"none", "monitor", "all"}
    assert result["smallest_ratio"] > 0.7, result["logprobs"]


def test_w1_on_a_cpu(tmp_path: Path) -> None:
    result = benchmark(tmp_path / "w1.json", "w1", "--shape", "tiny", "--steps", "3", "--sampler-logprobs")
    phases = result["phases"]
    assert {"generate", "annotate", "update", "sync"} <= set(phases)
    assert all(len(phase["steps"]) == 2 for phase in phases.values())
    assert result["seconds_per_step"] == pytest.approx(sum(p["median"] for p in phases.values()), rel=0.5)
    assert result["tokens_per_second"] == pytest.approx(16 * 24 / result["seconds_per_step"])
    assert 0 < result["mfu_update"] < 1
    assert result["mismatch_logprob_abs_diff_mean"] < 1e-4
