"""What a Megatron engine wants free on its device, whatever engine was used before it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_harness import make_spec
from torch import nn

from workers.engines.base import ParallelSpec
from workers.engines.megatron import room
from workers.engines.recompute import Recompute

LAYERS = [nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)]
HF: Any = SimpleNamespace(model_type="qwen2", vocab_size=1000, hidden_size=8)


@pytest.mark.parametrize("is_last", [True, False])
def test_room_for_logits_does_not_depend_on_another_engines_groups(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, is_last: bool
) -> None:
    """A reference that is cut otherwise works between two updates, and leaves its groups in place."""
    batch: Any = SimpleNamespace(packed_tokens=lambda rows, share_prompt: len(rows))
    monkeypatch.setattr(room.parallel_state, "is_pipeline_last_stage", lambda ignore_virtual: is_last)
    spec = make_spec(tmp_path, strategy="megatron", parallel=ParallelSpec(pipeline=2))
    mine = room.Room(HF, spec, torch.device("cpu"), LAYERS)
    wanted = mine.forward_wants(batch, [[0, 1]])
    assert isinstance(mine.recompute, Recompute) and (wanted > 1 << 20) is is_last
    monkeypatch.setattr(room.parallel_state, "is_pipeline_last_stage", lambda ignore_virtual: not is_last)
    assert mine.forward_wants(batch, [[0, 1]]) == wanted
