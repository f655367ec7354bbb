"""The keys that verl had, with its defaults, and flags of its example scripts (tests/unit/verl): for the tests of them.

keys.json: `ppo_trainer` and `ppo_megatron_trainer` (what differs) at verl 1dda039b9 of August 2026; `older`: what the
releases 0.2 to 0.9 had besides; `scripts`: what example scripts set besides. By section: name -> default.
scripts.json: command lines of examples by release: all `accepted`, or `refused` for what is not here.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

_DATA = Path(__file__).with_name("verl")


@cache
def _keys() -> dict[str, Any]:
    return json.loads((_DATA / "keys.json").read_text(encoding="utf-8"))


def leaves(*names: str) -> dict[str, Any]:
    """Key -> default, of these parts of keys.json; later parts win."""
    found: dict[str, Any] = {}
    for name in names:
        for section, content in _keys()[name].items():
            found |= {f"{section}.{key}".lstrip("."): value for key, value in content.items()}
    return found


def tree(*names: str) -> dict[str, Any]:
    """The same, nested."""
    nested: dict[str, Any] = {}
    for key, value in leaves(*names).items():
        *parents, name = key.split(".")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return nested


def keys_of_scripts() -> list[str]:
    """Keys that are in no tree of verl's, but in its examples."""
    return list(_keys()["scripts"])


@cache
def scripts() -> dict[str, dict[str, list[str]]]:
    """accepted, refused -> release and name -> arguments."""
    return json.loads((_DATA / "scripts.json").read_text(encoding="utf-8"))
