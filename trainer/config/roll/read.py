"""Reads a YAML file of ROLL's: Hydra's `defaults`, changes from the command line, `${...}`. Nothing is evaluated."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    MissingMandatoryValue,
    OmegaConfBaseException,
    UnsupportedInterpolationType,
)

from trainer.config.errors import UserError, show
from trainer.config.roll.parse import parse
from trainer.config.roll.places import Places, placed

_HYDRAS_OWN = ("hydra", "defaults")
_OPTIONAL = "optional "
_NOT_NEEDED = re.compile(r"deepspeed_zero\w*|\w*envs")
"""Files of ROLL's for DeepSpeed (which it had until 0.2) and for agents: nothing here could use what they hold."""
_INTERPOLATED = re.compile(r"\$\{\s*([A-Za-z_]\w*)")
_PIPELINES = {
    "sft_train": "SFT",
    "chosen_key": "DPO",
    "student": "distillation",
    "teacher": "distillation",
    "custom_envs": "agentic",
    "train_env_manager": "agentic",
}
"""Keys that ROLL's RLVR pipeline does not have, and the pipeline that does."""


@dataclass(frozen=True, slots=True)
class RollFile:
    """nested: the resolved values. variables: top-level names that others refer to (`${name}`), or that a file of
    `defaults` brings, and which therefore need not be keys of ROLL's. places: where the keys stand.
    """

    nested: dict[str, Any]
    variables: frozenset[str]
    places: Places = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Part:
    """One file with its defaults. inherited: the top-level names that come from those."""

    tree: DictConfig
    places: dict[str, str]
    inherited: frozenset[str] = frozenset()


def read_roll(path: Path, changes: Mapping[str, Any] | None = None) -> RollFile:
    """Read a file with all that its `defaults` name, apply changes (dotted key of ROLL's -> value), and resolve it.

    Raises UserError for a file that is not there, not YAML or not of the RLVR pipeline, and for an interpolation that
    leads nowhere.
    """
    part = _load(path, ())
    tree, places = part.tree, part.places
    for key, value in (changes or {}).items():
        try:
            OmegaConf.update(tree, key, value, merge=False, force_add=True)
        except OmegaConfBaseException as error:
            raise UserError(f"roll.{key}={value}: {_first_line(error)}; name a key below a section") from error
        places = {name: place for name, place in places.items() if not name.startswith(f"{key}.")}
        places[key] = "command line"
    variables = part.inherited | set(_INTERPOLATED.findall(str(OmegaConf.to_container(tree, resolve=False))))
    for name in _HYDRAS_OWN:
        tree.pop(name, None)
    _refuse_others(path, {str(name) for name in tree})
    with placed(places):
        values = _resolve(tree)
    return RollFile({str(name): value for name, value in values.items()}, variables, places)


def _refuse_others(path: Path, names: set[str]) -> None:
    """Raise UserError for a file that is none of ROLL's RLVR pipeline: its keys would all be wrong."""
    if "actor_rollout_ref" in names:
        raise UserError(
            f"roll.config={path}: actor_rollout_ref is no key of ROLL's but of this program; start such a file with "
            f"--config-dir {path.parent} --config-name {path.stem}"
        )
    for name, pipeline in _PIPELINES.items():
        if name in names:
            raise UserError(
                f"roll.config={path}: {name} belongs to ROLL's {pipeline} pipeline, and only RLVR is there; give the "
                "YAML file of an RLVR run"
            )


def _resolve(tree: DictConfig) -> dict[Any, Any]:
    try:
        values = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(_unresolved(tree, error)) from error
    assert isinstance(values, dict)
    return values


def _unresolved(tree: DictConfig, error: OmegaConfBaseException) -> str:
    key = str(error.full_key)
    if isinstance(error, MissingMandatoryValue):
        return f"roll.{key}=???: has no value yet; write one"
    raw = OmegaConf.to_container(tree, resolve=False)
    for name in key.split("."):
        raw = raw.get(name) if isinstance(raw, dict) else None
    value = f"={show(raw)}" if raw is not None else ""
    reason = _first_line(error).rpartition("raised while resolving interpolation: ")[2].strip("'\"")
    remedy = "define it in the file, or write the value itself"
    if isinstance(error, UnsupportedInterpolationType):
        remedy = "nothing is evaluated here: write the value itself"
    elif "oc.env" in str(raw):
        remedy = "set it, or write the value itself"
    return f"roll.{key}{value}: {reason}; {remedy}"


def _load(path: Path, above: Sequence[Path]) -> _Part:
    """The file merged over its defaults. above: the files that led here, against circles."""
    if path in above:
        raise UserError(f"roll.config={above[0]}: defaults lead from {path} back to itself; take one entry out")
    tree, places = parse(path)
    own, order = _Part(tree, places), list(_entries(tree, path))
    parts = {entry: _default(entry, path, above) for entry in order if entry != "_self_"}
    if not parts:
        return own
    chain = [own if entry == "_self_" else parts[entry] for entry in order]
    chain += [] if "_self_" in order else [own]
    merged = OmegaConf.merge(*[part.tree for part in chain])
    assert isinstance(merged, DictConfig)
    every = {name: place for part in chain for name, place in part.places.items()}
    return _Part(merged, every, frozenset(str(name) for part in parts.values() for name in part.tree))


def _entries(tree: DictConfig, path: Path) -> Iterator[str]:
    """What `defaults` names, as `folder/name@package`, perhaps behind `optional `; entries about Hydra itself have no
    meaning here.
    """
    listed = OmegaConf.to_container(tree, resolve=False)["defaults"] if "defaults" in tree else None  # type: ignore[call-overload,index]
    if listed is not None and not isinstance(listed, list):
        raise UserError(f"roll.config={path}: defaults={show(listed)} must be a list; write [name, _self_]")
    for entry in listed or []:
        for group, name in entry.items() if isinstance(entry, dict) else [("", entry)]:
            *words, group = str(group).split(" ")
            group = group.removeprefix("/")
            if name is None or group.startswith("hydra"):
                continue
            folder, _, package = group.partition("@")
            optional = _OPTIONAL if "optional" in words else ""
            yield "".join([optional, f"{folder}/" if folder else "", str(name), f"@{package}" if package else ""])


def _default(entry: str, path: Path, above: Sequence[Path]) -> _Part:
    """What one entry of `defaults` brings: `folder/name`, `folder/name@_here_` or `folder/name@package`.

    Behind `optional `: nothing, where there is no such file.
    """
    name, _, package = entry.removeprefix(_OPTIONAL).partition("@")
    file = (path.parent / f"{name}.yaml").resolve()
    if _NOT_NEEDED.fullmatch(file.stem):
        return _Part(OmegaConf.create({file.stem: {}}), {})
    if not file.is_file():
        if entry.startswith(_OPTIONAL):
            return _Part(OmegaConf.create({}), {})
        raise UserError(
            f"roll.config={path}: defaults names {entry}, and there is no {file}; put the file there, or take the "
            "entry out where nothing refers to it"
        )
    part = _load(file, (*above, path))
    if package in ("", "_here_", "_global_"):
        return part
    nested: dict[str, Any] = {}
    OmegaConf.update(tree := OmegaConf.create(nested), package, part.tree, force_add=True)
    return _Part(tree, {f"{package}.{name}": place for name, place in part.places.items()})


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".")
