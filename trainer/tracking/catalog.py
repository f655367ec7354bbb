"""Which metrics docs/metrics.md describes; a test compares it with what a run logs."""

from __future__ import annotations

import re
from collections.abc import Set as AbstractSet

_NAME = re.compile(r"`([^`\s]+/[^`\s]+)`")
_PLACEHOLDER = re.compile(r"<[^<>]+>")


def documented_metrics(markdown_text: str) -> set[str]:
    """Names in backticks in the first column of the text's tables; `<placeholder>` stands for any text."""
    names: set[str] = set()
    for line in markdown_text.splitlines():
        cells = line.strip().split("|")
        if len(cells) > 2 and not cells[0]:
            names.update(_NAME.findall(cells[1]))
    return names


def is_documented(name: str, documented: AbstractSet[str]) -> bool:
    """Whether a metric is in the set, or matches a name there with placeholders."""
    return name in documented or any(_pattern(entry).fullmatch(name) for entry in documented if "<" in entry)


def _pattern(entry: str) -> re.Pattern[str]:
    return re.compile(".+".join(re.escape(part) for part in _PLACEHOLDER.split(entry)))
