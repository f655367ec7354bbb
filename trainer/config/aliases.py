"""Older spellings and verl's keys in a nested dictionary: for who needs today's names and no more."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from trainer.config.verl.translate import translate_nested


def translate_tree(tree: dict[str, Any], *, keep: Collection[str] = ()) -> list[str]:
    """Replace them by what they are today, in place; return the notices. What is refused is taken out, and not told.

    keep: keys of today that were set with higher precedence (on the command line) and must not be overwritten.
    """
    return translate_nested(tree, keep=keep).notices()
