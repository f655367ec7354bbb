"""Holds a YAML of ROLL's against the table: mistyped keys, keys without effect, refused values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from trainer.config.errors import raise_problems, show
from trainer.config.roll.kinds import wrong_values
from trainer.config.roll.read import RollFile
from trainer.config.roll.rules import Rule, Rules, is_quiet, nearest
from trainer.config.roll.table import NOT_IN_ROLL, TOP
from trainer.config.roll.table_roles import ROLES
from trainer.config.roll.table_strategies import FSDP2, MEGATRON, VLLM
from trainer.config.roll.tree import Translation

_SHOWN = 4
_SECTION = ": a section, not a value; write keys below it"


def rule_of(path: str) -> Rule | None:
    """The rule of a key of ROLL's by its full path (`rewards.math.worker_cls`, `actor_train.device_mapping`)."""
    role, _, below = path.partition(".")
    if role == "rewards":
        below = below.partition(".")[2]
    if role in ROLES:
        return _find(below, ROLES[role])
    return _find(path, {**TOP, **NOT_IN_ROLL})


def check_keys(file: RollFile, into: Translation) -> None:
    """Add a problem for every unknown key and refused value, and one notice per reason why keys have no effect."""
    found = list(_keys(file, into.problems))
    _apply(found, into)
    broken = [text for text in into.problems if text.endswith(_SECTION)]
    broken += [problem for path, value, _ in found for problem in wrong_values(path, value)]
    if broken:  # the translation could not go on
        raise_problems(list(dict.fromkeys([*into.problems, *broken])))


def _apply(found: Iterable[tuple[str, Any, Rule]], into: Translation) -> None:
    idle: dict[str, list[str]] = {}
    for path, value, rule in found:
        if is_quiet(rule, value):
            continue
        if rule.kind == "refused":
            into.problems.append(f"roll.{path}={show(value)}: {rule.text}; {rule.remedy}")
        elif rule.kind == "no effect" and value is not None:
            idle.setdefault(rule.text, []).append(path)
    into.notices += [f"roll.config: no effect of {_few(paths)}: {reason}" for reason, paths in idle.items()]


def _keys(file: RollFile, problems: list[str]) -> Iterator[tuple[str, Any, Rule]]:
    """The keys of a file that have a rule; the others become problems."""
    for name, value in file.nested.items():
        if name in ROLES:
            yield from _role_keys(name, value, problems)
        elif name not in file.variables or _known(name, TOP):
            yield from _walk(name, value, {**TOP, **NOT_IN_ROLL}, "", problems)


def _role_keys(role: str, value: Any, problems: list[str]) -> Iterator[tuple[str, Any, Rule]]:
    if value is None:
        return
    if not isinstance(value, dict):
        problems.append(f"roll.{role}={show(value)}{_SECTION}")
        return
    blocks = {role: value} if role != "rewards" else {f"rewards.{domain}": block for domain, block in value.items()}
    for prefix, block in blocks.items():
        if block is not None and not isinstance(block, dict):
            problems.append(f"roll.{prefix}={show(block)}{_SECTION}")
            continue
        for name, below in (block or {}).items():
            yield from _walk(str(name), below, ROLES[role], f"{prefix}.", problems)


def _walk(path: str, value: Any, rules: Rules, prefix: str, problems: list[str]) -> Iterator[tuple[str, Any, Rule]]:
    rule = _find(path, rules)
    if rule is not None:
        yield f"{prefix}{path}", value, rule
    elif _known(path, rules):
        if isinstance(value, dict):
            for name, below in value.items():
                yield from _walk(f"{path}.{name}", below, rules, prefix, problems)
        elif value is not None:
            problems.append(f"roll.{prefix}{path}={show(value)}{_SECTION}")
    else:
        problems.append(_unknown(prefix, path, value, rules))


def _find(path: str, rules: Rules) -> Rule | None:
    if path in rules:
        return rules[path]
    section, dot, _ = path.rpartition(".")
    return rules[f"{section}.*"] if dot and f"{section}.*" in rules else None


def _known(path: str, rules: Rules) -> bool:
    """Whether a path is a key, or a section with keys below it."""
    return path in rules or any(key.startswith(f"{path}.") for key in rules)


def _unknown(prefix: str, path: str, value: Any, rules: Rules) -> str:
    section, _, _ = path.rpartition(".")
    depth = path.count(".") + 1
    siblings = {".".join(key.split(".")[:depth]) for key in rules if key.startswith(section)}
    if not prefix:
        siblings |= set(ROLES)
    likely = nearest(path, siblings) or nearest(path.rpartition(".")[2], {key.rpartition(".")[2] for key in rules})
    remedy = f"did you mean {prefix}{likely}?" if likely else "docs/roll.md lists them"
    shown = show(value) if not isinstance(value, dict) else "{...}"
    return f"roll.{prefix}{path}={shown}: ROLL has no such key; {remedy}"


def strategy_rules(name: str) -> Rules | None:
    """The table of a strategy's `strategy_config`; None where there is none (DeepSpeed, Hugging Face)."""
    tables: Mapping[str, Rules] = {"megatron": MEGATRON, "fsdp2": FSDP2, "vllm": VLLM}
    return tables.get(name.partition("_")[0])


def check_strategy(role: str, name: str, config: dict[str, Any], into: Translation) -> None:
    """As `check_keys` for a role's `strategy_config`. Of vLLM's, names without a rule are left to vLLM."""
    rules = strategy_rules(name)
    if rules is None:
        if config:
            into.notices.append(f"roll.config: no effect of {role}.strategy_args.strategy_config: it is {name}'s")
        return
    _apply(_strategy_keys(f"{role}.strategy_args.strategy_config", name, config, rules, into.problems), into)


def _strategy_keys(
    prefix: str, name: str, config: dict[str, Any], rules: Rules, problems: list[str]
) -> Iterator[tuple[str, Any, Rule]]:
    for key, value in config.items():
        if key in rules:
            yield f"{prefix}.{key}", value, rules[key]
        elif name != "vllm":
            likely = nearest(key, dict(rules))
            remedy = f"did you mean {likely}?" if likely else "docs/roll.md lists them"
            problems.append(f"roll.{prefix}.{key}={show(value)}: {name} has no such key; {remedy}")


def _few(paths: list[str]) -> str:
    more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
    return ", ".join(paths[:_SHOWN]) + more
