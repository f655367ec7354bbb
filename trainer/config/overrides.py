"""Command-line overrides: verl's and older spellings translated, every key checked, before Hydra reads them.

Hydra alone answers a mistyped key with "Key 'x' is not in struct"; here it is the nearest existing key.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from trainer.config.errors import raise_problems
from trainer.config.keys import KnownKeys, known_keys, replaced_section, unknown_key
from trainer.config.verl.classify import moved_key, place_of
from trainer.config.verl.names import verl_names
from trainer.config.verl.report import Report
from trainer.config.verl.rules import Kind
from trainer.config.verl.translate import verdict_now, waits

_NAMES = ("trainer.project_name", "trainer.experiment_name")
"""Text, whatever it looks like."""


def prepare_overrides(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the overrides as Hydra should see them, and the notices about what was changed.

    What only the composed configuration can decide is added to it as it stands; `type_tree` translates it there.
    Raises ValueError listing every override that cannot be read, is unknown or refused, or replaces a section.
    """
    report, known = Report(), known_keys()
    prepared: list[str] = []
    problems: list[str] = []
    spelled: dict[str, tuple[str, str]] = {}
    overtaken: list[str] = []
    for override in overrides:
        for single in _singles(_quote(override)):
            if _readable(single) and waits(override_key(single), _value(single)):
                prepared.append(f"++{single.lstrip('+')}")
                continue
            translated = _translate(single, report)
            problems += [problem for text in translated for problem in _problems(text, known)]
            overtaken += [notice for text in translated for notice in _overtaken(single, text, spelled)]
            prepared += [_without_plus(text, known) for text in translated]
    raise_problems([*problems, *report.problems])
    return prepared, [*report.notices(), *overtaken]


def _overtaken(override: str, text: str, spelled: dict[str, tuple[str, str]]) -> Iterator[str]:
    """A notice where `text`, which `override` came to, sets a key that an earlier one set to something else under
    another name. spelled: of each key, the override that set it last and what it came to; brought up to date."""
    earlier, before = spelled.get(override_key(text), (override, text))
    if override_key(earlier) != override_key(override) and before != text:
        yield f"{earlier}: without effect, {override} sets the same key ({override_key(text)}) and comes later"
    spelled[override_key(text)] = (override, text)


def check_override_keys(overrides: Sequence[str], known: KnownKeys) -> None:
    """Raise ValueError for overrides whose key does not exist, naming the nearest ones, or that Hydra would misread.

    `hydra.*` is Hydra's own and passes; so does everything below the free-form dictionaries.
    """
    raise_problems([problem for override in overrides for problem in _problems(override, known)])


def overridden_keys(overrides: Sequence[str]) -> frozenset[str]:
    """Return the keys that the overrides set."""
    return frozenset(override_key(override) for override in overrides)


def override_key(override: str) -> str:
    """Return the key that one override sets or removes."""
    return override.partition("=")[0].lstrip("+~")


def _readable(override: str) -> bool:
    """Whether Hydra reads it as one value of one key."""
    parsed = _parse(override)
    return not isinstance(parsed, str) and not parsed.is_sweep_override() and not parsed.is_delete()


def _value(override: str) -> Any:
    """The value that Hydra would read."""
    parsed = _parse(override)
    assert not isinstance(parsed, str), parsed
    return parsed.value()


def _problems(override: str, known: KnownKeys) -> list[str]:
    parsed = _parse(override)
    if isinstance(parsed, str):
        return [parsed]
    key = parsed.key_or_group
    if key == "hydra" or key.startswith(("hydra.", "hydra/")):
        return []
    value = override.partition("=")[2]
    if parsed.is_delete():
        return [f"~{key}: keys cannot be removed, every one of them is needed; {_instead_of_removing(key, known)}"]
    if parsed.is_sweep_override():
        as_list = "" if "(" in value else f"write '{key}=[{value}]' for a list, "
        remedy = f"{as_list}{'or ' if as_list else 'give one value, or '}quote the value: {_quoted(key, value)}"
        return [f"{key}={value}: Hydra takes this for a sweep over several runs; {remedy}"]
    if known.is_free(key) or key in known.leaves:
        return []
    if key not in known.sections:
        return [unknown_key(key, value, known, verl_names())]
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
            problems.append(unknown_key(key, str(value), known, verl_names()))
        elif isinstance(value, dict):
            problems.extend(_dict_problems(key, value, known))
        else:
            problems.append(replaced_section(key, str(value), known))
    return problems


