"""What values each engine argument of a vLLM takes, read from the annotations in its own sources. No vLLM import.

Where an annotation says nothing we can check (a class of torch's, a protocol, Any) anything passes. vLLM itself drops
unknown names inside a dictionary such as compilation_config without a word; so these are looked at as well.
"""

from __future__ import annotations

import ast
import difflib
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
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

_BOUNDS: dict[str, tuple[str, Callable[[float, float], bool]]] = {
    "gt": ("greater than", operator.gt),
    "ge": ("at least", operator.ge),
    "lt": ("less than", operator.lt),
    "le": ("at most", operator.le),
}
"""Of pydantic's `Field`."""

_UNSET = "auto"
"""For many enumerations the same as none, though they have no such name."""

_DEPTH = 3


@dataclass(frozen=True)
class Kind:
    """What a value may be. types: keys of `_WORDS`; options: single values; names: of an enumeration, in any case;
    bounds: of numbers, by keys of `_BOUNDS`; fields: the kinds of what a dictionary may hold, by name; None: anything.
    """

    types: frozenset[str]
    options: tuple[object, ...] = ()
    names: tuple[str, ...] = ()
    bounds: tuple[tuple[str, float], ...] = ()
    fields: Mapping[str, Kind | None] | None = None

    def problems(self, value: object, key: str) -> Iterator[tuple[str, object, str]]:
        """What is wrong with `value` under the name `key`: (full name, the value there, why and what to do)."""
        if isinstance(value, Mapping) and self.fields is not None:
            for name, inner in value.items():
                yield from self._field_problems(str(name), inner, f"{key}.{name}")
        elif _type_of(value) in self._accepted:
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                beyond = [f"{_BOUNDS[b][0]} {limit:g}" for b, limit in self.bounds if not _BOUNDS[b][1](value, limit)]
                if beyond:
                    yield key, value, f"must be {' and '.join(beyond)}"
        elif not (self._is_name(value) or any(value is o or value == o for o in self._same_type(value))):
            yield key, value, self._expectation(value)

    def _is_name(self, value: object) -> bool:
        """Of a member of the enumeration."""
        return isinstance(value, str) and bool(self.names) and value.upper() in (*self.names, _UNSET.upper())

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
        single = [*self.names, *(str(option) for option in self.options)]
        if single:
            asked = str(value).upper() if self.names else str(value)
            near = difflib.get_close_matches(asked, single, n=1)
            accepted = single + [_WORDS[name] for name in sorted(self.types)]
            return f"must be one of {', '.join(accepted)}" + (f"; did you mean {near[0]}?" if near else "")
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
        kind = self._field(annotation, default, module, _DEPTH)
        if kind is None:
            return None
        if name in _AS_CLASS:
            named = self._named(_AS_CLASS[name], module, _DEPTH)
            kind = replace(kind, fields=named.fields if named else None)
        also = {_ALSO[name]} if name in _ALSO else set()
        bounds = kind.bounds or (self._bounds_of(name, default, module) if kind.types & {"int", "float"} else ())
        return replace(kind, types=kind.types | also, bounds=bounds)

    def _bounds_of(self, argument: str, default: ast.expr | None, module: str) -> tuple[tuple[str, float], ...]:
        """Those of the configuration class's field that the argument takes its default from; if it takes it from none,
        those of the one class that has a field of this name.
        """
        match default:
            case ast.Attribute(value=ast.Name(id=cls), attr=name):
                places = [(cls, name)]
            case ast.Call(func=ast.Name(id="get_field"), args=[ast.Name(id=cls), ast.Constant(value=str(name))]):
                places = [(cls, name)]
            case _:
                classes = sorted(n for n in self.sources.names(module) if n.endswith("Config"))
                places = [(cls, argument) for cls in classes]
        found = []
        for cls, name in places:
            definition = self.sources.definition(module, cls)
            if definition is not None and isinstance(definition[0], ast.ClassDef):
                field_of = self.sources.annotations(definition[1], cls).get(name)
                found += [_bounds(field_of[1])] if field_of else []
        return found[0] if len(found) == 1 else ()

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
        """A dictionary with the fields of the class, or the members of an enumeration."""
        bases = [ast.unparse(base) for base in definition.bases]
        if any("Enum" in base for base in bases):
            return _enumeration(definition, bases)
        annotated = self.sources.annotations(module, definition.name)
        if not annotated:
            return None
        fields = {name: self._field(*found, depth) for name, found in annotated.items()}
        return Kind(frozenset({"dict"}), fields=fields)

    def _field(self, annotation: ast.expr, default: ast.expr | None, module: str, depth: int) -> Kind | None:
        kind = self._kind(annotation, module, depth)
        also = {"null"} if _is_none(default) else set()
        return kind and replace(kind, types=kind.types | also, bounds=kind.bounds + _bounds(default))


def _enumeration(definition: ast.ClassDef, bases: list[str]) -> Kind:
    """vLLM takes members by name, in any case; numbers where they are such, and texts."""
    members = [s for s in definition.body if isinstance(s, ast.Assign) and isinstance(s.targets[0], ast.Name)]
    names = tuple(s.targets[0].id.upper() for s in members if isinstance(s.targets[0], ast.Name))
    texts = tuple(
        s.value.value for s in members if isinstance(s.value, ast.Constant) and isinstance(s.value.value, str)
    )
    types = {"int"} if any("Int" in base for base in bases) else set()
    return Kind(frozenset(types), texts if "str" in bases else (), names)


def _bounds(default: ast.expr | None) -> tuple[tuple[str, float], ...]:
    limits = [(keyword.arg, _number(keyword.value)) for keyword in _field_keywords(default) if keyword.arg in _BOUNDS]
    return tuple((name, limit) for name, limit in limits if name is not None and limit is not None)


def _field_keywords(default: ast.expr | None) -> list[ast.keyword]:
    """Of `Field(default=None, gt=0)`."""
    is_field = isinstance(default, ast.Call) and isinstance(default.func, ast.Name) and default.func.id == "Field"
    return default.keywords if is_field and isinstance(default, ast.Call) else []


def _number(node: ast.expr) -> float | None:
    try:
        value = ast.literal_eval(node)
    except ValueError:  # a name, or an expression
        return None
    return value if isinstance(value, (int, float)) else None


def _union(kinds: list[Kind | None]) -> Kind | None:
    known = [kind for kind in kinds if kind is not None]
    if len(known) < len(kinds):
        return None
    fields = [kind.fields for kind in known if "dict" in kind.types]
    return Kind(
        frozenset().union(*(kind.types for kind in known)),
        tuple(option for kind in known for option in kind.options),
        tuple(name for kind in known for name in kind.names),
        fields=fields[0] if len(fields) == 1 else None,
    )


def _is_none(default: ast.expr | None) -> bool:
    inner = [keyword.value for keyword in _field_keywords(default) if keyword.arg == "default"]
    value = inner[0] if inner else default
    return isinstance(value, ast.Constant) and value.value is None


def _type_of(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, (list, tuple)):
        return "list"
    return "dict" if isinstance(value, Mapping) else type(value).__name__
