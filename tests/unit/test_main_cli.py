"""The real command line: quick, clean messages, exit status 2, nothing written, nothing heavy imported."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from trainer import main as cli
from trainer.config.keys import known_keys
from trainer.config.load import RECIPE_DIR
from trainer.config.schema import Config

ROOT = Path(__file__).resolve().parents[2]
BASE = ["data.train_files=train.jsonl", "actor_rollout_ref.model.path=org/model"]


def command(directory: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in an empty directory, which must stay empty."""
    result = subprocess.run(
        [sys.executable, "-m", "trainer.main", *arguments],
        cwd=directory,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "Traceback" not in result.stderr
    return result


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "data.train_files=???: has no default"),
        (["actor_rollout_ref.rollout.enforce_eagr=True"], "did you mean actor_rollout_ref.rollout.enforce_eager?"),
        ([*BASE, "data.train_batch_size=0"], "data.train_batch_size=0: must be greater than 0"),
        ([*BASE, "data.train_batch_size=100"], "ppo_mini_batch_size=256: larger than data.train_batch_size=100"),
        (BASE, "data.train_files=train.jsonl: no such file"),
        (["--config-name", "quickstrt"], "did you mean quickstart?"),
        (["data.seed=1", "--multirun"], "--multirun: not supported"),
        (["--data.seed=1"], "there are no such options: --data.seed=1; keys are set without dashes, data.seed=1"),
        (["--dry-run"], "there are no such options: --dry-run; there are --config-name, --config-dir, --help and "),
    ],
)
def test_a_mistake_is_one_clean_message(tmp_path: Path, arguments: list[str], complaint: str) -> None:
    result = command(tmp_path, *arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert complaint in result.stderr
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == [], "Hydra must not write folders or logs"


def test_help_says_how_to_run_it(tmp_path: Path) -> None:
    result = command(tmp_path, "--help")
    assert result.returncode == 0
    assert result.stdout.startswith("python -m trainer.main [--config-name NAME] [key=value ...]")
    assert "train_batch_size: 1024" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_help_explains_every_key(tmp_path: Path) -> None:
    lines = command(tmp_path, "--help").stdout.splitlines()
    (line,) = [line for line in lines if line.startswith("  total_epochs: 30 ")]
    assert line.endswith("passes over the training prompts")
    assert any("quickstart" in line for line in lines[:6]), "the recipes"
    values = [line for line in lines if line.startswith("  ") and ": " in line[:60]]
    assert len(values) >= len(known_keys().leaves)


def test_help_may_be_read_in_part(tmp_path: Path) -> None:
    """As `| head -1` does."""
    read, write = os.pipe()
    os.close(read)
    script = [sys.executable, "-m", "trainer.main", "--help"]
    with os.fdopen(write, "wb") as closed:
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        result = subprocess.run(script, cwd=tmp_path, env=env, stdout=closed, stderr=subprocess.PIPE, timeout=60)
    assert result.stderr == b""


def test_names_stay_whole_in_a_narrow_terminal(tmp_path: Path) -> None:
    lines = command(tmp_path, "--help", COLUMNS="80").stdout.splitlines()
    head = lines[: lines.index("") + 14]
    assert all(len(line) <= 80 for line in head)
    assert all(any(path.stem in line for line in head) for path in RECIPE_DIR.glob("*.yaml"))


def test_help_for_some_keys_with_the_values_of_this_command(tmp_path: Path) -> None:
    result = command(tmp_path, "--config-name", "quickstart", "--help", "clip_ratio", "train_batch", "data.seed=5")
    assert result.returncode == 0
    assert "  clip_ratio_high: as actor_rollout_ref.actor.clip_ratio\n" in result.stdout
    assert "  train_batch_size: 64  " in result.stdout and "(default: 1024)" in result.stdout
    assert "max_prompt_length" not in result.stdout and "seed" not in result.stdout
    result = command(tmp_path, "-h", "enforce_eagr")
    assert result.returncode == 2
    assert "no key has such a word in its name; there is actor_rollout_ref.rollout.enforce_eager" in result.stderr


def test_cfg_job_prints_the_configuration(tmp_path: Path) -> None:
    result = command(tmp_path, "trainer.nnodes=3", "--cfg", "job", "trainer.n_devices_per_node=2")
    assert result.returncode == 0
    assert "nnodes: 3" in result.stdout
    assert "n_gpus_per_node: 2" in result.stdout
    assert "hydra" not in result.stdout


def test_a_recipe_of_ones_own(tmp_path: Path) -> None:
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    (recipes / "mine.yaml").write_text("defaults: [ppo_trainer, _self_]\ntrainer: {nnodes: 7}\n")
    for flag in ("--config-dir", "--config-path"):
        result = command(tmp_path, flag, str(recipes), "--config-name", "mine", "--cfg", "job")
        assert "nnodes: 7" in result.stdout, flag
    (recipes / "mine.yaml").write_text("defaults: [ppo_trainer, _self_]\ntrainer: {nnode: 7}\n")
    result = command(tmp_path, "--config-dir", str(recipes), "--config-name", "mine", *BASE)
    assert result.returncode == 2
    assert "trainer.nnode=7: unknown key; did you mean trainer.nnodes" in result.stderr


def test_nothing_heavy_is_imported_before_the_configuration_is_right() -> None:
    heavy = "{'torch', 'ray', 'vllm', 'transformers', 'pyarrow', 'tensordict'}"
    code = f"import sys, trainer.main; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.stdout == "[]\n", result.stderr


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[Config, list[str]]]:
    """Replace `trainer.run`; what it is called with is appended here."""
    called: list[tuple[Config, list[str]]] = []
    module = types.ModuleType("trainer.run")

    def run(config: Config, notices: list[str], origins: object) -> int:
        called.append((config, notices))
        return 0

    vars(module)["run"] = run
    monkeypatch.setitem(sys.modules, "trainer.run", module)
    monkeypatch.setattr("trainer.main.validate", lambda config: ["a surprise"])
    monkeypatch.chdir(tmp_path)
    return called


def test_run_gets_the_typed_configuration_and_the_notices(runs: list[tuple[Config, list[str]]]) -> None:
    argv = sys.argv
    assert cli.main([*BASE, "trainer.n_devices_per_node=2"]) == 0
    config, notices = runs[0]
    assert config.trainer.n_gpus_per_node == 2
    assert notices == [
        "translated from verl: trainer.n_devices_per_node -> trainer.n_gpus_per_node",
        "a surprise",
    ]
    assert sys.argv is argv


def test_notices_are_shown_before_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*BASE, "trainer.n_devices_per_node=0"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("note: translated from verl: trainer.n_devices_per_node -> ")
    assert second == "error: trainer.n_gpus_per_node=0: must be greater than 0"


def test_the_status_is_that_of_the_run(runs: list[tuple[Config, list[str]]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["trainer.run"], "run", lambda config, notices, origins: 130)
    assert cli.main(BASE) == 130


def test_errors_of_the_run_are_not_disguised(
    runs: list[tuple[Config, list[str]]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(error: Exception) -> None:
        raise error

    module = sys.modules["trainer.run"]
    monkeypatch.setattr(module, "run", lambda config, notices, origins: fail(ValueError("a bug of ours")))
    with pytest.raises(ValueError, match="a bug of ours"):
        cli.main(BASE)
    monkeypatch.setattr(
        module, "run", lambda config, notices, origins: fail(cli.UserError("key=value: wrong; do this"))
    )
    assert cli.main(BASE) == 2
    assert capsys.readouterr().err == "error: key=value: wrong; do this\n", "run shows the notices"
