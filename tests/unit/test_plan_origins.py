"""Where values come from: told for every key, however it was set."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from trainer.config.keys import known_keys
from trainer.config.load import CONFIG_DIR, full_name, searchpath_override
from trainer.config.overrides import prepare_overrides
from trainer.plan.origins import Origin, Origins, origins_of

ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"


def origins(*overrides: str, name: str = "ppo_trainer", directory: Path = CONFIG_DIR, **roll: str) -> Origins:
    """As `trainer.main` would have them."""
    flags = ["--config-name", name, *([] if directory == CONFIG_DIR else ["--config-dir", str(directory)])]
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(directory), version_base="1.3"):
        prepared = [*prepare_overrides(overrides)[0], searchpath_override()]
        tree = compose(config_name=full_name(name, directory), overrides=prepared)
    return origins_of([*flags, *overrides], tree, roll={key.replace("__", "."): path for key, path in roll.items()})


def test_every_key_has_an_origin() -> None:
    found = origins()
    assert found.keys() == known_keys().leaves
    assert {origin.source for origin in found.values()} == {"default", "inherited"}


def test_the_last_one_that_set_a_value_is_told() -> None:
    found = origins("data.seed=3", f"{ROLLOUT}.n=4", name="quickstart")
    assert found["data.seed"] == Origin("command line", "data.seed=3")
    assert found[f"{ROLLOUT}.n"] == Origin("command line", f"{ROLLOUT}.n=4"), "over the recipe"
    assert found[f"{ROLLOUT}.kv_cache_gb"] == Origin("recipe", "quickstart.yaml")
    assert found[f"{ROLLOUT}.top_p"] == Origin("default", "ppo_trainer.yaml")


def test_recipes_build_on_recipes(tmp_path: Path) -> None:
    found = origins(name="quickstart_megatron")
    assert found[f"{ACTOR}.strategy"] == Origin("recipe", "quickstart_megatron.yaml")
    assert found["data.train_batch_size"] == Origin("recipe", "quickstart.yaml")
    (tmp_path / "mine.yaml").write_text("defaults: [quickstart, _self_]\ndata: {train_batch_size: 32}\n")
    mine = origins(name="mine", directory=tmp_path)
    assert mine["data.train_batch_size"] == Origin("recipe", "mine.yaml")
    assert mine["data.max_prompt_length"] == Origin("recipe", "quickstart.yaml")


def test_older_names_are_told(tmp_path: Path) -> None:
    found = origins("trainer.n_devices_per_node=2", f"{ACTOR}.policy_loss.loss_mode=sapo", f"{ACTOR}.tau_pos=2")
    assert found["trainer.n_gpus_per_node"] == Origin("older name", "trainer.n_devices_per_node=2")
    assert found[f"{ACTOR}.policy_loss.params"] == Origin("older name", f"{ACTOR}.tau_pos=2")
    text = "defaults: [ppo_trainer, _self_]\ncustom_reward_function: {path: r.py}\n"
    (tmp_path / "old.yaml").write_text(text)
    found = origins(name="old", directory=tmp_path)
    key = "reward.custom_reward_function.path"
    assert found[key] == Origin("older name", "custom_reward_function.path in old.yaml")
    assert origins(f"{key}=s.py", name="old", directory=tmp_path)[key].source == "command line"


def test_inherited_values_are_traced_to_who_set_them() -> None:
    found = origins(f"{ACTOR}.strategy=megatron")
    assert found["critic.strategy"] == Origin(
        "inherited", f"command line: {ACTOR}.strategy=megatron", f"{ACTOR}.strategy"
    )
    assert found["critic.fsdp.dtype"] == Origin("inherited", "default", f"{ACTOR}.fsdp_config.dtype")
    assert found[f"{ACTOR}.clip_ratio_low"].key == f"{ACTOR}.clip_ratio"
    assert origins("critic.strategy=fsdp")["critic.strategy"].source == "command line"
    chained = origins("critic.device_mapping=${actor_rollout_ref.ref.device_mapping}")
    assert chained["critic.device_mapping"].detail == f"from {ACTOR}.device_mapping (default)"


def test_sections_and_free_dictionaries_are_split_into_what_they_set() -> None:
    block_size = f"{ROLLOUT}.engine_kwargs.vllm.block_size=32"
    found = origins("actor_rollout_ref.actor.optim={lr: 1e-5, weight_decay: 0}", block_size)
    for name in ("lr", "weight_decay"):
        assert found[f"{ACTOR}.optim.{name}"].source == "command line"
    assert found[f"{ACTOR}.optim.eps"].source == "default"
    assert found[f"{ROLLOUT}.engine_kwargs.vllm"].detail == block_size


def test_a_roll_file_stands_between_recipe_and_command_line() -> None:
    path = "rlvr.yaml: actor_train.training_args.learning_rate"
    mapping = {"data__seed": "rlvr.yaml: seed", "actor_rollout_ref__actor__optim__lr": path}
    found = origins("data.seed=5", name="quickstart", **mapping)
    assert found["data.seed"].source == "command line"
    assert found[f"{ACTOR}.optim.lr"] == Origin("roll", path)


@pytest.mark.parametrize(
    ("origin", "told"),
    [
        (Origin("default", "ppo_trainer.yaml"), "default"),
        (Origin("recipe", "mine.yaml"), "mine.yaml"),
        (Origin("command line", "a=b"), "command line: a=b"),
        (Origin("inherited", "default", "a.b"), "from a.b (default)"),
    ],
)
def test_words_for_people(origin: Origin, told: str) -> None:
    assert origin.told == told
