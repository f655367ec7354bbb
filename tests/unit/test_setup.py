"""How workers are put to work: which ranks are beside which replica, and when models are read into host memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from trainer.actors import _ranks_on
from trainer.setup import place_engines, prepare_engines, read_ahead
from workers.group import WorkerGroup

ROLES = ("actor", "ref", "critic")


class FakeGroup:
    """Notes each call to its ranks, and its role."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def broadcast(self, method: Any, role: str, *args: object) -> FakeGroup:
        """A call."""
        self.calls.append(f"{method.__name__} {role}")
        return self

    def result(self, timeout_s: float) -> list[None]:
        """Of the last call."""
        return []


def _specs(strategy: str) -> dict[str, Any]:
    return {role: SimpleNamespace(strategy=strategy) for role in ROLES}


def test_what_reads_nothing_is_prepared_ahead_on_many_ranks_too() -> None:
    assert read_ahead(_specs("megatron"), 8) == ROLES
    assert read_ahead(_specs("fsdp"), 8) == ("actor",)
    assert read_ahead(_specs("fsdp") | {"ref": SimpleNamespace(strategy="megatron")}, 8) == ("actor", "ref")


@pytest.mark.parametrize(("num_ranks", "most"), [(1, 3), (2, 1), (8, 1)])
def test_one_rank_reads_all_models_ahead_and_many_hold_one_each(num_ranks: int, most: int) -> None:
    fake = FakeGroup()
    train = cast("dict[str, WorkerGroup]", dict.fromkeys(ROLES, fake))
    specs, offload = _specs("fsdp"), cast("dict[str, Any]", {role: {} for role in ROLES})
    ahead = read_ahead(specs, num_ranks)
    prepare_engines(train, {role: specs[role] for role in ahead}, 1.0)
    assert fake.calls[0] == "prepare actor"
    place_engines(train, specs, offload, prepared=ahead, timeout_s=1.0)
    held: set[str] = set()
    largest = 0
    for call in fake.calls:
        what, role = call.split()
        held = held | {role} if what == "prepare" else held - {role}
        largest = max(largest, len(held))
    assert sorted(fake.calls) == sorted(f"{what} {role}" for what in ("prepare", "place") for role in ROLES)
    assert (largest, held) == (most, set())


def test_the_ranks_on_the_devices_of_a_replica() -> None:
    groups = {
        (0, 1, 2, 3): WorkerGroup("training", ["a0", "a1", "a2", "a3"]),
        (4, 5): WorkerGroup("training", ["c0", "c1"]),
    }
    found = {devices: _ranks_on(groups, devices) for devices in ((2, 3), (3, 5), (6,))}
    assert [(group.actors, group.ranks) for group in found[2, 3]] == [(("a2", "a3"), (2, 3))]
    assert [(group.actors, group.ranks) for group in found[3, 5]] == [(("a3",), (3,)), (("c1",), (1,))]
    assert found[6,] == ()
