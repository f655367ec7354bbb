"""The contract's table names every capability; this needs no sources, so it is part of an ordinary run."""

from __future__ import annotations

from dataclasses import fields

from release_facts import COMBINED, FACTS

from workers.rollout.vllm.capabilities import Capabilities


def test_every_capability_has_a_row() -> None:
    rows = {fact.capability for fact in FACTS} | set(COMBINED)
    looked_up = {"version", "engine_arguments", "sampling_fields", "environment", "kinds"}  # tests of their own
    assert {field.name for field in fields(Capabilities)} - looked_up == rows - {""}
