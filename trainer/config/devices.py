"""Device mappings: which global device ranks a role runs on.

A role takes `0-7`, `0,2,5-6`, `[0, 1]` or ROLL's `list(range(0,12))`; every form becomes a tuple of ranks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from trainer.config.errors import UserError, show

_RANGE = r"range\s*\(([^()]*)\)"
_RANGE_CALLS = (re.compile(_RANGE), re.compile(rf"list\s*\(\s*{_RANGE}\s*\)"))
_REMEDY = "write ranks such as 0-7, 0,2,5-6 or [0,1]"


def parse_device_mapping(value: str | Sequence[int], key: str) -> tuple[int, ...]:
    """Return the global device ranks that `value` names, in the order given.

    key: full name of the configuration key, for the message.
    Raises ValueError for anything but distinct non-negative ranks in one of the accepted forms.
    """
    ranks = _parse_text(value.strip(), key) if isinstance(value, str) else tuple(value)
    if not ranks:
        raise _error(key, value, "names no device")
    if min(ranks) < 0:
        raise _error(key, value, f"{min(ranks)} is negative")
    if len(set(ranks)) < len(ranks):
        twice = sorted({rank for rank in ranks if ranks.count(rank) > 1})
        raise _error(key, value, f"names {show(twice)} more than once")
    return ranks


def _parse_text(text: str, key: str) -> tuple[int, ...]:
    for pattern in _RANGE_CALLS:
        call = pattern.fullmatch(text)
        if call is not None:
            return _parse_range_call(call.group(1), text, key)
    inner = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    ranks: list[int] = []
    for part in inner.split(","):
        ranks.extend(_parse_part(part.strip(), text, key))
    return tuple(ranks)


def _parse_part(part: str, text: str, key: str) -> range:
    match = re.fullmatch(r"(\d+)(?:\s*-\s*(\d+))?", part, flags=re.ASCII)
    if match is None:
        negative = re.fullmatch(r"-\s*\d+", part) is not None
        raise _error(key, text, f"{part} is negative" if negative else f"cannot read '{part}'")
    first = int(match.group(1))
    last = first if match.group(2) is None else int(match.group(2))
    if last < first:
        raise _error(key, text, f"the range {part} runs backwards")
    return range(first, last + 1)


def _parse_range_call(arguments: str, text: str, key: str) -> tuple[int, ...]:
    numbers = [part.strip() for part in arguments.split(",")]
    if not 1 <= len(numbers) <= 3 or any(re.fullmatch(r"-?\d+", number, flags=re.ASCII) is None for number in numbers):
        raise _error(key, text, "range() takes one to three whole numbers")
    if len(numbers) == 3 and int(numbers[2]) <= 0:
        raise _error(key, text, "the step of range() must be positive")
    ranks = tuple(range(*(int(number) for number in numbers)))
    if not ranks:
        raise _error(key, text, "the range is empty or runs backwards")
    return ranks


def _error(key: str, value: object, wrong: str) -> UserError:
    return UserError(f"{key}={show(value)}: {wrong}; {_REMEDY}")
