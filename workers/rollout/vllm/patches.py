"""The three changes that vLLM 0.7.0 to 0.7.2 need, made to the running program and never to its files.

Each rewrites one function: its source is parsed, one statement is changed, and the result takes the old one's place,
also where it was copied by `from ... import`. Releases from 0.7.3 on contain all three.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any


@dataclass(frozen=True)
class Patch:
    """One change. module: below vllm; function: "f" or "Class.f"; rewrite: a statement to what replaces it.

    `rewrite` returns the statement itself to keep it, None to drop it.
    """

    name: str
    module: str
    function: str
    rewrite: Callable[[ast.stmt], ast.stmt | None]

    def rewritten(self, source: str) -> tuple[ast.Module, bool]:
        """The function's source with the change, and whether there was anything to change."""
        tree = ast.parse(textwrap.dedent(source))
        editor = _Editor(self.rewrite)
        editor.visit(tree)
        return ast.fix_missing_locations(tree), editor.changed


def _drop_world_size_check(statement: ast.stmt) -> ast.stmt | None:
    """A job of ours is larger than one engine's world."""
    is_check = (
        isinstance(statement, ast.If)
        and "world_size != tensor_model_parallel_size" in ast.unparse(statement.test)
        and isinstance(statement.body[0], ast.Raise)
    )
    return None if is_check else statement


def _local_rank_from_environment(statement: ast.stmt) -> ast.stmt | None:
    if ast.unparse(statement) == "local_rank = rank":
        return ast.parse("local_rank = int(__import__('os').environ['LOCAL_RANK'])").body[0]
    return statement


def _drop_empty_cache(statement: ast.stmt) -> ast.stmt | None:
    """Emptying the allocator's cache for every file breaks sleep mode's memory pool."""
    return None if ast.unparse(statement) == "torch.cuda.empty_cache()" else statement


PATCHES = (
    Patch("world-size check", "distributed.parallel_state", "initialize_model_parallel", _drop_world_size_check),
    Patch(
        "local rank",
        "executor.uniproc_executor",
        "ExecutorWithExternalLauncher._init_executor",
        _local_rank_from_environment,
    ),
    Patch("empty_cache", "model_executor.model_loader.weight_utils", "pt_weights_iterator", _drop_empty_cache),
)


def apply(package: str = "vllm") -> list[str]:
    """Applies what applies; returns the names of the patches that changed something. Harmless a second time."""
    return [patch.name for patch in PATCHES if _apply(patch, package)]


def _apply(patch: Patch, package: str) -> bool:
    module = importlib.import_module(f"{package}.{patch.module}")
    cls, _, name = patch.function.rpartition(".")
    owner: Any = getattr(module, cls) if cls else module
    old: FunctionType = getattr(owner, name)
    if getattr(old, "_tandem_patched", False):
        return False
    tree, changed = patch.rewritten(inspect.getsource(old))
    if not changed:
        return False
    namespace: dict[str, Any] = {}
    code = compile(tree, inspect.getsourcefile(old) or patch.module, "exec")
    exec(code, module.__dict__, namespace)
    new = namespace[name]
    new._tandem_patched = True
    setattr(owner, name, new)
    if owner is module:
        _rebind_copies(package, name, old, new)
    return True


def _rebind_copies(package: str, name: str, old: FunctionType, new: FunctionType) -> None:
    for key, module in list(sys.modules.items()):
        if key.startswith(package) and isinstance(module, ModuleType) and module.__dict__.get(name) is old:
            setattr(module, name, new)


class _Editor(ast.NodeTransformer):
    def __init__(self, rewrite: Callable[[ast.stmt], ast.stmt | None]) -> None:
        self._rewrite = rewrite
        self.changed = False

    def generic_visit(self, node: ast.AST) -> ast.AST:
        for field, value in ast.iter_fields(node):
            if isinstance(value, list) and value and all(isinstance(v, ast.stmt) for v in value):
                setattr(node, field, self._statements(value))
            elif isinstance(value, ast.AST):
                self.visit(value)
        return node

    def _statements(self, body: list[ast.stmt]) -> list[ast.stmt]:
        kept: list[ast.stmt] = []
        for statement in body:
            new = self._rewrite(statement)
            self.changed |= new is not statement
            if new is statement:
                self.visit(statement)
            if new is not None:
                kept.append(new)
        return kept or [ast.Pass()]
