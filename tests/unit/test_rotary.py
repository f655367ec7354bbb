"""Rotary embedding with the tokens first: the model's own function, and the same numbers."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from workers.engines.models import _rotate_rows_first


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama", "phi3"])
def test_rows_first_changes_no_number(architecture: str) -> None:
    module = importlib.import_module(f"transformers.models.{architecture}.modeling_{architecture}")
    original = module.apply_rotary_pos_emb
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 7, heads, 8, generator=generator).transpose(1, 2) for heads in (4, 2))  # as projected
    cos, sin = (torch.randn(1, 7, 8, generator=generator) for _ in range(2))
    try:
        _rotate_rows_first([module.__name__])
        _rotate_rows_first([module.__name__])  # a second model of the kind
        assert module.apply_rotary_pos_emb is not original
        for got, expected in zip(module.apply_rotary_pos_emb(q, k, cos, sin), original(q, k, cos, sin), strict=True):
            assert torch.equal(got, expected)
            assert got.transpose(1, 2).is_contiguous(), "as attention reads it"
        moved = [x.transpose(1, 2) for x in (q, k)]
        for got, expected in zip(
            module.apply_rotary_pos_emb(*moved, cos, sin, unsqueeze_dim=2), original(q, k, cos, sin), strict=True
        ):
            assert torch.equal(got.transpose(1, 2), expected)
    finally:
        module.apply_rotary_pos_emb = original


def test_a_function_of_another_kind_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some models rotate one tensor at a time."""

    def apply_rotary_pos_emb(x: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Tensor:
        return x

    module = ModuleType("a_model_of_another_kind")
    module.apply_rotary_pos_emb = apply_rotary_pos_emb  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    _rotate_rows_first([module.__name__])
    assert module.apply_rotary_pos_emb is apply_rotary_pos_emb
