"""Timers, sinks, tracker, summary and the catalogue of metrics."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from trainer.tracking import summary as summary_module
from trainer.tracking.catalog import documented_metrics, is_documented
from trainer.tracking.jsonl import JsonlSink, read_jsonl
from trainer.tracking.phases import Phases
from trainer.tracking.records import CompletionRow, json_number
from trainer.tracking.summary import versions, write_atomically, write_summary
from trainer.tracking.tensorboard import TensorBoardSink
from trainer.tracking.tracker import Tracker, make_tracker
from trainer.tracking.wandb import WandbSink, choose_mode

ROW = CompletionRow("train", "1+1=", "2", 1.0, 0.5, "stop", "2")


class Clock:
    """A clock that a test moves by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


# Phases


def test_phases_and_other_add_up_to_the_step() -> None:
    clock = Clock()
    phases = Phases(clock=clock)
    phases.step(1)
    for seconds in (2.0, 3.0):  # repeated phases accumulate
        with phases("generate"):
            clock.now += seconds
    clock.now += 1.0
    with phases("update"):
        clock.now += 4.0
        with phases("sync"):  # a nested phase stops the outer clock
            clock.now += 0.5
        clock.now += 1.0
    metrics = phases.metrics()
    assert metrics.pop("memory/driver_rss_bytes") > 1e6
    assert metrics == {
        "time/generate": 5.0,
        "time/update": 5.0,
        "time/sync": 0.5,
        "time/step": 11.5,
        "time/other": 1.0,
    }


def test_phase_inside_itself_counts_once() -> None:
    clock = Clock()
    phases = Phases(clock=clock)
    phases.step(1)
    with phases("score"):
        clock.now += 1.0
        with phases("score"):
            clock.now += 1.0
    assert phases.metrics()["time/score"] == 2.0


def test_totals_cover_start_up_and_all_steps() -> None:
    clock = Clock()
    phases = Phases(clock=clock)
    with phases("start"):
        clock.now += 10.0
    for step in (1, 2):
        phases.step(step)
        with phases("generate"):
            clock.now += 2.0
        clock.now += 0.25
    assert phases.totals == {"start": 10.0, "generate": 4.0, "other": 0.5}
    assert phases.totals == phases.totals
    assert "time/start" not in phases.metrics()


def test_exception_names_phase_and_step() -> None:
    phases = Phases()
    phases.step(3)
    with pytest.raises(RuntimeError) as caught, phases("generate"):
        raise RuntimeError("engine died")
    assert caught.value.__notes__ == ["while in phase 'generate' of step 3"]
    with phases("update"):  # and the timer is usable afterwards
        pass
    assert set(phases.metrics()) >= {"time/generate", "time/update"}


def test_exception_before_the_first_step() -> None:
    with pytest.raises(KeyboardInterrupt) as caught, Phases()("start"):
        raise KeyboardInterrupt
    assert caught.value.__notes__ == ["while in phase 'start'"]


# JSONL


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_json_numbers() -> None:
    assert [json_number(value) for value in (float("nan"), float("inf"), None)] == [None] * 3
    assert json_number(np.float32(0.5)) == 0.5
    assert json_number(np.array(2.0)) == 2.0
    assert isinstance(json_number(7), int)


def test_jsonl_writes_lines_at_once(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path)
    sink.log(1, {"reward/mean": np.float64(0.1), "actor/loss": float("nan"), "sync/weight_version": 3})
    sink.completions(1, [ROW, CompletionRow("val", "\u2028\udc80", "x", float("nan"))])
    assert lines(tmp_path / "metrics.jsonl") == [
        {"step": 1, "reward/mean": 0.1, "actor/loss": None, "sync/weight_version": 3}
    ]
    first, second = lines(tmp_path / "completions.jsonl")
    assert first == {
        "step": 1, "phase": "train", "prompt": "1+1=", "response": "2", "reward": 1.0,
        "advantage": 0.5, "finish_reason": "stop", "ground_truth": "2",
    }  # fmt: skip
    assert second["reward"] is None and second["advantage"] is None


