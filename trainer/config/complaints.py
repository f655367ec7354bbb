"""Pydantic's errors in the user's terms: `key=value: what is wrong; what to do`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from trainer.config.describe import entries
from trainer.config.errors import show
from trainer.config.keys import KnownKeys, replaced_section, unknown_key
from trainer.config.verl.names import verl_names

_EXPECTED = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "string_too_short": "must not be empty",
    "too_short": "must have at least {min_length} items",
    "none_required": "must be null",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "dict_type": "must be a dictionary, {{name: value, ...}}",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "literal_error": "must be one of {expected}",
    "too_long": "must have at most {max_length} items",
}
_STARTING_POINT = "begin the file with `defaults: [ppo_trainer, _self_]`, so that it starts from every default"


def explain(
    error: ValidationError, tree: Mapping[str, Any], known: KnownKeys, *, following: Collection[str] = ()
) -> list[str]:
    """Return one line per key that `error` complains about.

    tree: the values that were validated, nested as the configuration is. following: keys that take another key's
    value; a mistake of that one is told once.
    """
    missing: list[str] = []
    wanted: dict[str, list[str]] = {}
    problems: list[str] = []
    for detail in error.errors(include_url=False):
        key = _key(detail, known)
        if detail["type"] == "missing" and isinstance(detail["loc"][-1], int):
            wanted[key] = [f"must have {detail['loc'][-1] + 1} items"]  # the last of several counts them all
        elif detail["type"] == "missing":
            missing.append(key)
        elif detail["type"] == "extra_forbidden":
            problems.append(unknown_key(key, _brief(detail["input"]), known, verl_names()))
        elif detail["type"] in ("model_type", "model_attributes_type"):
            problems.append(replaced_section(key, _brief(detail["input"]), known))
        else:
            wanted.setdefault(key, []).append(_expectation(detail, key))
    first = [_value(key, tree) for key in wanted if key not in following]
    problems.extend(
        _wrong_value(key, tree, texts)
        for key, texts in wanted.items()
        if key not in following or _value(key, tree) not in first
    )
    if missing:
        names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        problems.append(f"{names}: missing from the configuration; {_STARTING_POINT}")
    return problems


def _key(detail: ErrorDetails, known: KnownKeys) -> str:
    """The configuration key of an error: pydantic's location goes on into lists and unions below the leaf."""
    parts = [str(part) for part in detail["loc"]]
    for length in range(1, len(parts) + 1):
        key = ".".join(parts[:length])
        if key in known.leaves:
            return key
    return ".".join(parts)


def _expectation(detail: ErrorDetails, key: str) -> str:
    if detail["type"].endswith("_type") and (form := _form(key)):
        return f"must be {form}"
    template = _EXPECTED.get(detail["type"])
    if template is None:
        return detail["msg"].removeprefix("Value error, ")
    text = template.format(**detail.get("ctx", {}))
    return text if " or " in text else text.replace("must be one of", "must be")


def _form(key: str) -> str:
    """What can be written in several ways, as the help says it."""
    words = next((entry.values for entry in entries() if entry.key == key), "")
    if words.startswith("path"):
        return f"a {words}"
    return words if words.startswith("ranks") else ""


def _value(key: str, tree: Mapping[str, Any]) -> Any:
    value: Any = tree
    for name in key.split("."):
        value = value[name]
    return value


def _wrong_value(key: str, tree: Mapping[str, Any], texts: list[str]) -> str:
    value = _value(key, tree)
    quoted = f" (it is text: '{value}')" if isinstance(value, str) and _looks_like_number(value) else ""
    if texts == ["must be text"] and isinstance(value, int | float):
        quoted = f"; put quotes around it: '{key}=\"{show(value)}\"'"
    return f"{key}={_brief(value)}: {_either(texts)}{quoted}"


def _either(texts: list[str]) -> str:
    """Join what the members of a union wanted: `must be a or b`."""
    different = list(dict.fromkeys(texts))
    return " or ".join([different[0], *(text.removeprefix("must be ") for text in different[1:])])


def _looks_like_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _brief(value: object) -> str:
    text = show(value)
    return text if len(text) <= 80 else text[:77] + "..."
