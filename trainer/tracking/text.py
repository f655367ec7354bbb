"""Text from models and data, made safe to look at."""

from __future__ import annotations

import unicodedata

_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\x1b": "\\e"}
_JOINERS = "\u200c\u200d"  # invisible, but part of how some scripts and emoji are written
_HIDDEN_CATEGORIES = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def visible(text: str, *, keep: str = "") -> str:
    """Control, invisible and direction-changing characters as escapes, so that text can neither move the cursor
    nor pretend to be something else. Characters in `keep` stay as they are."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(char if char in keep else _escape(char) for char in text)


def _escape(char: str) -> str:
    if char in _SHORT:
        return _SHORT[char]
    if char in _JOINERS or unicodedata.category(char) not in _HIDDEN_CATEGORIES:
        return char
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def shorten(text: str, limit: int) -> str:
    """At most `limit` characters: the beginning and the end, which say most, with "..." between."""
    if len(text) <= limit:
        return text
    head = (limit - 3) * 2 // 3
    return f"{text[:head]}...{text[len(text) - (limit - 3 - head) :]}"


def duration(seconds: float) -> str:
    """Seconds as 12s, 3:05, 1:02:03 or 15h20m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    hours, rest = divmod(whole, 3600)
    minutes, secs = divmod(rest, 60)
    if hours >= 10:
        return f"{hours}h{minutes:02d}m"
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"


def size(num_bytes: float) -> str:
    """Bytes in binary units: 512 B, 1.5 GiB."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def score(value: float | None) -> str:
    """A mean reward: as a percentage where it lies in [0, 1], as a number otherwise, "-" where there is none."""
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" if 0 <= value <= 1 else f"{value:.3f}"
