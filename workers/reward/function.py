"""Find the reward function that a configuration names.

A reward function has verl's signature and returns a number, or a dictionary with the number under "score":

    def compute_score(data_source, solution_str, ground_truth, extra_info): ...

This module is imported by every reward process, so it must stay light: nothing but the standard library.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from workers.reward import scorers

RewardFunction = Callable[..., Any]
ARGUMENTS = ("data_source", "solution_str", "ground_truth", "extra_info")
"""A reward function is called with exactly these, by keyword."""

_PATH_KEY = "reward.custom_reward_function.path"
_NAME_KEY = "reward.custom_reward_function.name"


@dataclass(frozen=True, slots=True)
class RewardSpec:
    """Which reward function to use; two strings, so it travels to any process.

    path: a Python file, or a dotted module name; None: the built-in scorers, and `name` is not looked at.
    name: the function in it.
    """

    path: str | None
    name: str = "compute_score"

    def resolved(self) -> RewardSpec:
        """The same function by absolute file name: a Ray worker may have another working directory."""
        if self.path is None or not _is_file(self.path):
            return self
        return replace(self, path=str(_file(self.path)))


def load_reward_function(spec: RewardSpec) -> RewardFunction:
    """Import the reward function.

    Raises ValueError, naming the keys, if the file or module cannot be imported, has no such function, or the
    function cannot be called with the four arguments by keyword.
    """
    if spec.path is None:
        return scorers.compute_score
    module = _import_file(spec.path) if _is_file(spec.path) else _import_module(spec.path)
    function: RewardFunction | None = vars(module).get(spec.name)
    if not callable(function):
        names = ", ".join(_functions(module)) or "none"
        what = "is not a function" if spec.name in vars(module) else "does not exist"
        raise ValueError(f"{_NAME_KEY}={spec.name} {what} in {_PATH_KEY}={spec.path}; functions there: {names}")
    _check_signature(function, spec)
    return function


def _is_file(path: str) -> bool:
    return path.startswith("file://") or path.endswith(".py") or os.sep in path.removeprefix("pkg://")


def _file(path: str) -> Path:
    return Path(path.removeprefix("file://")).expanduser().resolve()


def _import_file(path: str) -> ModuleType:
    file = _file(path)
    if not file.is_file():
        raise ValueError(f"{_PATH_KEY}={path}: there is no such file ({file})")
    name = f"tandem_reward_{file.stem}"
    module_spec = importlib.util.spec_from_file_location(name, file)
    if module_spec is None or module_spec.loader is None:
        raise ValueError(f"{_PATH_KEY}={path} is not a Python file; it must end in .py")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module  # dataclasses and pickle look modules up by name
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))  # lets the file import its neighbours; last, so that it shadows nothing
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ValueError(_import_failed(path, error)) from error
    return module


def _import_module(path: str) -> ModuleType:
    try:
        return importlib.import_module(path.removeprefix("pkg://"))
    except (Exception, SystemExit) as error:
        raise ValueError(_import_failed(path, error)) from error


def _import_failed(path: str, error: BaseException) -> str:
    return f"{_PATH_KEY}={path} cannot be imported: {type(error).__name__}: {error}"


def _functions(module: ModuleType) -> list[str]:
    own = (name for name, value in vars(module).items() if inspect.isfunction(value))
    return sorted(name for name in own if not name.startswith("_"))


def _check_signature(function: RewardFunction, spec: RewardSpec) -> None:
    where = f"{_NAME_KEY}={spec.name} of {_PATH_KEY}={spec.path}"
    if inspect.iscoroutinefunction(function):
        raise ValueError(f"{where} is asynchronous; make it a plain function (it runs in processes of its own)")
    try:
        inspect.signature(function).bind(**dict.fromkeys(ARGUMENTS))
    except TypeError as error:
        wanted = ", ".join(ARGUMENTS)
        raise ValueError(f"{where} cannot be called with the keyword arguments {wanted}: {error}") from error
    except ValueError:
        return  # written in C without a signature; calling it will tell