@cache
def _parse(override: str) -> Override | str:
    """Return the parsed override, or what is wrong with it."""
    if override.find("=") < 1 and not override.startswith("~"):
        return f"{override}: not an override; write key=value"
    try:
        return OverridesParser.create().parse_override(override)
    except HydraException as error:
        key, _, value = override.partition("=")
        reason = str(error).partition("\n")[0]
        return f"{override}: cannot be read ({reason}); put quotes around the value: {_quoted(key, value)}"


def _quoted(key: str, value: str) -> str:
    """As a shell passes it on and Hydra takes it for text."""
    inner = re.sub(r'(\\*)"', r'\1\1\\"', value.strip("\"'"))  # two backslashes are one before a quote, and only there
    inner = re.sub(r"(\\+)$", r"\1\1", inner)
    return shlex.quote(f'{key}="{inner}"')


def _instead_of_removing(key: str, known: KnownKeys) -> str:
    if key in known.leaves:
        return f"set a value instead, {key}=..."
    if key in known.sections:
        return f"set the keys below {key} instead"
    return unknown_key(key, "...", known, verl_names()).partition("; ")[2]


def _singles(override: str) -> list[str]:
    """The override itself; for a section given as a dictionary with keys of verl's in it: one for each key."""
    value = _value(override) if _readable(override) else None
    if not isinstance(value, dict) or not value:
        return [override]
    leaves = dict(_leaves(override_key(override), value))
    if all((place := place_of(key)) is None or place.kind is Kind.LIVE for key in leaves):
        return [override]
    return [f"{key}={_as_text(leaf)}" for key, leaf in leaves.items()]


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, below in value.items():
            yield from _leaves(f"{key}.{name}", below)
    else:
        yield key, value


def _translate(override: str, report: Report) -> list[str]:
    """The overrides that one comes to: itself, under another name, with another value; or none."""
    if not _readable(override):
        return [override]
    key, value, text = override_key(override), _value(override), override.partition("=")[2]
    verdict = verdict_now(key, value)
    if verdict is None:
        return [f"{moved_key(key)}={text}" if moved_key(key) != key else override]  # unknown under today's name
    report.add(key, value, verdict)
    if verdict.kind in (Kind.IGNORED, Kind.REFUSED):
        return []
    if not verdict.sets:
        return [override]
    return [f"{new}={text if changed == value else _as_text(changed)}" for new, changed in verdict.sets.items()]


def _as_text(value: Any) -> str:
    """A value in the grammar of overrides."""
    if isinstance(value, str):
        return value if value.startswith("${") else json.dumps(value)
    if isinstance(value, list):
        return f"[{','.join(_as_text(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{name}:{_as_text(item)}' for name, item in value.items())}}}"
    return json.dumps(value)


def _quote(override: str) -> str:
    """Quote what Hydra would misread: `~/file`, and device mappings, for it a sweep (`0,2`) or a call (`list(...)`)."""
    key, equals, value = override.partition("=")
    if key in _NAMES and _readable(override) and isinstance(_value(override), int | float):  # a date, a number of a job
        return f'{key}="{value}"'
    is_mapping = key.endswith(".device_mapping") and not value.startswith(("[", "'", '"', "$")) and value != "null"
    return f'{key}="{value}"' if equals and (is_mapping or value.startswith("~/")) else override


def _without_plus(override: str, known: KnownKeys) -> str:
    """Make `+key=`, `key=` and `++key=` mean the same: set the key (Hydra refuses one or the other)."""
    name, equals, value = override.partition("=")
    key = name.lstrip("+")
    if known.is_free(key) or key in known.free_form:
        return f"++{key}{equals}{value}"
    return f"{key}{equals}{value}" if key in known.leaves else override
