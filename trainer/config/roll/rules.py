"""What becomes of a key of ROLL's: one rule per key, in exactly one of three classes.

translated: it sets keys of ours. no effect: accepted, and said with the reason. refused: an error with the reason and
the remedy. A rule's `quiet` values ask for nothing that does not happen here anyway: nothing is said, nothing refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

Kind = Literal["translated", "no effect", "refused"]


@dataclass(frozen=True, slots=True)
class Rule:
    """One row of the table.

    text: translated: our keys, as docs/roll.md shows them; else the reason. remedy: of what is refused.
    copies_to: our key that simply takes the value; None where the code computes something. silent: the translation
    says itself what there is to say.
    """

    kind: Kind
    text: str
    remedy: str = ""
    quiet: tuple[object, ...] = ()
    copies_to: str | None = None
    silent: bool = False


Rules = Mapping[str, Rule]


def copied(key: str, remark: str = "") -> Rule:
    """The value is that of our `key`."""
    return Rule("translated", f"`{key}`" + (f"; {remark}" if remark else ""), copies_to=key)


def computed(text: str) -> Rule:
    """The value takes part in what `text` says; backquoted names are keys of ours."""
    return Rule("translated", text)


def no_effect(reason: str, *quiet: object) -> Rule:
    """Accepted; the user is told the reason unless the value is one of `quiet`."""
    return Rule("no effect", reason, quiet=quiet)


def compared(reason: str) -> Rule:
    """Accepted without effect; the translation tells the reason where the value is not what it finds."""
    return Rule("no effect", reason, silent=True)


def refused(reason: str, remedy: str, *quiet: object) -> Rule:
    """An error unless the value is one of `quiet`."""
    return Rule("refused", reason, remedy, quiet)


def is_quiet(rule: Rule, value: object) -> bool:
    """Whether a value asks for nothing else than what happens here; true, 1 and 1.0 are told apart from each other."""
    return rule.silent or any(
        value == quiet and isinstance(value, bool) == isinstance(quiet, bool) for quiet in rule.quiet
    )


def nearest(name: str, names: Mapping[str, object] | set[str]) -> str:
    """The name that a mistyped one probably meant; empty where nothing is close."""
    found = get_close_matches(name, list(names), n=1, cutoff=0.7)
    return found[0] if found else ""
