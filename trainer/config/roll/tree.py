"""What a translation reads (ROLL's YAML, its defaults) and writes (keys of ours, each with where it came from)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trainer.config.errors import show
from trainer.config.roll.defaults import DEFAULTS
from trainer.config.roll.places import Places


@dataclass(frozen=True, slots=True)
class Options:
    """A free dictionary of ROLL's, such as a `strategy_config`."""

    given: dict[str, Any]

    def either(self, name: str, missing: Any = None) -> Any:
        """The value of an option; `missing`, which is ROLL's default, where it is not given or null."""
        value = self.given.get(name)
        return missing if value is None else value


@dataclass(frozen=True, slots=True)
class RollTree:
    """A resolved YAML of ROLL's, nested as in the file."""

    nested: dict[str, Any]

    def value(self, path: str) -> Any:
        """The value at a dotted path, or ROLL's default. The path must be in `DEFAULTS` or in the file."""
        found = self._find(path)
        return DEFAULTS[path] if found is None and path in DEFAULTS else found

    def has(self, path: str) -> bool:
        """Whether the file gives the key a value other than null."""
        return self._find(path) is not None

    def strategy_config(self, role: str) -> Options:
        """`strategy_args.strategy_config` of a role, empty where it is null."""
        return Options(self.value(f"{role}.strategy_args.strategy_config") or {})

    def _find(self, path: str) -> Any:
        node: Any = self.nested
        for name in path.split("."):
            if not isinstance(node, dict) or name not in node:
                return None
            node = node[name]
        return node


@dataclass(slots=True)
class Translation:
    """The outcome. values: our key -> value; sources: our key -> ROLL's keys that made it; then what is to be said.

    places: where keys of ROLL's stand in its file. given: our keys that the command line sets, with their values, which
    win: what only they decide is neither told nor refused.
    """

    roll: RollTree
    given: Mapping[str, Any] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    places: Places = field(default_factory=dict)

    def put(self, key: str, value: Any, *paths: str) -> None:
        """Set our `key`, made from the keys of ROLL's at `paths`."""
        self.values[key] = value
        given = [path for path in paths if self.roll.has(path)]
        if given:
            self.sources[key] = ", ".join(given)
        else:
            self.sources[key] = f"default of {', '.join(paths)}"

    def copy(self, key: str, path: str) -> None:
        """Set our `key` to the value at `path`."""
        self.put(key, self.roll.value(path), path)

    def tell(self, text: str, *keys: str) -> None:
        """Remember a notice about what ROLL's file does to our `keys`; it is untrue where the command line sets one."""
        if not self.overridden(*keys):
            self.notices.append(text)

    def refuse(self, path: str, reason: str, remedy: str, *keys: str) -> None:
        """Remember that the value at `path` cannot be had, unless the command line sets one of our `keys` anyway."""
        if not self.overridden(*keys):
            self.problems.append(f"roll.{path}={show(self.roll.value(path))}: {reason}; {remedy}")

    def choose(self, path: str, table: dict[Any, Any], reason: str, *keys: str) -> Any:
        """What the value at `path` is called here; None, and a problem as in `refuse`, where the table lacks it."""
        value = self.roll.value(path)
        if isinstance(value, str | int | None) and value in table:
            return table[value]
        self.refuse(path, reason, f"choose one of {', '.join(show(name) for name in table)}", *keys)
        return None

    def overridden(self, *keys: str) -> bool:
        """Whether the command line sets one of our `keys`."""
        return any(key in self.given for key in keys)
