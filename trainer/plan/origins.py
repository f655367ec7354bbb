"""Where each value of a configuration comes from.

Hydra merges YAML files and the command line and forgets which was which, so the same files are read again, one by one,
in the order in which Hydra merges them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from trainer.config.errors import UserError
from trainer.config.keys import known_keys
from trainer.config.load import CONFIG_DIR, DEFAULT_CONFIG_NAME, RECIPE_DIR, full_name
from trainer.config.overrides import override_key, prepare_overrides
from trainer.config.verl.translate import assign, remove, translate_nested

Source = Literal["default", "recipe", "command line", "older name", "roll", "inherited", "adapted", "unknown"]


@dataclass(frozen=True, slots=True)
class Origin:
    """Of one value. detail: the file; the override as it was typed; the older name; the path in ROLL's file; for a
    value that is another key's, where that one's came from; for one that was adapted, why. key: that other key.
    """

    source: Source
    detail: str
    key: str | None = None

    @property
    def told(self) -> str:
        """For people."""
        if self.source == "inherited":
            return f"from {self.key} ({self.detail})"
        shown = {"default": "default", "recipe": self.detail, "unknown": "unknown"}
        return shown.get(self.source, f"{self.source}: {self.detail}")


Origins = dict[str, Origin]
UNKNOWN = Origin("unknown", "")


def origins_of(argv: Sequence[str], tree: DictConfig, *, roll: Mapping[str, str] | None = None) -> Origins:
    """Of every key in `tree`, as composed from the command line `argv`. roll: our key to the place in a ROLL file that
    gave it its value.

    Overrides of the command line win over everything; then what ROLL's file says, recipes, defaults.
    """
    arguments = get_args_parser().parse_intermixed_args(list(argv))
    added = [Path(path) for path in (arguments.config_path, arguments.config_dir) if path is not None]
    found: Origins = {}
    name = full_name(arguments.config_name or DEFAULT_CONFIG_NAME, *added, CONFIG_DIR)
    for file in files_of(name, [*added, CONFIG_DIR, RECIPE_DIR]):
        found |= _of_file(file)
    found |= {key: Origin("roll", path) for key, path in (roll or {}).items()}
    for override in arguments.overrides:
        found |= _of_override(override)
    found |= _decided_together(arguments.overrides, tree)
    found = {key: origin for key, origin in found.items() if _is_ours(key)}
    return _inherit(found, tree)


def files_of(name: str, directories: Sequence[Path]) -> list[Path]:
    """The YAML files that a configuration is merged from, first the one that all others win over.

    Only what our files use of Hydra's defaults lists: names of other files, and `_self_`.
    """
    file = next((path for directory in directories if (path := directory / f"{name}.yaml").is_file()), None)
    if file is None:
        return []
    content = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    defaults = content.get("defaults", []) if isinstance(content, dict) else []
    names = [entry for entry in defaults if isinstance(entry, str)]
    chain: list[Path] = []
    for entry in names if "_self_" in names else [*names, "_self_"]:
        chain += [file] if entry == "_self_" else files_of(entry.lstrip("/"), [file.parent, *directories])
    return chain


def _of_file(file: Path) -> Origins:
    """Every value that one file sets; older spellings under their name of today."""
    content = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    assert isinstance(content, dict)
    is_default = file.parent == CONFIG_DIR and file.stem == DEFAULT_CONFIG_NAME
    found: Origins = {}
    for key, value in leaves({str(name): below for name, below in content.items()}):
        for new in _todays(key, value):
            if new != key:
                found[new] = Origin("older name", f"{key} in {file.name}")
            else:
                found[new] = Origin("default" if is_default else "recipe", file.name)
    return found


def _todays(key: str, value: object) -> list[str]:
    """What a key of a YAML file is called today."""
    tree: dict[str, Any] = {}
    assign(tree, key, value)
    translate_nested(tree)
    return [new for new, _ in leaves(tree)]


def _of_override(override: str) -> Origins:
    """What one override sets, by the names of today."""
    try:
        prepared, _ = prepare_overrides([override])
    except UserError:  # it is wrong only without the others, which were checked together
        prepared = [override]
    typed = override_key(override)
    found: Origins = {}
    for each in prepared:
        key = override_key(each)
        origin = Origin("command line" if key == typed else "older name", override)
        found |= dict.fromkeys(_set_by(key, each), origin)
    return found


def _decided_together(overrides: Sequence[str], tree: DictConfig) -> Origins:
    """What those overrides set whose meaning takes other keys too: seen by translating the tree with each alone."""
    typed = {override_key(override): override for override in overrides}
    pending = {key: override for key, override in typed.items() if not _is_known(key) and _holds(tree, key)}
    found: Origins = {}
    for key, override in pending.items():
        nested: Any = OmegaConf.to_container(tree, resolve=False)
        for other in pending.keys() - {key}:
            remove(nested, other)
        before = deepcopy(dict(leaves(nested)))
        translate_nested(nested, keep=typed.keys())
        after = dict(leaves(nested))
        changed = [name for name, value in after.items() if _is_known(name) and before.get(name) != value]
        found |= dict.fromkeys(changed, Origin("older name", override))
    return found


def _is_known(key: str) -> bool:
    known = known_keys()
    return key in known.leaves or key in known.sections or known.is_free(key)


def _holds(tree: DictConfig, key: str) -> bool:
    node: Any = tree
    for name in key.split("."):
        if not isinstance(node, DictConfig) or name not in node:
            return False
        node = node._get_node(name)
    return True


def _set_by(key: str, override: str) -> list[str]:
    """The leaves that an override sets: one, or those of a dictionary for a section."""
    if key not in known_keys().sections:
        return [key]
    try:
        value = OverridesParser.create().parse_override(override).value()
    except HydraException:
        return [key]
    return [f"{key}.{below}" for below, _ in leaves(value)] if isinstance(value, dict) else [key]


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(key, value) of everything in a nested dictionary; dictionaries of the user's own are values."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key not in known_keys().free_form:
            yield from leaves(value, f"{key}.")
        else:
            yield key, value


def _is_ours(key: str) -> bool:
    return key.partition(".")[0] not in ("hydra", "defaults")


def _inherit(found: Origins, tree: DictConfig) -> Origins:
    """Keys whose value is another key's, by interpolation, told with that one's origin."""
    raw = OmegaConf.to_container(tree, resolve=False)
    assert isinstance(raw, dict)
    values = dict(leaves({str(name): below for name, below in raw.items()}))
    by_leaf = {_leaf(key): origin for key, origin in found.items()}
    return {key: _resolved(key, by_leaf, values, ()) for key in sorted(by_leaf)}


def _resolved(key: str, found: Origins, values: Mapping[str, Any], seen: tuple[str, ...]) -> Origin:
    origin = found.get(key, UNKNOWN)
    target = _target(key, values.get(key))
    if target is None or target in seen or target not in found:
        return origin
    source = _resolved(target, found, values, (*seen, key))
    return Origin("inherited", source.told, target)


def _target(key: str, value: object) -> str | None:
    """The key that `${...}` names, relative or absolute; None: the value is not one other key's alone."""
    matched = re.fullmatch(r"\$\{(\.*)([\w.]+)\}", value) if isinstance(value, str) else None
    if matched is None:
        return None
    dots, name = matched.groups()
    if not dots:
        return name
    parents = key.split(".")[: -len(dots)]
    return ".".join([*parents, name])


def _leaf(key: str) -> str:
    """A key below a dictionary of the user's own is told with the dictionary."""
    return next((free for free in known_keys().free_form if key.startswith(f"{free}.")), key)
