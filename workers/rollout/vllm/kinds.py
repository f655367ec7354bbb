"""What values each engine argument of a vLLM takes, read from the annotations in its own sources. No vLLM import.

Where an annotation says nothing we can check (a class of torch's, a protocol, Any) anything passes. vLLM itself drops
unknown names inside a dictionary such as compilation_config without a word; so these are looked at as well.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from workers.rollout.vllm.installed import Sources

_PLAIN = {"bool": "bool", "int": "int", "float": "float", "str": "str"}
_CONTAINERS = {
    **dict.fromkeys(("dict", "Dict", "Mapping"), "dict"),
    **dict.fromkeys(("list", "List", "Sequence", "set", "Set", "frozenset", "tuple", "Tuple"), "list"),
}
_WORDS = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "list": "a list",
    "dict": "a dictionary",
    "null": "null",
}
_AS_CLASS = {"speculative_config": "SpeculativeConfig"}
"""Annotated as plain dictionaries, and then given to these classes."""

_ALSO = {"compilation_config": "int"}
"""`LLM` takes more than the annotation says."""

_DEPTH = 3


@dataclass(frozen=True)
class Kind:
    """What a value may be. types: keys of `_WORDS`; options: single values; fields: the kinds of what a dictionary may
    hold, by name; None: anything.
    """

    types: frozenset[str]
    options: tuple[object, ...] = ()
    fields: Mapping[str, Kind | None] | None = None

    def problems(self, value: object, key: str) -> Iterator[tuple[str, object, str]]:
        """What is wrong with `value` under the name `key`: (full name, the value there, why and what to do)."""
        if isinstance(value, Mapping) and self.fields is not None:
            for name, inner in value.items():
                yield from self._field_problems(str(name), inner, f"{key}.{name}")
        elif not (_type_of(value) in self._accepted or any(value is o or value == o for o in self._same_type(value))):
            yield key, value, self._expectation(value)

    @property
    def _accepted(self) -> frozenset[str]:
        return self.types | ({"int"} if "float" in self.types else set())

    def _same_type(self, value: object) -> list[object]:
        return [option for option in self.options if type(option) is type(value)]

    def _field_problems(self, name: str, value: object, key: str) -> Iterator[tuple[str, object, str]]:
        assert self.fields is not None
        if name not in self.fields:
            near = difflib.get_close_matches(name, self.fields, n=1)
            remedy = f"did you mean {near[0]}?" if near else "take it out"
            yield key, value, f"it has no such field; {remedy}"
            return
        kind = self.fields[name]
        if kind is not None:
            yield from kind.problems(value, key)

    def _expectation(self, value: object) -> str:
        if self.options:
            near = difflib.get_close_matches(str(value), [str(option) for option in self.options], n=1)
            names = [str(option) for option in self.options] + [_WORDS[name] for name in sorted(self.types)]
            return f"must be one of {', '.join(names)}" + (f"; did you mean {near[0]}?" if near else "")
        ordered = [words for name, words in _WORDS.items() if name in self.types]
        return f"must be {' or '.join(ordered)}"


@dataclass(frozen=True)
class Kinds:
    """The kinds of all engine arguments of the vLLM with these sources."""

    sources: Sources
    _known: dict[str, Kind | None] = field(default_factory=dict, compare=False)

    def of(self, argument: str) -> Kind | None:
        """What an argument takes; None: anything, or it cannot be told."""
        if argument not in self._known:
            found = self.sources.annotations("engine.arg_utils", "EngineArgs").get(argument)
            self._known[argument] = None if found is None else self._argument(argument, *found)
        return self._known[argument]

    def _argument(self, name: str, annotation: ast.expr, default: ast.expr | None, module: str) -> Kind | None:
        kind = self._kind(annotation, module, _DEPTH)
        if kind is None:
            return None
        if name in _AS_CLASS:
            named = self._named(_AS_CLASS[name], module, _DEPTH)
            kind = Kind(kind.types, kind.options, named.fields if named else None)
        also = {"null"} if _is_none(default) else set()
        return Kind(kind.types | also | ({_ALSO[name]} if name in _ALSO else set()), kind.options, kind.fields)

    def _kind(self, node: ast.expr, module: str, depth: int) -> Kind | None:
        match node:
            case ast.Constant(value=None):
                return Kind(frozenset({"null"}))
            case ast.Constant(value=str(text)):
                return self._kind(ast.parse(text, mode="eval").body, module, depth)
            case ast.Name(id=name):
                return self._named(name, module, depth)
            case ast.BinOp(left=left, op=ast.BitOr(), right=right):
                return _union([self._kind(left, module, depth), self._kind(right, module, depth)])
            case ast.Subscript(value=ast.Name(id=name), slice=inner):
                return self._subscript(name, inner, module, depth)
        return None

    def _subscript(self, name: str, inner: ast.expr, module: str, depth: int) -> Kind | None:
        members = inner.elts if isinstance(inner, ast.Tuple) else [inner]
        if name in _CONTAINERS:
            return Kind(frozenset({_CONTAINERS[name]}))
        if name == "Literal":
            return Kind(frozenset(), tuple(m.value for m in members if isinstance(m, ast.Constant)))
        if name in ("Union", "Optional"):
            none = [Kind(frozenset({"null"}))] if name == "Optional" else []
            return _union([*(self._kind(member, module, depth) for member in members), *none])
        return self._kind(members[0], module, depth) if name == "Annotated" else None

    def _named(self, name: str, module: str, depth: int) -> Kind | None:
        if name in _PLAIN:
            return Kind(frozenset({_PLAIN[name]}))
        if name in _CONTAINERS:
            return Kind(frozenset({_CONTAINERS[name]}))
        found = self.sources.definition(module, name) if depth else None
        if found is None:
            return None
        statement, where = found
        if isinstance(statement, ast.ClassDef):
            return self._class(statement, where, depth - 1)
        return self._kind(statement, where, depth)

    def _class(self, definition: ast.ClassDef, module: str, depth: int) -> Kind | None:
        """A dictionary with the fields of the class; enumerations take names in any spelling."""
        if any("Enum" in ast.unparse(base) for base in definition.bases):
            return None
        annotated = self.sources.annotations(module, definition.name)
        if not annotated:
            return None
        fields = {name: self._field(*found, depth) for name, found in annotated.items()}
        return Kind(frozenset({"dict"}), fields=fields)

    def _field(self, annotation: ast.expr, default: ast.expr | None, module: str, depth: int) -> Kind | None:
        kind = self._kind(annotation, module, depth)
        return kind and Kind(kind.types | ({"null"} if _is_none(default) else set()), kind.options, kind.fields)


def _union(kinds: list[Kind | None]) -> Kind | None:
    known = [kind for kind in kinds if kind is not None]
    if len(known) < len(kinds):
        return None
    fields = [kind.fields for kind in known if "dict" in kind.types]
    return Kind(
        frozenset().union(*(kind.types for kind in known)),
        tuple(option for kind in known for option in kind.options),
        fields[0] if len(fields) == 1 else None,
    )


def _is_none(default: ast.expr | None) -> bool:
    return isinstance(default, ast.Constant) and default.value is None


def _type_of(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, (list, tuple)):
        return "list"
    return "dict" if isinstance(value, Mapping) else type(value).__name__
