"""From YAML and overrides to a typed `Config`.

`load_config(["data.train_files=train.jsonl", ...])` is for tests and scripts; the command line goes through
`trainer.main`, where Hydra composes the tree and `type_tree` types it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from trainer.config.complaints import explain
from trainer.config.errors import UserError, raise_problems
from trainer.config.keys import known_keys
from trainer.config.overrides import overridden_keys, prepare_overrides
from trainer.config.roll.command_line import expand_roll
from trainer.config.schema import Config
from trainer.config.unused import unused_notices
from trainer.config.verl.translate import translate_nested

CONFIG_DIR = Path(__file__).resolve().parents[2] / "configs"
RECIPE_DIR = CONFIG_DIR / "recipe"
DEFAULT_CONFIG_NAME = "ppo_trainer"
COMPOSE_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError)
"""What Hydra raises while it reads and merges the YAML; `compose_error` words them."""

_HINTS = {
    "data.train_files": "give the training prompts, e.g. data.train_files=data/train.parquet",
    "actor_rollout_ref.model.path": "give a directory or hub name, e.g. actor_rollout_ref.model.path=Qwen/Qwen2.5-0.5B",
}


def load_config(
    overrides: Sequence[str] = (), config_name: str = DEFAULT_CONFIG_NAME, *, config_dir: Path = CONFIG_DIR
) -> Config:
    """Compose `config_name` with the overrides and return it typed; notices go to standard error.

    Raises ValueError for everything that `check_override_keys` and `to_config` refuse, and for an unknown name.
    """
    roll = expand_roll(overrides, config_name)
    prepared, notices = prepare_overrides(roll.overrides)
    if config_dir != CONFIG_DIR:
        prepared.append(searchpath_override())
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(config_dir.resolve()), version_base="1.3"):
            tree = compose(config_name=full_name(config_name, config_dir), overrides=prepared)
    except COMPOSE_ERRORS as error:
        raise compose_error(error, config_name, config_dir) from error
    config, more = type_tree(tree, overrides=prepared)
    for notice in (*roll.notices, *notices, *more):
        print(f"note: {notice}", file=sys.stderr)
    return config


def to_config(tree: DictConfig) -> Config:
    """Resolve a composed tree and return it typed.

    Raises ValueError listing every problem as `key=value: what is wrong; what to do`: values left at `???`,
    interpolations to nowhere, unknown keys (with the nearest name), missing keys and impossible values.
    """
    return type_tree(tree)[0]


def type_tree(tree: DictConfig, *, overrides: Sequence[str] = ()) -> tuple[Config, list[str]]:
    """As `to_config`; also translate older spellings and verl's keys, and return the notices about them.

    overrides: as given on the command line; the keys they set win over an older spelling in the YAML.
    """
    raw = OmegaConf.to_container(tree, resolve=False)
    assert isinstance(raw, dict)
    nested = {str(key): value for key, value in raw.items()}
    report = translate_nested(nested, keep=overridden_keys(overrides))
    missing = [_missing(key) for key in _unset(nested)]
    if missing:
        raise_problems([*report.problems, *missing])
    try:
        values = OmegaConf.to_container(OmegaConf.create(nested), resolve=True)
    except OmegaConfBaseException as error:
        key = error.full_key or "configuration"
        raise UserError(f"{key}: {str(error).partition(chr(10))[0]}; name an existing key in ${{...}}") from error
    assert isinstance(values, dict)
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        tree_of_values = {str(key): value for key, value in values.items()}
        problems = explain(error, tree_of_values, known_keys(), following=frozenset(_following(nested)))
        raise_problems([*report.problems, *problems])
        raise
    raise_problems(report.problems)
    return config, [*report.notices(), *unused_notices(config, _given(nested))]


def full_name(config_name: str, *config_dirs: Path) -> str:
    """The name that Hydra knows a configuration by: a recipe may be named without its folder, `recipe/`."""
    name = config_name.removesuffix(".yaml")
    found = any((directory / f"{name}.yaml").is_file() for directory in config_dirs)
    return f"{RECIPE_DIR.name}/{name}" if not found and (RECIPE_DIR / f"{name}.yaml").is_file() else config_name


def compose_error(error: Exception, config_name: str, *config_dirs: Path) -> UserError:
    """Word an error of `COMPOSE_ERRORS` for the user."""
    if isinstance(error, MissingConfigException):
        if error.missing_cfg_file == config_name:
            return UserError(_no_such_config(config_name, config_dirs))
        return UserError(f"{_first_paragraph(error)}; name a file of one of {_listed(config_dirs)}")
    cause = f": {_first_paragraph(error.__cause__)}" if error.__cause__ is not None else ""
    return UserError(f"{_first_paragraph(error)}{cause}")


def searchpath_override() -> str:
    """The override that lets a configuration outside `configs/` start from `ppo_trainer`, or from a recipe."""
    return f"hydra.searchpath=['file://{CONFIG_DIR}','file://{RECIPE_DIR}']"


def _no_such_config(name: str, config_dirs: Sequence[Path]) -> str:
    names = sorted(
        path.relative_to(directory).with_suffix("").as_posix().removeprefix(f"{RECIPE_DIR.name}/")
        for directory in config_dirs
        for path in directory.rglob("*.yaml")
    )
    nearest = get_close_matches(name, names, n=1)
    remedy = f"did you mean {nearest[0]}?" if nearest else f"choose one of {', '.join(names)}"
    return f"--config-name={name}: no {name}.yaml in {_listed(config_dirs)}; {remedy}"


def _listed(directories: Sequence[Path]) -> str:
    return ", ".join(str(directory) for directory in directories)


def _first_paragraph(error: BaseException) -> str:
    return str(error).partition("\n\n")[0].replace("\n", " ").rstrip(".")


def _unset(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the keys whose value is still `???`."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _unset(value, f"{prefix}{name}.")
        elif value == "???":
            yield f"{prefix}{name}"


def _following(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the keys that are another key's value, `${...}`."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _following(value, f"{prefix}{name}.")
        elif isinstance(value, str) and value.startswith("${"):
            yield f"{prefix}{name}"


def _given(tree: dict[str, Any]) -> dict[str, Any]:
    """The leaves that are not as `configs/ppo_trainer.yaml` has them."""
    defaults = dict(_leaves(yaml.safe_load((CONFIG_DIR / f"{DEFAULT_CONFIG_NAME}.yaml").read_text(encoding="utf-8"))))
    return {key: value for key, value in _leaves(tree) if key in defaults and value != defaults[key]}


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _missing(key: str) -> str:
    hint = _HINTS.get(key, f"give it on the command line, {key}=...")
    return f"{key}=???: has no default; {hint}"