@pytest.mark.parametrize("torn", [b'{"step": 3, "rew', b"{", b"\x00" * 70000, b"", b'{"step": 3}'])
def test_partial_last_line_is_removed(tmp_path: Path, torn: bytes) -> None:
    sink = JsonlSink(tmp_path)
    for step in (1, 2):
        sink.log(step, {"a": step})
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    resumed = JsonlSink(tmp_path)
    resumed.log(3, {"a": 3})
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_file_with_only_a_partial_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"ste')
    JsonlSink(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_truncate_drops_later_steps_once(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path)
    for step in range(5):
        sink.log(step, {"a": 0.1 + 0.2 * step})
        sink.completions(step, [ROW])
    before = (tmp_path / "metrics.jsonl").read_text().splitlines()
    sink.truncate_after(2)
    sink.log(3, {"a": 9.0})
    after = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert after[:3] == before[:3] and json.loads(after[3]) == {"step": 3, "a": 9.0} and len(after) == 4
    assert [line["step"] for line in lines(tmp_path / "completions.jsonl")] == [0, 1, 2]
    assert list(tmp_path.glob("*.tmp")) == []


def test_read_jsonl_skips_torn_lines(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st\n[1]\n{"step": 2}\n{"step"')
    assert list(read_jsonl(path)) == [{"step": 1}, {"step": 2}]
    assert list(read_jsonl(tmp_path / "missing")) == []


# Tracker


def config(*loggers: str) -> Any:
    trainer = SimpleNamespace(
        logger=list(loggers), log_completions_freq=10, project_name="tandem", experiment_name="test"
    )
    return SimpleNamespace(trainer=trainer, model_dump=lambda mode: {"trainer": {"logger": list(loggers)}})


def quiet_console() -> Console:
    return Console(file=io.StringIO(), width=120)


def test_new_run_empties_old_metrics_and_resume_keeps_them(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        JsonlSink(tmp_path).log(step, {"a": 1.0})
    (tmp_path / "rollout.jsonl").write_text('{"time": 1.0}\n')
    make_tracker(config(), tmp_path, total_steps=5, resume_step=2)
    assert (tmp_path / "rollout.jsonl").exists()
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2]
    make_tracker(config(), tmp_path, total_steps=5)
    assert not (tmp_path / "rollout.jsonl").exists()
    assert lines(tmp_path / "metrics.jsonl") == []


def test_jsonl_is_on_without_any_logger(tmp_path: Path) -> None:
    console = quiet_console()
    tracker = make_tracker(config(), tmp_path, total_steps=1, console=console)
    tracker.log(1, {"a": 1.0})
    tracker.completions(1, [ROW])
    tracker.finish({})
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "a": 1.0}]
    assert console.file.getvalue() == ""  # type: ignore[attr-defined]


def test_unknown_logger_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"trainer\.logger='mlflow'.*console, tensorboard, wandb"):
        make_tracker(config("mlflow"), tmp_path, total_steps=1)


def test_failing_sink_is_named(tmp_path: Path) -> None:
    class Broken(JsonlSink):
        def log(self, step: int, metrics: Any) -> None:
            raise OSError("No space left on device")

    with pytest.raises(OSError) as caught:
        Tracker([Broken(tmp_path)]).log(1, {})
    assert caught.value.__notes__ == ["while writing to Broken"]


