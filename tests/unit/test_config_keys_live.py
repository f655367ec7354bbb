"""No key does nothing: the value of each is read by what runs, or another key takes it.

A walk over the sources finds `<section>.<key>` where something other than the checks of the configuration reads it.
Its limits: sections are known by the names that the code gives them, so a reader under another name must be added
below, and one that gives the same name to something else would count; a value that is read and then dropped counts
too. That a value has the effect it should is for the tests of that effect.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterable
from functools import cache
from pathlib import Path

import pytest

from trainer.config.describe import entries
from trainer.config.keys import known_keys

ROOT = Path(__file__).resolve().parents[2]
CHECKS = ROOT / "trainer" / "config"
READERS_AMONG_CHECKS = ("roles.py", "schema.py")
"""Hand values on to what runs: `TrainingRole`, and `Config.use_critic` and its like."""

_ENGINE = ("engine", "megatron", "fsdp_config", "role")
NAMES = {
    "actor_rollout_ref.actor": ("actor", "cfg", "config", "role"),
    "actor_rollout_ref.ref": ("ref", "config", "role"),
    "critic": ("critic", "cfg", "config", "role"),
    "actor_rollout_ref.rollout.val_kwargs": ("val",),
    "algorithm.filter_groups": ("filtering",),
    "algorithm.kl_ctrl": ("cfg",),
    "algorithm.rollout_correction": ("cfg",),
    "data": ("data", "_data"),
    "ray_kwargs.ray_init": ("ray_init", "settings"),
    "reward.custom_reward_function": ("function",),
    "reward.overlong_buffer": ("overlong",),
    **{
        f"{role}.{engine}": _ENGINE
        for role in ("actor_rollout_ref.actor", "actor_rollout_ref.ref", "critic")
        for engine in ("fsdp_config", "fsdp", "megatron")
    },
}
"""What the code calls a section where it is not its own name."""

ONE_VALUE = {"actor_rollout_ref.rollout.name"}
"""Can only be vllm: there to be named, and to refuse other engines."""


@cache
def reads() -> frozenset[tuple[str, str]]:
    """(name of what is read from, attribute) of every attribute that is read anywhere but in checks."""
    files = [path for folder in ("trainer", "workers") for path in (ROOT / folder).rglob("*.py")]
    running = [path for path in files if CHECKS not in path.parents or path.name in READERS_AMONG_CHECKS]
    return frozenset(read for path in running for read in _reads(path.read_text(encoding="utf-8")))


def _reads(source: str) -> Iterable[tuple[str, str]]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            if isinstance(node.value, ast.Name):
                yield node.value.id, node.attr
            elif isinstance(node.value, ast.Attribute):
                yield node.value.attr, node.attr


def unread(keys: Collection[str], found: Collection[tuple[str, str]]) -> list[str]:
    """The keys that nothing reads."""
    taken = {entry.default.removeprefix("as ") for entry in entries() if entry.default.startswith("as ")}
    lacking = []
    for key in keys:
        section, _, name = key.rpartition(".")
        names = NAMES.get(section, (section.rpartition(".")[2],))
        if key not in taken | ONE_VALUE and not any((receiver, name) in found for receiver in names):
            lacking.append(key)
    return sorted(lacking)


def test_every_key_is_read() -> None:
    assert unread(known_keys().leaves, reads()) == []


def test_what_is_exempt_exists() -> None:
    assert known_keys().leaves >= ONE_VALUE
    assert {section for section in NAMES if not section.endswith(("fsdp", "fsdp_config"))} <= known_keys().sections


@pytest.mark.parametrize(
    ("key", "pair"),
    [
        ("data.shuffle", ("data", "shuffle")),
        ("trainer.critic_warmup", ("trainer", "critic_warmup")),
        ("actor_rollout_ref.rollout.val_kwargs.greedy", ("val", "greedy")),
        ("reward.overlong_buffer.penalty_factor", ("overlong", "penalty_factor")),
    ],
)
def test_a_key_that_is_read_no_more_is_found(key: str, pair: tuple[str, str]) -> None:
    assert unread([key], reads()) == []
    assert unread([key], reads() - {pair}) == [key]


def test_a_new_key_that_nothing_reads_is_found() -> None:
    assert unread(["data.sharpness"], reads()) == ["data.sharpness"]
