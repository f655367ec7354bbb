"""One's own algorithm: a plain function given by import path, `package.module:function` or `path/to/file.py:function`.

A path is text, so it can be pickled and sent; each process loads the function once, when it is first needed.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import zlib
from collections.abc import Callable, Collection, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

FORMS = "package.module:function or path/to/file.py:function"


def is_path(name: str) -> bool:
    """Whether a name is meant as an import path: built-in names have no colon."""
    return ":" in name


def load(path: str, key: str) -> Callable[..., Any]:
    """The function at an import path; key: the configuration key that holds it, for the message.

    The module is imported once per process. Raises ValueError with key, value and remedy where there is no such
    module, file or function, or where its code fails while it is imported.
    """
    place, colon, name = path.rpartition(":")
    if not colon or not place or not name.isidentifier():
        raise ValueError(f"{key}={path}: not an import path; write {FORMS}")
    try:
        module = _import(place)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{key}={path}: cannot be imported ({error}); check the spelling, and that its package is installed or "
            "its directory is in PYTHONPATH"
        ) from error
    except FileNotFoundError as error:
        raise ValueError(f"{key}={path}: there is no file {error}; write {FORMS}") from error
    except (Exception, SystemExit) as error:
        raise ValueError(f"{key}={path}: cannot be imported; mend it ({type(error).__name__}: {error})") from error
    return _function(module, name, f"{key}={path}")


def check_params(
    function: Callable[..., Any], params: Mapping[str, Any], *, key: str, owner: str, taken: Collection[str] = ()
) -> None:
    """Raises ValueError, listing the known names, unless every parameter is one of the function's keyword arguments.

    Nor may one be missing, or be something else than true or false where the default is that, nor may the function
    hide its arguments, as some built into Python do.
    key: the configuration key of the parameters. owner: what they belong to, e.g. "algorithm.adv_estimator=gae".
    taken: arguments that do not come from there. A function with ** arguments takes any name.
    """
    try:
        arguments = [p for p in inspect.signature(function).parameters.values()][1:]
    except ValueError as error:
        raise ValueError(f"{owner}: {error}; write a function that calls it") from error
    if any(p.kind is p.VAR_KEYWORD for p in arguments):
        return
    known = [p for p in arguments if p.name not in taken and p.kind is not p.VAR_POSITIONAL]
    names = ", ".join(p.name for p in known)
    for name in params:
        if name not in {p.name for p in known}:
            raise ValueError(
                f"{key}.{name}: unknown parameter of {owner}; " + (f"it has {names}" if names else "it has none")
            )
    for p in known:
        if isinstance(p.default, bool) and not isinstance(params.get(p.name, p.default), bool):
            raise ValueError(f"{key}.{p.name}={params[p.name]}: must be true or false for {owner}")
    missing = [p.name for p in known if p.default is p.empty and p.name not in params]
    if missing:
        raise ValueError(f"{key}: {owner} needs {', '.join(missing)}; set {key}.{missing[0]}")


def _function(module: ModuleType, name: str, where: str) -> Callable[..., Any]:
    found = vars(module).get(name)
    if not callable(found):
        own = sorted(n for n, v in vars(module).items() if inspect.isfunction(v) and not n.startswith("_"))
        what = "is not a function" if name in vars(module) else "does not exist"
        raise ValueError(f"{where}: {name} {what}; functions there: {', '.join(own) or 'none'}")
    function: Callable[..., Any] = found
    return function


@cache
def _import(place: str) -> ModuleType:
    return _import_file(Path(place).expanduser().resolve()) if place.endswith(".py") else importlib.import_module(place)


def _import_file(file: Path) -> ModuleType:
    if not file.is_file():
        raise FileNotFoundError(file)
    name = f"tandem_custom_{file.stem}_{zlib.crc32(str(file).encode()):08x}"  # two files may have the same name
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None, file  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look modules up by name
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))  # lets the file import its neighbours; last, so that it shadows nothing
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
