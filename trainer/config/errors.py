"""The one kind of error that is the user's to fix, and how several of them become one message."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class UserError(ValueError):
    """A mistake in what the user gave us. The message names key, value and remedy, so no traceback is shown."""


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn a ValueError raised inside into a UserError with the same message (for code that reads user input)."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error


def complain(message: str) -> None:
    """Write an error as the user sees it: on standard error, red first on a terminal unless NO_COLOR is set."""
    red, plain = ("\033[31m", "\033[0m") if sys.stderr.isatty() and "NO_COLOR" not in os.environ else ("", "")
    print(f"{red}error:{plain} {message}", file=sys.stderr)


def raise_problems(problems: Sequence[str]) -> None:
    """Raise one UserError that lists every problem; do nothing when there is none."""
    if not problems:
        return
    if len(problems) == 1:
        raise UserError(problems[0])
    lines = "\n".join(f"  {problem}" for problem in problems)
    raise UserError(f"{len(problems)} problems in the configuration:\n{lines}")


def show(value: object) -> str:
    """Write a value as it stands in YAML and on the command line: null, true, [a, b]."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(show(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {show(item)}" for key, item in value.items()) + "}"
    return str(value)
