"""What `--help` prints: how to run it, the recipes, and every key with its value and what it does."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from omegaconf import DictConfig, OmegaConf

from trainer.config.describe import Entry, SectionText, describe
from trainer.config.errors import UserError, show
from trainer.config.keys import known_keys
from trainer.config.load import RECIPE_DIR

_COLUMN = 44
"""Where the explanations begin."""

_USAGE = "python -m trainer.main [--config-name NAME] [key=value ...]"
_OPTIONS = {
    "--config-name NAME": "start from a recipe: {recipes} (with --config-dir DIR: of your own, in DIR)",
    "--help [WORD ...]": "all of this, or only the keys that have such a word in their names",
    "--cfg job [--resolve]": "print what this command line resolves to, as YAML, and exit",
    "trainer.dry_run=true": "print what would run where, and exit",
}
_OPTIONS_COLUMN = 27
_KEYS = (
    "Below a line `section:` stand its keys, to be given as section.key=value, each with its value and what it does."
)


def help_text(tree: DictConfig, words: Sequence[str] = (), *, width: int = 120) -> str:
    """The help for the composed `tree`: its values, and behind those that a recipe or an override changed the default.

    words: keep only the keys that have one of them in their full name. Raises UserError where none has.
    """
    sections = [(section, _matching(section, words)) for section in describe()]
    if words and not any(kept for _, kept in sections):
        near = " or ".join(known_keys().nearest(words[0])) or "nothing that is near"
        raise UserError(f"--help {' '.join(words)}: no key has such a word in its name; there is {near}")
    values = OmegaConf.to_container(tree, resolve=False)
    recipes = ", ".join(sorted(path.stem for path in RECIPE_DIR.glob("*.yaml")))
    options = [_line(left, right.format(recipes=recipes), width, _OPTIONS_COLUMN) for left, right in _OPTIONS.items()]
    head = [_USAGE, "", *(line for lines in options for line in lines), "", *textwrap.wrap(_KEYS, width), ""]
    blocks = [_block(section, kept, values, width) for section, kept in sections if kept]
    return "\n".join(blocks if words else [*head, *blocks])


def _matching(section: SectionText, words: Sequence[str]) -> list[Entry]:
    return [entry for entry in section.entries if not words or any(word in entry.key for word in words)]


def _block(section: SectionText, kept: Sequence[Entry], values: object, width: int) -> str:
    lines = _line(f"{section.key}:", section.about, width)
    for entry in kept:
        value = _lookup(entry.key, values)
        lines += _line(f"  {entry.name}: {_shown(entry, value)}", _about(entry, value), width)
    return "\n".join([*lines, ""])


def _line(left: str, right: str, width: int, column: int = _COLUMN) -> list[str]:
    """`right` beside `left`, or below it where that is too long; words stay whole."""
    room = max(30, width - column)
    wrapped = textwrap.wrap(right, room, break_long_words=False, break_on_hyphens=False) or [""]
    first = [left] if len(left) >= column - 1 else [f"{left:<{column}}{wrapped.pop(0)}".rstrip()]
    return first + [" " * column + line for line in wrapped]


def _shown(entry: Entry, value: object) -> str:
    return entry.default if entry.default.startswith("as ") and "${" in str(value) else show(value)


def _about(entry: Entry, value: object) -> str:
    followed = "${" in str(value)
    changed = not followed and OmegaConf.create({"x": value}) != OmegaConf.create(f"x: {entry.default}")
    return f"{entry.about} (default: {entry.default})" if changed else entry.about


def _lookup(key: str, values: object) -> object:
    """A value as it stands in the tree, interpolations unresolved."""
    for name in key.split("."):
        assert isinstance(values, dict)
        values = values[name]
    return values
