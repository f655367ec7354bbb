"""Every recipe composes, is valid where its files are, and holds only what differs from what it starts from."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from trainer.config.load import CONFIG_DIR, RECIPE_DIR, full_name, load_config
from trainer.config.schema import Config
from trainer.config.validate import validate

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(path.stem for path in RECIPE_DIR.glob("*.yaml"))
GIVEN = ["data.train_files=t.jsonl", "actor_rollout_ref.model.path=org/model"]


def recipe(name: str) -> dict[str, Any]:
    content = yaml.safe_load((RECIPE_DIR / f"{name}.yaml").read_text())
    assert isinstance(content, dict)
    return content


def parent(name: str) -> str:
    """What a recipe starts from: ppo_trainer, or another recipe."""
    first, last = recipe(name)["defaults"]
    assert last == "_self_"
    return str(first).removeprefix("/")


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def value_of(cfg: Config, key: str) -> Any:
    value: Any = cfg.model_dump(mode="json")
    for name in key.split("."):
        value = value[name]
    return value


def test_the_recipes_that_are_promised() -> None:
    promised = {"quickstart", "qwen2_7b_grpo_fsdp", "qwen2_7b_grpo_megatron", "qwen2_7b_ppo", "dapo"}
    assert promised <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_it_is_valid_where_its_files_are(name: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    for file in ("tokenizer.json", "model.safetensors"):
        (model / file).touch()
    (tmp_path / "rows.jsonl").touch()
    files = [f"data.train_files={tmp_path}/rows.jsonl", f"data.val_files={tmp_path}/rows.jsonl"]
    cfg = load_config([*files, f"actor_rollout_ref.model.path={model}"], name)
    assert validate(cfg) == [], "and nothing in it surprises"
    assert cfg.trainer.experiment_name == name
    assert load_config([], f"recipe/{name}") == load_config([], name)


@pytest.mark.parametrize("name", RECIPES)
def test_it_repeats_nothing(name: str) -> None:
    """A value that what it starts from has already, by default or through another key."""
    own = {key: value for key, value in leaves(recipe(name)) if key != "defaults"}
    whole, base = load_config([], name), load_config(GIVEN, parent(name))
    for key, value in own.items():
        assert value_of(whole, key) != value_of(base, key), f"{key}={value} is so without this recipe"


def test_what_the_recipes_are() -> None:
    fsdp, megatron = load_config([], "qwen2_7b_grpo_fsdp"), load_config([], "qwen2_7b_grpo_megatron")
    assert fsdp.actor_rollout_ref.actor.strategy == "fsdp" and fsdp.use_reference and not fsdp.use_critic
    assert megatron.actor_rollout_ref.ref.strategy == "megatron" and megatron.data == fsdp.data
    assert load_config([], "qwen2_7b_ppo").use_critic
    dapo = load_config([], "dapo")
    assert dapo.algorithm.filter_groups.enable and dapo.reward.overlong_buffer.len == 512
    assert dapo.actor_rollout_ref.actor.clip_ratio_low < dapo.actor_rollout_ref.actor.clip_ratio_high
    assert dapo.actor_rollout_ref.actor.loss_agg_mode == "token-mean" and not dapo.use_reference


def test_a_recipe_needs_no_folder_in_its_name(tmp_path: Path) -> None:
    assert full_name("quickstart", CONFIG_DIR) == full_name("recipe/quickstart", CONFIG_DIR) == "recipe/quickstart"
    assert full_name("ppo_trainer", CONFIG_DIR) == "ppo_trainer"
    (tmp_path / "quickstart.yaml").write_text("defaults: [ppo_trainer, _self_]\n")
    assert full_name("quickstart", tmp_path, CONFIG_DIR) == "quickstart", "one's own comes first"


def test_a_recipe_of_ones_own_starts_from_another(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("defaults: [quickstart, _self_]\ntrainer: {total_training_steps: 3}\n")
    cfg = load_config([], "mine", config_dir=tmp_path)
    assert (cfg.trainer.total_training_steps, cfg.trainer.experiment_name) == (3, "quickstart")


@pytest.mark.parametrize(
    ("script", "recipe_name"),
    [
        ("qwen2_7b_grpo.sh", "qwen2_7b_grpo_fsdp"),
        ("qwen2_7b_grpo_megatron.sh", "qwen2_7b_grpo_megatron"),
        ("qwen2_7b_ppo.sh", "qwen2_7b_ppo"),
    ],
)
def test_the_example_scripts_run_the_recipes(script: str, recipe_name: str) -> None:
    """Each is one command, which resolves to the recipe with the paths that the environment gives."""
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    result = subprocess.run(
        ["bash", str(ROOT / "examples" / script), "trainer.nnodes=1", "--cfg", "job", "--resolve"],
        env={"PATH": path, "PYTHONPATH": str(ROOT), "HOME": "/h", "MODEL": "a/b", "DATA": "/d"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    printed = yaml.safe_load(result.stdout)
    asked = load_config(
        ["actor_rollout_ref.model.path=a/b", "data.train_files=/d/train.parquet", "data.val_files=/d/test.parquet"],
        recipe_name,
    )
    assert Config.model_validate(printed) == asked
