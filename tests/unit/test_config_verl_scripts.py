"""Flags of verl's example scripts, as they are: they compose, are translated, typed, and pass the checks of keys."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from verl_keys import scripts

from trainer import main as cli
from trainer.config.load import CONFIG_DIR, load_config
from trainer.config.schema import Config
from trainer.config.validate import validate
from trainer.config.verl.flags import own_config_path

ACCEPTED, REFUSED = scripts()["accepted"], scripts()["refused"]
WHAT_IS_MISSING = {"rm": "reward_model.enable=true", "lora": "model.lora"}


def load(arguments: list[str], *more: str) -> Config:
    """What the command line does, up to the checks of files."""
    rest, _ = own_config_path(arguments)
    names = [argument.partition("=")[2] for argument in rest if argument.startswith("--config-name=")]
    overrides = [argument for argument in rest if not argument.startswith("--")]
    name = names[0].removesuffix(".yaml") if names else "ppo_trainer"
    return load_config([*overrides, *more], name)


@pytest.mark.parametrize("name", ACCEPTED)
def test_flags_of_an_example_go_through(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("trainer.config.validate._input_problems", lambda cfg: [])
    cfg = load(ACCEPTED[name], "trainer.logger=[console]")
    validate(cfg)
    is_megatron = "megatron" in " ".join(ACCEPTED[name])
    assert cfg.actor_rollout_ref.actor.strategy == ("megatron" if is_megatron else "fsdp")
    told = capsys.readouterr().err.splitlines()
    assert all(line.startswith("note: ") for line in told)
    assert len(told) <= 20
    for key, value in spoken_the_same(ACCEPTED[name]):
        assert value_of(cfg, key) == value, key


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_here_is_refused_alone(name: str) -> None:
    with pytest.raises(ValueError) as error:
        load(REFUSED[name])
    missing = next(text for short, text in WHAT_IS_MISSING.items() if short in name)
    assert missing in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def spoken_the_same(arguments: list[str]) -> list[tuple[str, int | str]]:
    """Settings of the arguments that mean here what they mean in verl."""
    numbers = ("data.train_batch_size", "data.max_response_length", "actor_rollout_ref.rollout.n", "trainer.save_freq")
    numbers += ("actor_rollout_ref.actor.ppo_mini_batch_size", "actor_rollout_ref.actor.ppo_max_token_len_per_gpu")
    numbers += ("actor_rollout_ref.rollout.tensor_model_parallel_size", "trainer.n_gpus_per_node")
    settings = dict(argument.lstrip("+").partition("=")[::2] for argument in arguments)
    found: list[tuple[str, int | str]] = [(key, int(settings[key])) for key in numbers if key in settings]
    return [*found, *((key, settings[key]) for key in ("algorithm.adv_estimator",) if key in settings)]


def value_of(cfg: Config, key: str) -> object:
    value: object = cfg
    for name in key.split("."):
        value = vars(value)[name]
    return value


def test_the_command_line_itself_takes_verls_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["main.py"])
    flags = ["--config-path=config", "--config-name=ppo_megatron_trainer.yaml", "trainer.balance_batch=True"]
    assert cli.main([*flags, "data.train_files=['a','b']"]) == 2
    told = capsys.readouterr().err
    assert "note: --config-path=config is verl's own directory: configurations are looked up in configs/" in told
    assert "note: without effect, batches are always balanced" in told
    assert "error: actor_rollout_ref.model.path=???: has no default" in told
    assert cli.main([*flags, "--cfg", "job"]) == 0
    assert "strategy: megatron" in capsys.readouterr().out


@pytest.mark.parametrize("flag", [["--config-path=mine"], ["--config-path", "mine"], ["-cp", "mine"], ["-cp=mine"]])
def test_a_config_path_is_read_from_the_working_directory(
    flag: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert own_config_path([*flag, "a=1"]) == ([flag[0].partition("=")[0], str(tmp_path / "mine"), "a=1"], [])
    assert own_config_path(["--config-path", "nowhere"]) == (["--config-path", "nowhere"], [])


def test_a_directory_named_config_of_the_users_own_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config").mkdir()
    assert own_config_path(["--config-path=config"])[0] == ["--config-path", str(tmp_path / "config")]


def test_megatron_under_verls_name_differs_in_the_engine_only() -> None:
    base = ["data.train_files=a.jsonl", "actor_rollout_ref.model.path=org/m"]
    by_name = load_config(base, "ppo_megatron_trainer")
    assert by_name == load_config([*base, "actor_rollout_ref.actor.strategy=megatron"])
    assert by_name == load_config([*base, "model_engine=megatron"])
    assert (CONFIG_DIR / "ppo_megatron_trainer.yaml").is_file()
