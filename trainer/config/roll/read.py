"""Reads a YAML file of ROLL's: Hydra's `defaults`, changes from the command line, `${...}`. Nothing is evaluated."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainer.config.errors import UserError

_HYDRAS_OWN = ("hydra", "defaults")
_NOT_NEEDED = re.compile(r"deepspeed_zero\w*|\w*envs")
"""Files of ROLL's for DeepSpeed (which it had until 0.2) and for agents: nothing here could use what they hold."""
_INTERPOLATED = re.compile(r"\$\{\s*([A-Za-z_]\w*)")


@dataclass(frozen=True, slots=True)
class RollFile:
    """nested: the resolved values. variables: top-level names that others refer to (`${name}`), or that a file of
    `defaults` brings, and which therefore need not be keys of ROLL's.
    """

    nested: dict[str, Any]
    variables: frozenset[str]


def read_roll(path: Path, changes: Mapping[str, Any] | None = None) -> RollFile:
    """Read a file with all that its `defaults` name, apply changes (dotted key of ROLL's -> value), and resolve it.

    Raises UserError for a file that is not there or not YAML, and for an interpolation that leads nowhere.
    """
    tree, inherited = _load(path, ())
    for key, value in (changes or {}).items():
        try:
            OmegaConf.update(tree, key, value, merge=False, force_add=True)
        except OmegaConfBaseException as error:
            raise UserError(f"roll.{key}={value}: {_first_line(error)}; name a key below a section") from error
    raw = OmegaConf.to_container(tree, resolve=False)
    assert isinstance(raw, dict)
    for name in _HYDRAS_OWN:
        tree.pop(name, None)
    try:
        values = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        remedy = "define it in the file, or write the value itself"
        raise UserError(f"roll.config={path}: {error.full_key}: {_first_line(error)}; {remedy}") from error
    assert isinstance(values, dict)
    variables = inherited | set(_INTERPOLATED.findall(str(raw)))
    return RollFile({str(name): value for name, value in values.items()}, frozenset(variables))


def _load(path: Path, above: Sequence[Path]) -> tuple[DictConfig, set[str]]:
    """The file merged over its defaults, and the top-level names from there.

    above: the files that led here, against circles.
    """
    if path in above:
        raise UserError(f"roll.config={above[0]}: defaults lead from {path} back to itself; take one entry out")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        looked = f"{error.strerror or error} (looked from {Path.cwd()})"
        raise UserError(f"roll.config={path}: {looked}; give the path of ROLL's YAML file") from error
    try:
        own = OmegaConf.create(text or "{}")
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise UserError(f"roll.config={path}: not readable as YAML ({_first_line(error)}); mend the file") from error
    if not isinstance(own, DictConfig):
        raise UserError(f"roll.config={path}: holds a list, not a configuration; give ROLL's YAML file")
    return _with_defaults(own, path, above)


def _with_defaults(own: DictConfig, path: Path, above: Sequence[Path]) -> tuple[DictConfig, set[str]]:
    entries = [str(entry) for entry in own["defaults"] or []] if "defaults" in own else []
    if not entries:
        return own, set()
    if "_self_" not in entries:
        entries.append("_self_")
    parts = {entry: _default(entry, path, above) for entry in entries if entry != "_self_"}
    merged = OmegaConf.merge(*[own if entry == "_self_" else parts[entry] for entry in entries])
    assert isinstance(merged, DictConfig)
    return merged, {str(name) for part in parts.values() for name in part}


def _default(entry: str, path: Path, above: Sequence[Path]) -> DictConfig:
    """What one entry of `defaults` brings: `folder/name`, `folder/name@_here_` or `folder/name@package`."""
    name, _, package = entry.partition("@")
    file = (path.parent / f"{name}.yaml").resolve()
    if _NOT_NEEDED.fullmatch(file.stem):
        return OmegaConf.create({file.stem: {}})
    if not file.is_file():
        raise UserError(
            f"roll.config={path}: defaults names {entry}, and there is no {file}; put the file there, or take the "
            "entry out where nothing refers to it"
        )
    content, _ = _load(file, (*above, path))
    if package in ("", "_here_", "_global_"):
        return content
    nested: dict[str, Any] = {}
    OmegaConf.update(tree := OmegaConf.create(nested), package, content, force_add=True)
    return tree


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".")
