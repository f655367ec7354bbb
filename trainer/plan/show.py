"""The plan for people: the tree of values with where each comes from, and tables of roles, batches and memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from trainer.adaptation import Adaptation
from trainer.config.errors import show
from trainer.plan.batches import batch_lines
from trainer.plan.build import Plan
from trainer.plan.memory import CATEGORIES, PhaseMemory
from trainer.plan.origins import Origin
from trainer.plan.verdict import spans
from trainer.tracking.console import batch_table, engine_table, memory_table, startup_table

_GIB = 1 << 30
_INDENT = 44
"""Column of the origins, where values leave room for it."""


def show_tree(console: Console, plan: Plan) -> None:
    """Every value, as YAML with its origin as a comment."""
    for line in tree_lines(plan.config):
        console.print(line, soft_wrap=True)


def show_tables(console: Console, plan: Plan, adaptation: Adaptation, rows: Sequence[Mapping[str, object]]) -> None:
    """Roles, vLLM, batch sizes and memory. rows: of `roles.role_rows`."""
    console.print(startup_table(rows))
    console.print(engine_table(adaptation.version, adaptation.choices))
    console.print(batch_table(batch_lines(dict(plan.batch))))
    for part in memory_tables(plan):
        console.print(part, soft_wrap=isinstance(part, Text))
    if told := cache_line(plan.cache):
        console.print(told, markup=False, soft_wrap=True)
    for warning in plan.verdict.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False, soft_wrap=True)


def tree_lines(config: Mapping[str, tuple[Any, Origin]]) -> Iterator[Text]:
    """Lines of YAML; what is not a default stands out."""
    last: list[str] = []
    for key, (value, origin) in config.items():
        *sections, name = key.split(".")
        for depth, section in enumerate(sections):
            if sections[: depth + 1] != last[: depth + 1]:
                yield Text(f"{'  ' * depth}{section}:")
        last = sections
        line = f"{'  ' * len(sections)}{name}: {show(value)}"
        is_default = origin.source == "default" or (origin.source == "inherited" and origin.detail == "default")
        yield Text.assemble(
            (line.ljust(_INDENT), "" if is_default else "bold"), (f"  # {origin.told}", "dim" if is_default else "cyan")
        )


def memory_tables(plan: Plan) -> Iterator[Table | Text]:
    """A table for each kind of device, and what else is to be said of it."""
    total = plan.devices.total_bytes
    of = f"of {_gib(total)} " if total else ""
    for devices in plan.memory:
        title = f"Predicted memory of {spans(devices.devices)} ({', '.join(devices.roles)}), GiB {of}each"
        yield memory_table(title, [_row(phase, found) for phase, found in devices.phases.items()])
        for phase, found in devices.phases.items():
            if note := _note(found):
                yield Text(f"{phase}: {note}", style="dim")
    if plan.memory:
        yield Text(f"memory of a GPU: {plan.devices.told_by}", style="dim")


def _row(phase: str, found: PhaseMemory) -> dict[str, str]:
    terms = {category.replace("_", " "): _gib(found.terms[category]) for category in CATEGORIES}
    return {"phase": phase, "in all": _gib(found.total), **terms}


def cache_line(cache: Mapping[str, object]) -> str | None:
    """How many sequences fit into a replica's KV cache at a time."""
    most = cache["max_concurrency"]
    if not isinstance(most, float):
        return None
    fits = f"{int(most):,} sequences of {cache['sequence_tokens']:,} tokens"
    asked = cache["max_num_seqs"]
    assert isinstance(asked, int)
    enough = "" if most >= asked else f", fewer than rollout.max_num_seqs={asked:,}: long ones would wait"
    return f"KV cache of a replica: {cache['tokens']:,} tokens, {fits} at a time{enough}"


def _note(found: PhaseMemory) -> str:
    away = ", ".join(f"{part.replace('_', ' ')} {_gib(num)}" for part, num in found.offloaded.items())
    recomputed = f"{found.recomputed} layers recomputed" if found.recomputed else ""
    return "; ".join(filter(None, [recomputed, f"in host memory: {away}" if away else ""]))


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / _GIB:.1f}" if num_bytes else "-"