def test_import_is_light() -> None:
    """Neither the tracker nor the report may pull in what costs seconds."""
    code = (
        "import sys, trainer.tracking.tracker, trainer.tracking.report, trainer.tracking.phases;"
        "print([m for m in ('torch', 'tensorboard', 'wandb', 'ray', 'vllm', 'tensorflow') if m in sys.modules])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# TensorBoard


def test_tensorboard_file_can_be_read_back(tmp_path: Path) -> None:
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    sink = TensorBoardSink(tmp_path)
    for step in (1, 2):
        sink.log(step, {"reward/mean": 0.5 * step, "actor/loss": float("nan")})
    sink.completions(1, [ROW])
    sink.finish({})
    resumed = TensorBoardSink(tmp_path, resume_step=1)
    resumed.log(2, {"reward/mean": 7.0})
    resumed.finish({})
    events = loader.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward/mean")] == [(1, 0.5), (2, 7.0)]


# wandb


@pytest.fixture
def no_wandb_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    yield


@pytest.mark.usefixtures("no_wandb_account")
def test_wandb_mode(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert choose_mode() == "offline"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password not-a-key\n")
    assert choose_mode() is None
    (tmp_path / "netrc").write_text("machine elsewhere.org login user password not-a-key\n")
    assert choose_mode() == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert choose_mode() is None


class FakeWandb:
    """Stands in for the module: what matters here is what we tell it."""

    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.settings: dict[str, Any] = {}

    def init(self, **settings: Any) -> FakeWandb:
        self.settings = settings
        return self

    def Settings(self, **settings: Any) -> dict[str, Any]:
        return settings

    def Table(self, columns: list[str], data: list[list[Any]]) -> tuple[list[str], list[list[Any]]]:
        return columns, data

    def define_metric(self, *names: str, **options: str) -> None:
        pass

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.logged.append({"finished": True})


@pytest.mark.usefixtures("no_wandb_account")
def test_wandb_gets_metrics_tables_and_summary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake, notices = FakeWandb(), []
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    sink = WandbSink(tmp_path / "run", project="p", name="n", config={"a": 1}, notice=notices.append)
    sink.log(1, {"reward/mean": 0.5, "actor/loss": float("nan")})
    sink.completions(1, [ROW])
    sink.finish({"steps": 1, "versions": {"python": "3"}})
    assert fake.settings["mode"] == "offline" and fake.settings["dir"] == str(tmp_path / "run")
    assert len(notices) == 1 and "wandb sync" in notices[0]
    assert fake.logged[0] == {"step": 1, "reward/mean": 0.5}
    assert fake.logged[1]["completions/train"][1] == [["train", "1+1=", "2", 1.0, 0.5, "stop", "2"]]
    assert fake.summary == {"final/steps": 1} and fake.logged[-1] == {"finished": True}


# Summary


def test_summary_reads_the_whole_run(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path)
    sink.log(0, {"val/accuracy": 0.35, "val/greedy_accuracy": 0.5, "time/step": 9.0})
    sink.log(1, {"perf/tokens": 100, "time/step": 2.0, "memory/driver_rss_bytes": 5.0})
    sink.log(
        2,
        {
            "perf/tokens": 300,
            "time/step": 5.0,
            "time/validate": 3.0,
            "memory/train_peak_bytes": 8.0,
            "val/accuracy": 0.9,
        },
    )
    written = write_summary(
        tmp_path,
        command="python -m trainer.main",
        seconds_total=12.0,
        seconds_to_first_step=None,
        seconds_per_phase={"generate": 1.5, "other": float("nan")},
    )
    assert json.loads((tmp_path / "summary.json").read_text()) == written
    assert written.pop("versions") == versions()
    assert written == {
        "accuracy_before": 0.35,
        "accuracy_after": 0.9,
        "greedy_before": 0.5,
        "greedy_after": 0.5,
        "steps": 2,
        "seconds_total": 12.0,
        "seconds_to_first_step": None,
        "seconds_per_phase": {"generate": 1.5, "other": None},
        "tokens_per_second": 100.0,
        "peak_memory_bytes": 8.0,
        "command": "python -m trainer.main",
    }


def test_summary_of_a_run_without_metrics(tmp_path: Path) -> None:
    written = write_summary(tmp_path, command="x", seconds_total=1.0, seconds_to_first_step=None, seconds_per_phase={})
    assert written["steps"] == 0 and written["accuracy_before"] is None and written["tokens_per_second"] is None


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    write_atomically(path, "old")

    def full_disk(_: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(summary_module.os, "fsync", full_disk)
    with pytest.raises(OSError):
        write_atomically(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_versions_name_everything() -> None:
    assert set(versions()) == {"python", "torch", "vllm", "ray", "transformers", "tandem"}
    assert all(versions().values())


@pytest.mark.parametrize(
    "text",
    ["__version__ = version = '1.2.3+cpu'\n", '__version__: str\n__version__ = "1.2.3+cpu"\n'],
)
def test_vllm_version_is_read_without_importing_it(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "vllm"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "_version.py").write_text(text)
    spec = SimpleNamespace(submodule_search_locations=[str(package)])
    monkeypatch.setattr(summary_module.importlib.util, "find_spec", lambda name: spec)
    assert versions()["vllm"] == "1.2.3+cpu"


# Catalogue


def test_catalogue_reads_names_and_placeholders() -> None:
    text = (
        "| `a/b`, `a/c` | s | see `x/y` |\n| metric | unit |\n`z/z`\n| `val/<data_source>/accuracy` | |\n| `actor` | |"
    )
    documented = documented_metrics(text)
    assert documented == {"a/b", "a/c", "val/<data_source>/accuracy"}
    assert is_documented("a/b", documented) and is_documented("val/openai/gsm8k/accuracy", documented)
    assert not is_documented("a/bb", documented) and not is_documented("val/x/accuracy2", documented)
    assert not is_documented("x/y", documented)


CONTRACT = """
reward/mean reward/std reward/max reward/min reward/frac_zero_std_groups reward/errors reward/error_rate
reward/part/format response_length/mean response_length/max response_length/min response_length/clip_ratio
prompt_length/mean prompt_length/max actor/pg_loss actor/ppo_kl actor/ratio_max actor/ratio_min actor/clip_frac
actor/clip_frac_lower actor/entropy actor/kl_loss actor/loss actor/grad_norm actor/lr actor/num_updates
actor/skipped_updates critic/value_loss critic/clip_frac critic/value_mean critic/explained_variance critic/grad_norm
critic/lr advantage/mean advantage/std advantage/max advantage/min kl/reward_kl kl/reward_kl_coef
mismatch/logprob_abs_diff_mean mismatch/logprob_abs_diff_max mismatch/kl mismatch/num_tokens val/accuracy
val/greedy_accuracy val/math/accuracy val/response_length/mean sync/weight_version sync/bytes sync/parameters time/step
time/generate time/score time/annotate time/update time/sync time/validate time/checkpoint time/other
perf/tokens_per_second perf/tokens perf/generate_tokens_per_second memory/driver_rss_bytes memory/train_peak_bytes
memory/rollout_peak_bytes memory/generate_peak_bytes memory/annotate_peak_bytes memory/update_peak_bytes
memory/sync_peak_bytes memory/device_bytes memory/offloaded_bytes/actor_optimizer data/epoch data/position
data/truncated_prompts
"""


def test_documentation_has_every_metric() -> None:
    text = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    documented = documented_metrics(text)
    assert [name for name in CONTRACT.split() if not is_documented(name, documented)] == []
    for line in text.splitlines():
        if line.startswith("| `"):
            assert len(line.replace("\\|", "").split("|")) == 6, line
