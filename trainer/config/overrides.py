"""Command-line overrides: older spellings translated, every key checked, before Hydra reads them.

Hydra alone answers a mistyped key with "Key 'x' is not in struct"; here it is the nearest existing key.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from trainer.config.aliases import translate_key
from trainer.config.errors import raise_problems
from trainer.config.keys import KnownKeys, known_keys, replaced_section, unknown_key


def prepare_overrides(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the overrides as Hydra should see them, and the notices about what was changed.

    Raises ValueError listing every override that cannot be read, is unknown, or replaces a section.
    """
    prepared, notices = [], []
    for override in overrides:
        translated, notice = _translate(_quote(override))
        prepared.append(translated)
        notices.extend(notice)
    check_override_keys(prepared, known_keys())
    return [_without_plus(override, known_keys()) for override in prepared], notices


def check_override_keys(overrides: Sequence[str], known: KnownKeys) -> None:
    """Raise ValueError for overrides whose key does not exist, naming the nearest ones, or that Hydra would misread.

    `hydra.*` is Hydra's own and passes; so does everything below the free-form dictionaries.
    """
    raise_problems([problem for override in overrides for problem in _problems(override, known)])


def overridden_keys(overrides: Sequence[str]) -> frozenset[str]:
    """Return the keys that the overrides set."""
    return frozenset(override.partition("=")[0].lstrip("+~") for override in overrides)


def _problems(override: str, known: KnownKeys) -> list[str]:
    parsed = _parse(override)
    if isinstance(parsed, str):
        return [parsed]
    key = parsed.key_or_group
    if key == "hydra" or key.startswith(("hydra.", "hydra/")):
        return []
    value = override.partition("=")[2]
    if parsed.is_delete():
        return [f"~{key}: keys cannot be removed, every one of them is needed; set a value instead, {key}=..."]
    if parsed.is_sweep_override():
        remedy = f"write '{key}=[{value}]' for a list, or quote the value: '{key}=\"{value}\"'"
        return [f"{key}={value}: Hydra takes this for a sweep over several runs; {remedy}"]
    if known.is_free(key) or key in known.leaves:
        return []
    if key not in known.sections:
        return [unknown_key(key, value, known)]
    content = parsed.value()
    if not isinstance(content, dict):
        return [replaced_section(key, value, known)]
    return _dict_problems(key, content, known)


def _dict_problems(section: str, content: dict[Any, Any], known: KnownKeys) -> list[str]:
    """Check the keys of `section={name: value, ...}`."""
    problems = []
    for name, value in content.items():
        key = f"{section}.{name}"
        if key in known.leaves:
            continue
        if key not in known.sections:
            problems.append(unknown_key(key, str(value), known))
        elif isinstance(value, dict):
            problems.extend(_dict_problems(key, value, known))
        else:
            problems.append(replaced_section(key, str(value), known))
    return problems


def _parse(override: str) -> Override | str:
    """Return the parsed override, or what is wrong with it."""
    if override.find("=") < 1 and not override.startswith("~"):
        return f"{override}: not an override; write key=value"
    try:
        return OverridesParser.create().parse_override(override)
    except HydraException as error:
        reason = str(error).partition("\n")[0]
        return f"{override}: cannot be read ({reason}); put quotes around the value: 'key=\"value\"'"


def _translate(override: str) -> tuple[str, list[str]]:
    name, equals, value = override.partition("=")
    key = name.lstrip("+~")
    translated = translate_key(key)
    if translated is None:
        return override, []
    new, notice = translated
    return f"{name[: len(name) - len(key)]}{new}{equals}{value}", [notice]


def _quote(override: str) -> str:
    """Quote what Hydra would misread: `~/file`, and device mappings, for it a sweep (`0,2`) or a call (`list(...)`)."""
    key, equals, value = override.partition("=")
    is_mapping = key.endswith(".device_mapping") and not value.startswith(("[", "'", '"', "$")) and value != "null"
    return f'{key}="{value}"' if equals and (is_mapping or value.startswith("~/")) else override


def _without_plus(override: str, known: KnownKeys) -> str:
    """Make `+key=`, `key=` and `++key=` mean the same: set the key (Hydra refuses one or the other)."""
    name, equals, value = override.partition("=")
    key = name.lstrip("+")
    if known.is_free(key) or key in known.free_form:
        return f"++{key}{equals}{value}"
    return f"{key}{equals}{value}" if key in known.leaves else override
