"""What the replicas say of themselves, on disk and in a step's metrics."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from trainer.tracking.jsonl import read_jsonl
from trainer.tracking.rollout import ROLLOUT_FILE, RolloutLog
from workers.rollout.spec import ReplicaStatus
from workers.rollout.watch import Reading


def reading(
    time: float,
    replica: int,
    *,
    running: int = 0,
    waiting: int = 0,
    cache_use: float = 0.0,
    seconds: float = 1.0,
    tokens: int = 0,
    preemptions: int = 0,
) -> Reading:
    status = ReplicaStatus(100 + replica, True, 1, running, waiting, cache_use, preemptions, 1000 + tokens)
    return Reading(time, replica, status, seconds, tokens, preemptions)


def test_readings_become_lines_and_metrics(tmp_path: Path) -> None:
    log = RolloutLog(tmp_path / "run")
    assert not (tmp_path / "run").exists(), "nothing before there is something to write"
    log.observe(reading(10.0, 0, running=64, waiting=3, cache_use=0.4, tokens=500))
    log.observe(reading(10.0, 1, running=32, waiting=9, cache_use=0.9, tokens=300, preemptions=2))
    log.observe(reading(11.0, 0, tokens=100, seconds=0.5))
    assert log.take() == {
        "rollout/running_max": 64,
        "rollout/waiting_max": 9,
        "rollout/cache_use_max": 0.9,
        "rollout/preemptions": 2,
        "rollout/tokens_per_second": pytest.approx(900 / 1.5),
    }
    assert log.take() == {}, "each reading counts in one step"
    lines = list(read_jsonl(tmp_path / "run" / ROLLOUT_FILE))
    assert lines[1] == {
        "time": 10.0,
        "replica": 1,
        "pid": 101,
        "running": 32,
        "waiting": 9,
        "cache_use": 0.9,
        "preemptions": 2,
        "tokens": 1300,
        "tokens_per_second": 300.0,
    }
    assert [(line["replica"], line["tokens_per_second"]) for line in lines] == [(0, 500), (1, 300), (0, 200)]


def test_what_the_engine_does_not_tell_is_left_out(tmp_path: Path) -> None:
    log = RolloutLog(tmp_path)
    log.observe(reading(10.0, 0, cache_use=math.nan, seconds=0.0))
    metrics = log.take()
    assert "rollout/cache_use_max" not in metrics
    assert metrics["rollout/tokens_per_second"] == 0
    (line,) = read_jsonl(tmp_path / ROLLOUT_FILE)
    assert line["cache_use"] is None


def test_a_line_cut_short_by_a_kill_is_removed(tmp_path: Path) -> None:
    (tmp_path / ROLLOUT_FILE).write_text('{"time": 1.0, "replica": 0}\n{"time": 2.')
    RolloutLog(tmp_path).observe(reading(3.0, 0))
    assert [line["time"] for line in read_jsonl(tmp_path / ROLLOUT_FILE)] == [1.0, 3.0]
