"""Where a key stands in a file: `rlvr_config.yaml:57`, behind each problem that names the key."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import yaml

from trainer.config.errors import UserError

Places = Mapping[str, str]
"""Dotted key of ROLL's -> file and line."""

_NAMED = re.compile(r"\s*(?:roll\.)([\w.-]+)")


def places_of(node: yaml.MappingNode, file: str, prefix: str = "") -> dict[str, str]:
    """The place of every key of a parsed file; those that an alias or a merge brings have none of their own."""
    found: dict[str, str] = {}
    for key, value in node.value:
        if isinstance(key, yaml.ScalarNode):
            path = f"{prefix}{key.value}"
            found[path] = f"{file}:{key.start_mark.line + 1}"
            if isinstance(value, yaml.MappingNode):
                found |= places_of(value, file, f"{path}.")
    return found


@contextmanager
def placed(places: Places) -> Iterator[None]:
    """Add the place to each line of a UserError's message that begins with a key of the file."""
    try:
        yield
    except UserError as error:
        lines = [_with_place(line, places) for line in str(error).split("\n")]
        raise UserError("\n".join(lines)) from error


def place_of(path: str, places: Places) -> str | None:
    """The place of a key, or of the innermost section that the file has of it."""
    while path not in places and "." in path:
        path = path.rpartition(".")[0]
    return places.get(path)


def _with_place(line: str, places: Places) -> str:
    named = _NAMED.match(line)
    place = place_of(named.group(1), places) if named else None
    return line if place is None else f"{line} ({place})"
