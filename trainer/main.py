"""Train:  python -m trainer.main data.train_files=train.parquet actor_rollout_ref.model.path=org/model [key=value ...]

    python -m trainer.main --help [clip lr ...]                every key, or those with such a word in them
    python -m trainer.main --config-name quickstart            a recipe in configs/recipe/
    python -m trainer.main --config-dir my --config-name mine  a recipe of your own: my/mine.yaml
    python -m trainer.main --config-name roll roll.config=rlvr_config.yaml  start from a YAML file of ROLL's
    python -m trainer.main --cfg job [--resolve]               print the configuration and exit
    python -m trainer.main ... trainer.dry_run=true            print the plan (values, devices, memory) and exit

Composes the configuration, checks it, and hands it to `trainer.run`. A mistake of the user's is one message on
standard error and exit status 2. Nothing heavy (torch, Ray, vLLM) is imported before the configuration is right.
"""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import get_terminal_size
from typing import NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from omegaconf import DictConfig
from rich.console import Console

from trainer.config.errors import UserError, complain, user_errors
from trainer.config.help import help_text
from trainer.config.load import (
    COMPOSE_ERRORS,
    CONFIG_DIR,
    DEFAULT_CONFIG_NAME,
    compose_error,
    full_name,
    searchpath_override,
    type_tree,
)
from trainer.config.overrides import prepare_overrides
from trainer.config.roll.command_line import RollOverrides, expand_roll
from trainer.config.schema import Config
from trainer.config.validate import validate
from trainer.config.verl.flags import own_config_path
from trainer.diagnosis import BROKEN, WARNING, startup_items
from trainer.plan.origins import origins_of
from workers.imports import big_imports

_OPTIONS = "; there are --config-name, --config-dir, --help and --cfg job, and keys are set as key=value"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (without the program's name; None: that of this process) and return its status."""
    notices: list[str] = []
    try:
        return _train(list(sys.argv[1:] if argv is None else argv), notices)
    except UserError as error:
        for notice in notices:
            print(f"note: {notice}", file=sys.stderr)
        complain(str(error))
        return 2


def _train(argv: list[str], notices: list[str]) -> int:
    with user_errors():
        composed = _compose(argv, notices)
    if composed is None:
        return 0
    with composed.roll.explained():
        return _run(argv, composed, notices)


def _run(argv: list[str], composed: Composed, notices: list[str]) -> int:
    """Check what was composed, and run it."""
    with user_errors():
        config, translated = type_tree(composed.tree, overrides=composed.overrides)
        notices += translated
        notices += validate(config)
        notices += _diagnose(config)
        origins = origins_of(argv, composed.tree, roll=composed.roll.sources)
    _let_ray_find_its_token(config)
    with big_imports():  # torch and Ray take seconds; a wrong configuration is told at once
        from trainer.run import run

    shown_by_run = notices.copy()
    notices.clear()
    return run(config, shown_by_run, origins)


def _diagnose(config: Config) -> list[str]:
    """The cheap checks of scripts/diagnose.py. Returns warnings; raises ValueError where training could not start."""
    if not config.actor_rollout_ref.rollout.auto_adapt:
        return []
    device: str = config.trainer.device
    if device == "auto":
        device = "cuda" if Path("/dev/nvidiactl").exists() else "cpu"
    items = startup_items(device)
    broken = [f"{item.name}: {item.reason}; {item.told()}" for item in items if item.verdict == BROKEN]
    if broken and config.trainer.dry_run:  # a plan may be for another machine
        return broken
    if broken:
        raise ValueError("\n".join([*broken, "python scripts/diagnose.py shows the whole picture"]))
    return [f"{item.name}: {item.reason}; {item.told()}" for item in items if item.verdict == WARNING]


def _let_ray_find_its_token(config: Config) -> None:
    """Ray 2.60 starts clusters with the token it once made for this user, but given an address it does not look for it.

    A cluster without tokens does not mind one. Ray reads this when it is imported.
    """
    if config.ray_kwargs.ray_init.address or os.environ.get("RAY_ADDRESS"):
        named = "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ
        if named or (Path.home() / ".ray" / "auth_token").is_file():
            os.environ.setdefault("RAY_AUTH_MODE", "token")


@dataclass(frozen=True, slots=True)
class Composed:
    """What a command line says. overrides: all of them, as Hydra saw them; roll: those that ROLL's file made, and from
    what.
    """

    tree: DictConfig
    overrides: list[str]
    roll: RollOverrides


def _compose(argv: list[str], notices: list[str]) -> Composed | None:
    """Let Hydra read the command line; None where it only printed something (--help, --cfg, ...)."""
    argv, changed = own_config_path(argv)
    notices += changed
    arguments = _parse(argv)
    if arguments.multirun:
        raise UserError("--multirun: not supported, one process is one run; loop over the settings in the shell")
    overrides = list(arguments.overrides)
    words = [word for word in overrides if arguments.help and "=" not in word]
    overrides = [override for override in overrides if override not in words]
    roll = RollOverrides(overrides)
    if not arguments.shell_completion:  # its arguments are not overrides
        roll = expand_roll(overrides, arguments.config_name)
        overrides, changed = prepare_overrides(roll.overrides)
        notices += [*roll.notices, *changed]
    if arguments.config_path is not None:
        overrides.append(searchpath_override())
    flags = [argument for argument in argv if argument not in arguments.overrides and not _asks_for_help(argument)]
    if arguments.config_name is not None:
        flags += ["--config-name", full_name(arguments.config_name, *_config_dirs(arguments))]
    composed: list[DictConfig] = []

    @hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name=DEFAULT_CONFIG_NAME)
    def keep(tree: DictConfig) -> None:  # the run happens outside Hydra, which would cut its tracebacks and exit status
        composed.append(tree)

    with _hydra_reads([*overrides, *flags]):
        try:
            keep()
        except COMPOSE_ERRORS as error:
            name = arguments.config_name or DEFAULT_CONFIG_NAME
            raise compose_error(error, name, *_config_dirs(arguments)) from error
    if arguments.help and composed:
        size = get_terminal_size(fallback=(120, 24))
        Console().out(
            help_text(composed[0], words, width=size.columns), highlight=False
        )  # quiet when `head` has enough
        return None
    return Composed(composed[0], overrides, roll) if composed else None


def _parse(argv: list[str]) -> Namespace:
    """The options, and what is left as overrides. Raises UserError for an option that there is not."""
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        unknown = next((argument for argument in argv if argument.startswith("-") and argument in message), "")
        bare = unknown.lstrip("-")
        keys = f"; keys are set without dashes, {bare if '=' in bare else f'{bare}=...'}" if "." in bare else ""
        raise UserError(f"{message.replace('unrecognized arguments', 'there are no such options')}{keys or _OPTIONS}")

    parser.error = refuse  # type: ignore[method-assign]
    return parser.parse_intermixed_args(argv)


def _asks_for_help(argument: str) -> bool:
    """Hydra's own help does not say what a key means."""
    return argument == "-h" or argument.startswith("--he")


@contextmanager
def _hydra_reads(argv: list[str]) -> Iterator[None]:
    """Give Hydra this command line, and have its errors raised instead of printed."""
    old_argv, old_setting = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = [sys.argv[0], *argv], "1"
    try:
        yield
    finally:
        sys.argv = old_argv
        if old_setting is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = old_setting


def _config_dirs(arguments: Namespace) -> list[Path]:
    """Where this command line looks for configurations."""
    added = [Path(path) for path in (arguments.config_path, arguments.config_dir) if path is not None]
    return [*added, CONFIG_DIR]


if __name__ == "__main__":
    sys.exit(main())
