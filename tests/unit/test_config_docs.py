"""Every key is explained once, in the YAML; `--help` and docs/configuration.md say what stands there."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from trainer.config import describe as describing
from trainer.config.describe import DEFAULTS_FILE, Entry, describe, entries
from trainer.config.keys import known_keys

ROOT = Path(__file__).resolve().parents[2]


def entry(key: str) -> Entry:
    return next(found for found in entries() if found.key == key)


def test_every_key_has_a_comment_of_its_own() -> None:
    assert [found.key for found in entries() if len(found.about) < 5] == []
    assert [section.key for section in describe() if not section.about] == []


def test_every_key_is_described_once() -> None:
    keys = [found.key for found in entries()]
    assert len(keys) == len(set(keys))
    assert set(keys) == known_keys().leaves


def test_a_comment_that_is_missing_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    copy = tmp_path / "ppo_trainer.yaml"
    text = DEFAULTS_FILE.read_text()
    assert "# passes over the training prompts\n" in text
    copy.write_text(text.replace("# passes over the training prompts\n", "\n"))
    monkeypatch.setattr(describing, "DEFAULTS_FILE", copy)
    describe.cache_clear()
    try:
        assert [found.key for found in entries() if not found.about] == ["trainer.total_epochs"]
    finally:
        describe.cache_clear()


@pytest.mark.parametrize(
    ("key", "values", "default"),
    [
        ("data.train_files", "path, glob, or list of them", "???"),
        ("data.val_batch_size", "whole number > 0, or null", "null"),
        ("data.train_max_samples", "-1, or whole number > 0", "-1"),
        ("data.truncation", "error / left / right / middle", "error"),
        ("actor_rollout_ref.model.override_config", "dictionary", "{}"),
        ("actor_rollout_ref.model.tokenizer_path", "path", "as actor_rollout_ref.model.path"),
        ("actor_rollout_ref.actor.clip_ratio_high", "number >= 0", "as actor_rollout_ref.actor.clip_ratio"),
        ("actor_rollout_ref.actor.clip_ratio_c", "number > 1", "3.0"),
        ("actor_rollout_ref.actor.fsdp_config.param_offload", "true / false / auto", "auto"),
        ("actor_rollout_ref.rollout.top_p", "number > 0 and <= 1", "1.0"),
        ("actor_rollout_ref.rollout.device_mapping", "ranks: 0-7, 0,2,5-6 or [0,1], or null", "null"),
        ("critic.enable", "true / false, or null", "null"),
        ("critic.megatron.dtype", "bfloat16 / float32", "as actor_rollout_ref.actor.megatron.dtype"),
        ("critic.optim.betas", "list of number >= 0 and < 1", "[0.9, 0.999]"),
        ("trainer.default_local_dir", "path", "runs/<trainer.project_name>/<trainer.experiment_name>"),
    ],
)
def test_values_and_defaults_in_words(key: str, values: str, default: str) -> None:
    assert (entry(key).values, entry(key).default) == (values, default)


def test_a_comment_between_keys_is_about_several() -> None:
    (section,) = [found for found in describe() if found.key == "actor_rollout_ref.actor.fsdp_config"]
    assert section.note.startswith("What fits stays on the GPU. The rest waits in pinned host memory")
    assert section.note.endswith("there are none to offload.")


def test_the_page_is_up_to_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("configuration_docs", ROOT / "scripts" / "configuration_docs.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.PAGE.read_text() == script.page(), "python scripts/configuration_docs.py"
    assert script.main(["--check"]) == 0
    stale = tmp_path / "configuration.md"
    stale.write_text(script.page().replace("1024", "1025"))
    monkeypatch.setattr(script, "PAGE", stale)
    monkeypatch.setattr(script, "ROOT", tmp_path)
    assert script.main(["--check"]) == 1
    assert script.main([]) == 0 and script.main(["--check"]) == 0
    for key in known_keys().leaves:
        assert f"| `{key.rpartition('.')[2]}` |" in stale.read_text()
