"""How many layers have to be recomputed so that activations fit. What a GPU's memory says is measured on a GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from workers.engines.recompute import WORKING_LAYERS, LayerBytes, Recompute, estimate, free_bytes, num_recomputed

CPU = torch.device("cpu")


class Layer(nn.Module):
    gradient_checkpointing = True


@given(
    num_layers=st.integers(1, 80),
    whole=st.floats(1, 1e6),
    share=st.floats(0.01, 0.9),
    tokens=st.integers(1, 10**6),
    room=st.floats(-1e12, 1e13),
)
def test_as_few_as_fit(num_layers: int, whole: float, share: float, tokens: int, room: float) -> None:
    layer = LayerBytes(whole, whole * share)
    count = num_recomputed(num_layers, layer, tokens, room)

    def spent(recomputed: int) -> float:
        kept = (num_layers - recomputed + WORKING_LAYERS) * layer.whole
        return tokens * (kept + recomputed * layer.input_only)

    assert 0 <= count <= num_layers
    slack = 1e-9 * tokens * num_layers * whole
    assert count == num_layers or spent(count) <= room + slack
    assert count == 0 or spent(count - 1) > room - slack


@pytest.mark.parametrize(("setting", "expected"), [(True, 3), (False, 0), ("auto", 0)])
def test_settings_on_a_cpu(setting: bool, expected: int) -> None:
    """Without a reading of memory nothing is planned: "auto" keeps all."""
    layers = [Layer() for _ in range(3)]
    recompute = Recompute(layers, setting, CPU, LayerBytes(2, 0))
    assert recompute.num_recomputed == sum(layer.gradient_checkpointing for layer in layers) == expected
    assert not recompute.needs_measuring
    assert free_bytes(CPU) is None


def test_layers_without_the_switch_are_left_alone() -> None:
    recompute = Recompute([nn.Linear(2, 2)], True, CPU, LayerBytes(2, 0))
    assert recompute.num_layers == 0


def test_estimate_counts_both_sides_of_matrix_products() -> None:
    layer = nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 4, bias=False))
    assert estimate([layer, layer], 2) == LayerBytes(2 * (10 + 10), 0)
    assert estimate([], 2) == LayerBytes(0, 0)
