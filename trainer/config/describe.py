"""Every key with its possible values, its default and what it does: for `--help` and for docs/configuration.md.

Nothing is said twice: default and comment are those of `configs/ppo_trainer.yaml`, the values those of the schema.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from trainer.config.errors import show
from trainer.config.schema import Config

DEFAULTS_FILE = Path(__file__).resolve().parents[2] / "configs" / "ppo_trainer.yaml"

_NOT_KEYS = ("defaults", "hydra")
_INTERPOLATION = re.compile(r"\$\{(\.*)([\w.]+)\}")


@dataclass(frozen=True, slots=True)
class Entry:
    """One key. values: what it can be, in words; default: as it stands in YAML, interpolations as "as <key>";
    about: what it does.
    """

    key: str
    values: str
    default: str
    about: str

    @property
    def name(self) -> str:
        """The last part of the key."""
        return self.key.rpartition(".")[2]


@dataclass(frozen=True, slots=True)
class SectionText:
    """One section that has keys of its own. note: what is said between them, about several of them; may be empty."""

    key: str
    about: str
    note: str
    entries: tuple[Entry, ...]


@cache
def describe() -> tuple[SectionText, ...]:
    """Every section in the order of the YAML, each with its own keys."""
    text = DEFAULTS_FILE.read_text(encoding="utf-8")
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    assert isinstance(root, yaml.MappingNode)
    found: list[SectionText] = []
    for key_node, value_node in root.value:
        if key_node.value not in _NOT_KEYS:
            found.extend(_sections(key_node.value, key_node, value_node, Config.model_fields, text.splitlines()))
    return tuple(found)


def entries() -> Iterator[Entry]:
    """Every key in the order of the YAML."""
    for section in describe():
        yield from section.entries


def _sections(
    key: str, key_node: Any, node: Any, fields: dict[str, FieldInfo], lines: Sequence[str]
) -> Iterator[SectionText]:
    """The section `key` and those below it. fields: of the section that it stands in."""
    model = fields[key.rpartition(".")[2]].annotation
    assert isinstance(model, type) and issubclass(model, BaseModel), key
    own, below = [], []
    for name_node, value_node in node.value:
        if _is_section(value_node):
            below.append((name_node, value_node))
        else:
            own.append(_entry(f"{key}.{name_node.value}", value_node, model.model_fields[name_node.value], lines))
    if own:
        about = _comment(lines, key_node.end_mark.line, key_node.end_mark.column + 1)
        yield SectionText(key, about, _note(node, lines), tuple(own))
    for name_node, value_node in below:
        yield from _sections(f"{key}.{name_node.value}", name_node, value_node, model.model_fields, lines)


def _is_section(node: Any) -> bool:
    return isinstance(node, yaml.MappingNode) and not node.flow_style


def _entry(key: str, node: Any, field: FieldInfo, lines: Sequence[str]) -> Entry:
    start, end = node.start_mark, node.end_mark
    assert start.line == end.line, f"{key}: a default stands on one line"
    default = lines[end.line][start.column : end.column].strip()
    return Entry(key, _field_words(field), _default(key, default), _comment(lines, end.line, end.column))


def _comment(lines: Sequence[str], line: int, column: int) -> str:
    """What stands behind `#` after this place."""
    return lines[line][column:].partition("#")[2].strip()


def _note(node: Any, lines: Sequence[str]) -> str:
    """The comments on lines of their own between the first and the last value of a section itself."""
    own = [value for _, value in node.value if not _is_section(value)]
    between = [line.strip() for line in lines[own[0].start_mark.line : own[-1].end_mark.line]]
    return " ".join(line.lstrip("# ") for line in between if line.startswith("#"))


def _default(key: str, text: str) -> str:
    """The default, with interpolations resolved to full keys."""
    alone = _INTERPOLATION.fullmatch(text)
    if alone is not None:
        return f"as {_absolute(key, alone)}"
    return _INTERPOLATION.sub(lambda match: f"<{_absolute(key, match)}>", text)


def _absolute(key: str, match: re.Match[str]) -> str:
    dots, path = len(match.group(1)), match.group(2)
    parents = key.split(".")[:-dots] if dots else []
    return ".".join([*parents, path])


def _field_words(field: FieldInfo) -> str:
    if field.description is not None:
        return field.description
    return _words(field.annotation, field.metadata)


def _words(kind: Any, metadata: Sequence[Any] = ()) -> str:
    """A type as a user reads it, e.g. "whole number > 0, or null"."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        described = [item.description for item in arguments[1:] if isinstance(item, FieldInfo) and item.description]
        return described[0] if described else _words(arguments[0], [*_constraints(arguments[1:]), *metadata])
    if origin in (Union, UnionType):
        return _either([_words(argument) for argument in arguments])
    if origin is Literal:
        return " / ".join(show(option) for option in arguments)
    if origin is tuple:
        return f"list of {_words(arguments[0])}"
    if origin is dict or kind is dict:
        return "dictionary"
    return {bool: "true / false", int: f"whole number{_bounds(metadata)}", float: f"number{_bounds(metadata)}"}.get(
        kind, "null" if kind is type(None) else "text"
    )


def _constraints(metadata: Sequence[Any]) -> list[Any]:
    """Those of a `Field(...)` lie one level deeper."""
    return [inner for item in metadata for inner in (item.metadata if isinstance(item, FieldInfo) else [item])]


def _bounds(metadata: Sequence[Any]) -> str:
    found = [bound for item in metadata if (bound := _bound(item))]
    return f" {' and '.join(found)}" if found else ""


def _bound(item: Any) -> str:
    match item:
        case Gt(gt=limit):
            return f"> {limit}"
        case Ge(ge=limit):
            return f">= {limit}"
        case Lt(lt=limit):
            return f"< {limit}"
        case Le(le=limit):
            return f"<= {limit}"
    return ""


def _either(words: list[str]) -> str:
    """Alternatives; choices stay one list."""
    others = [word for word in words if word != "null"]
    lists = all(" / " in word or " " not in word for word in others)
    text = (" / " if lists else " or ").join(others)
    return f"{text}, or null" if "null" in words else text
