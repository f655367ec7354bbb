"""The benchmark's statistics, floors and commands, on a run directory made by hand. Nothing is timed here."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from subcommands import Command

from scripts.benchmarks import floors, launch, quickstart, seeds
from scripts.benchmarks.measure import combine, measure, phase_seconds, spread
from trainer.config.load import load_config
from trainer.tracking.run_data import read_history, read_summary

ROOT = Path(__file__).resolve().parents[2]
SUMMARY = {
    "accuracy_before": 0.35,
    "accuracy_after": 0.95,
    "greedy_before": 0.50,
    "greedy_after": 0.99,
    "steps": 4,
    "seconds_total": 60.0,
    "seconds_to_first_step": 21.5,
    "seconds_per_phase": {"generate": 7.0, "other": 0.9 + 4 * 0.01},
    "versions": {"torch": "2.13.0"},
}


def line(step: int, *, generate: float, update: float, other: float, validate: float = 0.0) -> dict[str, float]:
    """A line of metrics.jsonl: score, annotate and sync take 10 ms, 20 ms and 30 ms."""
    times = {"generate": generate, "score": 0.01, "annotate": 0.02, "update": update, "sync": 0.03, "other": other}
    if validate:
        times["validate"] = validate
    metrics = {f"time/{name}": seconds for name, seconds in times.items()} | {"time/step": sum(times.values())}
    rate = 1800 / generate
    memory = {"memory/driver_rss_bytes": 5e8 + step, "memory/train_peak_bytes": 6e8, "memory/rollout_peak_bytes": 7e8}
    return {"step": step, "perf/tokens": 5000, "perf/generate_tokens_per_second": rate, **metrics, **memory}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Four steps; the first is slow, the last validates, 10 ms pass between two steps."""
    lines = [
        {"step": 0, "val/accuracy": 0.35, "time/validate": 1.0},
        line(1, generate=4.0, update=9.0, other=0.8),
        line(2, generate=0.2, update=0.3, other=0.02),
        line(3, generate=0.3, update=0.4, other=0.04),
        line(4, generate=0.4, update=0.5, other=0.04, validate=2.0),
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    return tmp_path


def measured(run_dir: Path) -> dict[str, Any]:
    return measure(read_history(run_dir), read_summary(run_dir))


def test_a_step_is_its_phases_and_the_gap_after_it_without_the_first_and_without_validation(run_dir: Path) -> None:
    result = measured(run_dir)
    assert result["steps"] == 4
    assert result["seconds_per_step"]["median"] == pytest.approx(0.3 + 0.01 + 0.02 + 0.4 + 0.03 + 0.04 + 0.01)
    assert result["seconds_per_step"]["mean"] == pytest.approx((0.59 + 0.81 + 1.01) / 3)
    medians = {name: phase["seconds"] for name, phase in result["phases"].items()}
    assert medians == pytest.approx(
        {"generate": 0.3, "score": 0.01, "annotate": 0.02, "update": 0.4, "sync": 0.03, "other": 0.04, "between": 0.01}
    )


def test_shares_add_up_and_overhead_is_what_is_not_work(run_dir: Path) -> None:
    result = measured(run_dir)
    shares = {name: phase["share"] for name, phase in result["phases"].items()}
    assert sum(shares.values()) == pytest.approx(1.0)
    assert shares["update"] == pytest.approx(1.2 / 2.41)
    assert result["overhead_share"] == pytest.approx(1 - shares["generate"] - shares["update"] - shares["sync"])
    assert result["overhead_share"] == pytest.approx((0.03 + 0.06 + 0.1 + 0.03) / 2.41)


def test_throughput_memory_and_the_summary_are_kept(run_dir: Path) -> None:
    result = measured(run_dir)
    assert result["tokens_per_second"] == pytest.approx(3 * 5000 / 2.41)
    assert result["generate_tokens_per_second"] == pytest.approx(1800 / 0.3)
    assert result["peak_memory_bytes"] == {"driver": 5e8 + 4, "training": 6e8, "rollout": 7e8}
    assert result["seconds_to_first_step"] == 21.5 and result["accuracy_after"] == 0.95
    json.dumps(result, allow_nan=False)


def test_the_time_between_steps_is_never_negative(run_dir: Path) -> None:
    summary = SUMMARY | {"seconds_per_phase": {"other": 0.1}}
    assert set(phase_seconds(read_history(run_dir), summary)["between"]) == {0.0}


def test_one_step_is_not_enough(run_dir: Path) -> None:
    (run_dir / "metrics.jsonl").write_text(json.dumps(line(1, generate=1, update=1, other=0)) + "\n")
    with pytest.raises(ValueError, match="at least two"):
        measured(run_dir)


def test_spread() -> None:
    assert spread([float(i) for i in range(11)]) == {"median": 5.0, "p10": 1.0, "p90": 9.0, "mean": 5.0}


def test_runs_are_combined_by_the_median_of_each_number(run_dir: Path) -> None:
    one = measured(run_dir)
    others = [one | {"seconds_total": seconds, "seconds_per_step": {"median": seconds}} for seconds in (1.0, 9.0)]
    combined = combine([one | {"seconds_per_step": {"median": 5.0}}, *others])
    assert combined["seconds_total"] == 9.0 and combined["seconds_per_step"] == {"median": 5.0}
    assert combine([one, one | {"accuracy_after": None}])["accuracy_after"] is None


@pytest.mark.parametrize(
    ("overhead", "seconds", "words"),
    [(0.02, 20.0, []), (0.101, 20.0, ["overhead_share"]), (0.1, 40.1, ["first_step"]), (0.2, None, ["over", "first"])],
)
def test_quickstart_floors(overhead: float, seconds: float | None, words: list[str]) -> None:
    result = {"overhead_share": overhead, "seconds_to_first_step": seconds}
    lacking = floors.missed(result, floors.QUICKSTART)
    assert len(lacking) == len(words) and all(word in one for word, one in zip(words, lacking, strict=True))


def test_floors_reach_into_the_result_and_know_a_wrong_key(run_dir: Path) -> None:
    result = measured(run_dir)
    assert floors.missed(result, [floors.Floor("phases.sync.share", at_least=0.5)]) == [
        f"phases.sync.share = {0.09 / 2.41:.4g}, must be >= 0.5"
    ]
    with pytest.raises(KeyError):
        floors.value_at(result, "phases.dance")


def test_every_seed_must_learn() -> None:
    assert floors.missed(SUMMARY, floors.QUICKSTART_SEEDS) == []
    assert len(floors.missed(SUMMARY | {"accuracy_after": 0.89, "steps": 61}, floors.QUICKSTART_SEEDS)) == 2
    assert floors.missed(SUMMARY | {"greedy_before": None}, floors.QUICKSTART_SEEDS) == [
        "greedy_before = not measured, must be <= 0.6"
    ]


class Launches:
    """Stands for launch.run: keeps the overrides, and answers with the run directory made by hand."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.overrides: list[list[str]] = []

    def __call__(self, console: Console, name: str, overrides: list[str], *, recipe: str) -> launch.Finished:
        self.overrides.append(list(overrides))
        history, summary = read_history(self.run_dir), read_summary(self.run_dir)
        return launch.Finished("python -m trainer.main", self.run_dir, history, summary, 0.1)


def call(command: Command, *arguments: str) -> tuple[int, str]:
    """Exit status and what was printed."""
    parser = ArgumentParser()
    command.add_options(parser)
    options: Namespace = parser.parse_args(arguments)
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    return command.run(options, console), console.export_text()


@pytest.fixture
def launches(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Launches:
    stand_in = Launches(run_dir)
    monkeypatch.setattr(launch, "run", stand_in)
    return stand_in


def test_quickstart_writes_and_checks(launches: Launches, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out.json"
    status, text = call(quickstart.COMMAND, "--out", str(out), "--repeat", "2", "--ranks", "1", "--set", "a.b=c")
    assert status == 0 and "overhead" in text and "0.810 s per step" in text
    result = json.loads(out.read_text())
    assert len(result["runs"]) == 2 and result["missed"] == [] and result["machine"]["cores"] >= 1
    assert launches.overrides[0][-2:] == ["a.b=c", "trainer.n_gpus_per_node=1"]
    summary = SUMMARY | {"seconds_to_first_step": 90.0}
    (launches.run_dir / "summary.json").write_text(json.dumps(summary))
    assert call(quickstart.COMMAND, "--out", str(out))[0] == 0
    status, text = call(quickstart.COMMAND, "--out", str(out), "--check")
    assert status == 1 and "missed: seconds_to_first_step = 90" in text


def test_seeds_write_draw_and_check(launches: Launches, tmp_path: Path) -> None:
    out, svg = tmp_path / "seeds.json", tmp_path / "curve.svg"
    assert call(seeds.COMMAND, "--out", str(out), "--svg", str(svg), "--check")[0] == 0
    assert svg.read_text().startswith("<svg") and "3 seeds" in svg.read_text()
    result = json.loads(out.read_text())
    assert [row["seed"] for row in result["seeds"]] == [1, 2, 3]
    assert launches.overrides[2] == [f"{key}=3" for key in seeds.SEED_KEYS]
    (launches.run_dir / "summary.json").write_text(json.dumps(SUMMARY | {"accuracy_after": 0.5}))
    status, text = call(seeds.COMMAND, "--out", str(out), "--seeds", "7", "--check")
    assert status == 1 and "seed 7: accuracy_after" in text


def test_the_overrides_are_keys_of_the_recipe() -> None:
    overrides = [*quickstart.OVERRIDES, *(f"{key}=3" for key in seeds.SEED_KEYS)]
    cfg = load_config(overrides, config_name="quickstart")
    assert cfg.trainer.val_before_train is False and cfg.data.seed == cfg.actor_rollout_ref.rollout.seed == 3


def test_a_failed_run_shows_the_end_of_its_output(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(launch, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with pytest.raises(launch.RunFailed, match=re.escape("trainer.no_such_key")):
        launch.run(Console(quiet=True), "x", ["trainer.no_such_key=1"], recipe="quickstart")
    assert len(list(tmp_path.glob("runs/benchmarks/x/*/console.log"))) == 1


def test_the_machine_is_described() -> None:
    machine: Mapping[str, Any] = launch.machine()
    assert machine["cores"] >= 1 and machine["memory_bytes"] > 1e8 and machine["cpu"]
    assert launch.commit()


def test_the_script_lists_its_subcommands() -> None:
    done = subprocess.run(
        [sys.executable, "scripts/benchmark.py", "--help"],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and "quickstart-seeds" in done.stdout
