"""The benchmarks that run on a GPU as well, small and on a CPU: they end, and write what they promise."""

from __future__ import annotations

import json
import re
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


@pytest.mark.quiet
def test_generation_costs_little_more_than_vllms_own_loop(tmp_path: Path) -> None:
    """The floor of the benchmark itself is 90 %, on a quiet machine with more rounds; this notices a broken path."""
    result = benchmark(tmp_path / "rollout.json", "rollout", "--rounds", "3", "--prompts", "24", "--tokens", "48")
    assert set(result["logprobs"]) == {"none", "monitor", "all"}
    assert result["smallest_ratio"] > 0.7, result["logprobs"]


def test_log_probs_never_hold_tokens_times_vocabulary(tmp_path: Path) -> None:
    result = benchmark(tmp_path / "lp.json", "logprobs", "--rows", "96", "--hidden", "8", "--chunks", "4,24")
    few, many, twice = (entry["bytes"] for entry in result["chunked"])
    assert few < many < result["formula"]["bytes"]
    assert few < 0.5 * result["logits_bytes"]
    assert twice < 1.2 * few, "twice the tokens take no more"
    assert result["error"] < 1e-6


def test_w1_on_a_cpu(tmp_path: Path) -> None:
    result = benchmark(tmp_path / "w1.json", "w1", "--shape", "tiny", "--steps", "3", "--sampler-logprobs")
    phases = result["phases"]
    assert {"generate", "annotate", "update", "sync"} <= set(phases)
    assert all(len(phase["steps"]) == 2 for phase in phases.values())
    assert result["seconds_per_step"] == pytest.approx(sum(p["median"] for p in phases.values()), rel=0.5)
    assert result["tokens_per_second"] == pytest.approx(16 * 24 / result["seconds_per_step"])
    assert sum(phase["share"] for phase in phases.values()) == pytest.approx(1)
    assert 0 < result["mfu_update"] < 1
    assert set(result["memory_growth_bytes"]) == set(result["phase_memory_bytes"])
    assert all(len(phase["steps"]) == 3 for phase in result["phase_memory_bytes"].values())
    assert result["mismatch_logprob_abs_diff_mean"] < 1e-4
    run_dir = re.search(r"trainer.default_local_dir=(\S+)", result["run_command"])
    assert run_dir and (ROOT / run_dir[1] / "metrics.jsonl").is_file()
    assert not (ROOT / run_dir[1] / "checkpoints").exists(), "90 GB for the 7b shape"


def test_w1s_sync_alone(tmp_path: Path) -> None:
    result = benchmark(tmp_path / "w1.json", "w1", "--shape", "tiny", "--sync-only", "--rounds", "2")
    parts = result["parts"]
    assert set(parts) == {"sleep", "wake_weights", "sync", "wake_cache"}
    assert all(len(part["rounds"]) == 2 and part["median"] > 0 for part in parts.values())
    assert parts["sync"]["median"] < result["seconds"] < 10
    num_parameters = 1024 * 128 + 2 * (4 * 128 * 128 - 2 * 64 * 128 + 256 + 3 * 128 * 256 + 2 * 128) + 128
    assert result["bytes"] == 4 * num_parameters
    assert result["channel"] == "shared_memory" and result["buckets"] == 1 and result["verified"] is True


def test_w1s_generation_alone(tmp_path: Path) -> None:
    """Without a trainer, and without weights; a CPU has no CUDA graphs to compare with."""
    result = benchmark(tmp_path / "w1.json", "w1", "--shape", "tiny", "--rollout-only", "--rounds", "2")
    assert set(result["engines"]) == {"eager"}
    for found in result["engines"]["eager"]["logprobs"].values():
        assert len(found["rounds"]) == 2
        assert found["tokens_per_second"] == pytest.approx(16 * 16 / found["median"])
    assert set(result["engines"]["eager"]["logprobs"]) == {"monitor", "all"} == set(result["graphs_over_eager"])
    assert result["command"].endswith(f"--rounds 2 --out {tmp_path / 'w1.json'}")
