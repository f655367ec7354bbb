"""Writes the tables of docs/roll.md from the rules:  python -m trainer.config.roll.document"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from trainer.config.errors import show
from trainer.config.roll.rules import Rule, Rules
from trainer.config.roll.table import NOT_IN_ROLL, TOP
from trainer.config.roll.table_roles import ROLES, SAID_ONCE
from trainer.config.roll.table_strategies import FSDP2, MEGATRON, VLLM

PAGE = Path(__file__).resolve().parents[3] / "docs" / "roll.md"
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"


def tables() -> str:
    """All tables as Markdown."""
    parts = [_table("Top level", {**TOP, **NOT_IN_ROLL})]
    for role in ("actor_train", "actor_infer", "reference", "critic", "validation", "rewards"):
        name = "rewards.DOMAIN" if role == "rewards" else role
        own = {key: rule for key, rule in ROLES[role].items() if key not in SAID_ONCE or SAID_ONCE[key] != rule}
        parts.append(_table(f"`{name}`", own))
    parts.append(_table("Every role, where its own table says nothing else", SAID_ONCE))
    parts.append(_table("`strategy_config` of megatron_train and megatron_infer", MEGATRON))
    parts.append(_table("`strategy_config` of fsdp2_train and fsdp2_infer", FSDP2))
    rest = "Any other name goes to `actor_rollout_ref.rollout.engine_kwargs.vllm`.\n"
    parts.append(_table("`strategy_config` of vllm", VLLM) + "\n" + rest)
    return "\n".join(parts)


def with_tables(page: str) -> str:
    """A page with what stands between the two markers replaced by the tables."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{tables()}\n{END}{rest.partition(END)[2]}"


def _table(title: str, rules: Rules) -> str:
    return "\n".join([f"### {title}", "", "| ROLL | | here |", "|---|---|---|", *_rows(rules), ""])


def _rows(rules: Rules) -> Iterator[str]:
    """One row for all keys that have the same rule."""
    together: dict[Rule, list[str]] = {}
    for key, rule in rules.items():
        together.setdefault(_hashable(rule), []).append(f"`{key}`")
    for rule, keys in together.items():
        remedy = f"; {rule.remedy}" if rule.remedy else ""
        fine = [show(value) for value in rule.quiet] if rule.kind == "refused" else []
        unless = f" (fine: {', '.join(fine)})" if fine else ""
        yield f"| {', '.join(keys)} | {rule.kind}{unless} | {rule.text}{remedy} |"


def _hashable(rule: Rule) -> Rule:
    """The rule with its quiet values as text, so that it can be a key."""
    return Rule(rule.kind, rule.text, rule.remedy, tuple(show(value) for value in rule.quiet), rule.copies_to)


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
