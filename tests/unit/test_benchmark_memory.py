"""The comparison of predicted with measured memory, on runs made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_benchmark import Launches, call

from scripts.benchmarks import launch, memory
from trainer.tracking.run_data import history

GIB = 1 << 30


def plan(**gib: float) -> dict[str, Any]:
    """Two kinds of devices, the second one holding half as much."""
    phases = [{name: {"bytes": int(size * GIB / share)} for name, size in gib.items()} for share in (1, 2)]
    return {
        "memory": [{"phases": each} for each in phases],
        "devices": {"memory_bytes": 139 * GIB},
        "kv_cache": {"max_concurrency": 3.0},
    }


def steps(**gib: tuple[float, ...]) -> list[dict[str, float]]:
    """Lines of metrics.jsonl."""
    count = len(next(iter(gib.values())))
    return [
        {"step": n + 1, "memory/device_bytes": 140 * GIB}
        | {f"memory/{name}_peak_bytes": sizes[n] * GIB for name, sizes in gib.items()}
        for n in range(count)
    ]


def test_steps_from_the_second_on_are_compared_with_the_fullest_device() -> None:
    lines = steps(update=(130, 100, 101), sync=(10, 20, 20))
    lines[2]["memory/offloaded_bytes/ref_weights"] = 7.0
    found = memory.compare(plan(update=110, sync=30), history(lines))
    update = found["phases"]["update"]
    assert (update["measured_bytes"], update["predicted_bytes"]) == (101 * GIB, 110 * GIB)
    assert update["off"] == pytest.approx(110 / 101 - 1)
    assert memory.missed_by("7b", found) == ["7b, sync: predicted 30.0 GiB, measured 20.0 GiB"]
    assert found["offloaded_bytes"] == {"ref_weights": 7.0} and found["kv_cache"]["max_concurrency"] == 3.0
    shown = memory.markdown({"7b": found}).splitlines()
    assert sorted(shown[2:]) == ["| 7b | sync | 30.0 | 20.0 | +50.0% |", "| 7b | update | 110.0 | 101.0 | +8.9% |"]


def test_a_cpu_has_measurements_alone() -> None:
    found = memory.compare(plan() | {"memory": []}, history(steps(update=(1.0,))))
    assert found["phases"]["update"]["predicted_bytes"] is found["phases"]["update"]["off"] is None
    assert memory.missed_by("tiny", found) == []
    assert "| tiny | update | - | 1.0 | - |" in memory.markdown({"tiny": found})


@pytest.mark.parametrize(("predicted", "status"), [(100, 0), (120, 1)])
def test_it_writes_shows_and_checks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, predicted: float, status: int
) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in steps(update=(1, 100))))
    (tmp_path / "plan.json").write_text(json.dumps(plan(update=predicted)))
    ran = Launches(tmp_path)
    monkeypatch.setattr(launch, "ROOT", tmp_path)
    monkeypatch.setattr(launch, "run", ran)
    monkeypatch.setattr(memory, "write_weights", lambda model, console: None)
    out = tmp_path / "memory.json"
    arguments = ["--out", str(out), "--shapes", "tiny", "--prompts", "2", "--set", "a=b", "--check"]
    assert call(memory.COMMAND, *arguments)[0] == status
    assert "data.train_batch_size=2" in ran.overrides[0] and ran.overrides[0][-1] == "a=b"
    result = json.loads(out.read_text())
    assert result["runs"]["tiny"]["phases"]["update"]["off"] == pytest.approx(predicted / 100 - 1)
    assert out.with_suffix(".md").read_text().startswith("| shape | phase |")
