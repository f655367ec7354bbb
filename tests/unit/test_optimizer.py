"""State of AdamW before its first step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from workers.engines.base import OptimizerSpec
from workers.engines.optimizer import begin_state, make_optimizer, moments

SPEC = OptimizerSpec(1e-3, 0.1, (0.9, 0.99), 1e-8, 1.0, "constant", 0, 0.0, 10)


def built() -> tuple[nn.Module, torch.optim.AdamW]:
    torch.manual_seed(3)
    module = nn.Linear(4, 3)
    return module, make_optimizer(module, SPEC)


def test_state_made_before_the_first_step_changes_nothing() -> None:
    results = []
    for begun in (False, True):
        module, optimizer = built()
        for step in range(3):
            module(torch.ones(2, 4) * (step + 1)).square().sum().backward()
            if begun:
                begin_state(optimizer)
            optimizer.step()
            optimizer.zero_grad()
        results.append([*module.parameters(), *moments(optimizer)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_it_is_made_after_what_is_cached_was_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where there is none yet: giving back costs time. There is no GPU here, so the call is what is looked at."""
    _, optimizer = built()
    emptied: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(len(moments(optimizer))))
    begin_state(optimizer)
    begin_state(optimizer)
    assert emptied == [0] and len(moments(optimizer)) == 4
