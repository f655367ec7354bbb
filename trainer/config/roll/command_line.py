"""`roll.config=...` on the command line: taken out, and replaced by the overrides that it stands for.

    python -m trainer.main --config-name roll roll.config=rlvr_config.yaml [roll.KEY=value ...] [our overrides]

`roll.KEY=value` changes a key of ROLL's before the translation; overrides of our own come after it, and win.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainer.config.errors import UserError
from trainer.config.roll.given import given_keys
from trainer.config.roll.places import Places, place_of
from trainer.config.roll.translate import translate_file

CONFIG_NAME = "roll"
_PREFIX = "roll."
_KEY = re.compile(r"[a-z_]+(?:\.\w+)+")


@dataclass(frozen=True, slots=True)
class RollOverrides:
    """overrides: ordinary ones, ROLL's first. notices: for the user. sources: our key -> ROLL's keys that made it.
    places: where those stand in the file.
    """

    overrides: list[str]
    notices: list[str] = field(default_factory=list)
    sources: Mapping[str, str] = field(default_factory=dict)
    places: Places = field(default_factory=dict)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Add to a UserError what in ROLL's file made the keys in its message: the user wrote only that."""
        try:
            yield
        except UserError as error:
            made = self._made(str(error))
            raise UserError("\n".join([str(error), "from ROLL's file:", *made]) if made else str(error)) from error

    def _made(self, message: str) -> list[str]:
        """A line for each key in a message that the file gave its value."""
        named = [key for key in dict.fromkeys(_KEY.findall(message)) if key in self.sources]
        return [f"  {key}: {self._source(key)}" for key in named]

    def _source(self, key: str) -> str:
        """ROLL's keys that made one of ours, each with its line."""
        paths = self.sources[key].split(", ")
        found = [(path, place_of(path, self.places)) for path in paths]
        return ", ".join(path if place is None else f"{path} ({place})" for path, place in found)


def expand_roll(overrides: Sequence[str], config_name: str | None = None) -> RollOverrides:
    """Return the overrides with those of `roll.*` replaced by what they stand for; as they are where there is none.

    config_name: the `--config-name`. Raises UserError for all that `translate_file` refuses, for `roll` without a
    file, and for changes without one.
    """
    changes = {}
    ours = []
    for override in overrides:
        key, equals, value = override.partition("=")
        name = key.lstrip("+")
        if name.startswith(_PREFIX) and equals:
            changes[name.removeprefix(_PREFIX)] = _value(name, value)
        else:
            ours.append(override)
    if not changes and config_name != CONFIG_NAME:
        return RollOverrides(ours)
    path = changes.pop("config", None)
    if not isinstance(path, str):
        raise UserError("roll.config=???: has no default; give ROLL's YAML file, e.g. roll.config=rlvr_config.yaml")
    given = given_keys(ours)
    done = translate_file(Path(path).expanduser(), changes, given=given)
    sources = {key: source for key, source in done.sources.items() if key not in given}
    return RollOverrides([*to_overrides(done.values), *ours], done.notices, sources, done.places)


def to_overrides(values: Mapping[str, Any]) -> list[str]:
    """Write keys and values as Hydra reads them on a command line."""
    return [f"{key}={_written(value)}" for key, value in values.items()]


def _value(key: str, text: str) -> Any:
    try:
        parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        raise UserError(f"{key}={text}: not readable as YAML; put quotes around the value") from error
    assert isinstance(parsed, dict)
    return parsed["value"]


def _written(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return "[" + ",".join(_written(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{name}:{_written(item)}" for name, item in value.items()) + "}"
    if isinstance(value, int | float):
        return repr(value)
    escaped = str(value).replace("\\'", "\\\\'").replace("'", "\\'")
    return f"'{escaped}'"
