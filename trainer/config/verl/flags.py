"""Flags of verl's command lines that name a place in verl: `--config-path=config`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

_FLAGS = ("--config-path", "-cp")


def own_config_path(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the arguments with `--config-path` as Hydra should see it, and what is told about it.

    Hydra reads a relative one from where verl's main program lies. Here it is read from the working directory, and
    verl's own, `config`, which has the configurations that lie in configs/ here, is left out.
    """
    found: list[str] = []
    notices: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        flag, equals, path = argument.partition("=")
        if flag not in _FLAGS:
            found.append(argument)
            continue
        path = path if equals else next(arguments, "")
        if Path(path).is_dir():
            found += [flag, str(Path(path).resolve())]
        elif Path(path) == Path("config"):
            notices.append(f"{flag}={path} is verl's own directory: configurations are looked up in configs/")
        else:
            found += [flag, path]
    return found, notices
