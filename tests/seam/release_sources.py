"""Reads one vLLM release's sources for the contract test, on purpose not with the seam's own reader.

Code is compared in the form of `ast.unparse`: without comments, each expression on one line, quotes and breaks uniform.
"""

from __future__ import annotations

import ast
from functools import lru_cache

from packaging.version import Version

from scripts.versions.sources import directory


class Release:
    """The sources of one release. Files are named below `vllm`: "engine/arg_utils.py"."""

    def __init__(self, name: str) -> None:
        self.version = Version(name)
        self.root = directory(name) / "vllm"
        self.tree = lru_cache(maxsize=None)(self._parse)
        self.classes = lru_cache(maxsize=None)(self._classes)

    def __str__(self) -> str:
        return str(self.version)

    def text(self, path: str) -> str:
        """The file as it is; "" if there is none."""
        file = self.root / path
        return file.read_text(encoding="utf-8") if file.is_file() else ""

    def files(self, pattern: str) -> list[str]:
        """Paths that match a glob pattern."""
        return sorted(str(path.relative_to(self.root)) for path in self.root.glob(pattern))

    def class_(self, name: str, *paths: str) -> ast.ClassDef | None:
        """A class by name, in the first of the files that has it."""
        return next((found for path in paths if (found := self.classes(path).get(name))), None)

    def function(self, name: str, *paths: str) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
        """A function, "f" or "Class.f", in the first of the files that has it; bases are not followed."""
        cls, _, method = name.rpartition(".")
        for path in paths:
            bodies = [self.tree(path)] if not cls else [self.class_(cls, path)]
            for body in bodies:
                found = [n for n in (body.body if body else ()) if _is_function(n) and n.name == method]
                if found:
                    return found[-1]
        return None

    def code(self, name: str, *paths: str) -> str:
        """The function's code, see above; "" if there is none."""
        found = self.function(name, *paths)
        return ast.unparse(found) if found else ""

    def fields(self, name: str, *paths: str) -> frozenset[str]:
        """Annotated names in a class body: a dataclass's fields."""
        found = self.class_(name, *paths)
        return frozenset(
            node.target.id
            for node in (found.body if found else ())
            if isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and "ClassVar" not in ast.unparse(node.annotation)
        )

    def parameters(self, name: str, *paths: str) -> tuple[list[str], int] | None:
        """Names of a function's parameters without self, and how many must be given; None if there is no function."""
        found = self.function(name, *paths)
        if found is None:
            return None
        arguments = found.args
        names = [a.arg for a in (*arguments.posonlyargs, *arguments.args) if a.arg not in ("self", "cls")]
        num_required = len(names) - len(arguments.defaults)
        for keyword, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
            names.append(keyword.arg)
            num_required += default is None
        return names, num_required

    def defines(self, module: str, name: str) -> bool:
        """Whether `from vllm.<module> import <name>` can work: a definition, an import, a lazy entry or a submodule."""
        base = "/".join(module.split(".")) if module else "."
        if self.files(f"{base}/{name}.py") or self.files(f"{base}/{name}/__init__.py"):
            return True
        path = f"{base}.py" if self.files(f"{base}.py") else f"{base}/__init__.py"
        for node in ast.walk(self.tree(path)):
            if _is_function(node) or isinstance(node, ast.ClassDef):
                if node.name == name:
                    return True
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                if name in {alias.asname or alias.name for alias in node.names}:
                    return True
            elif isinstance(node, ast.Assign) and name in {ast.unparse(target) for target in node.targets}:
                return True
        return False

    def _parse(self, path: str) -> ast.Module:
        return ast.parse(self.text(path))

    def _classes(self, path: str) -> dict[str, ast.ClassDef]:
        return {node.name: node for node in ast.walk(self.tree(path)) if isinstance(node, ast.ClassDef)}


def _is_function(node: ast.AST) -> bool:
    return isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))


def comes_before(code: str, first: str, second: str) -> bool:
    """Whether both are in the code, in this order."""
    return 0 <= code.find(first) < code.find(second)
