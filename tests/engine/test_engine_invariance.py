"""A mini-batch has one gradient, for any ranks, micro-batches, prompt sharing, order, wrapping and recomputation.

Float32, 1e-6 relative. The gradient is read off the weights after a step of `engine_harness.OBSERVED`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_harness import (
    GRADIENT_SCALE,
    LOSS,
    WRAP,
    Answer,
    FloatArray,
    Job,
    Pair,
    Rows,
    Solo,
    Table,
    assemble,
    make_spec,
    relative_error,
    train,
    worst_error,
)
from safetensors.numpy import load_file

TABLE = Table.random()
ALL = list(range(len(TABLE)))
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Gradient:
    """What one training step computed, on all ranks together."""

    gradient: dict[str, FloatArray]
    outputs: dict[int, FloatArray]
    metrics: dict[str, float]
    grad_norm: float


@dataclass(frozen=True)
class Way:
    """One way to run the same mini-batch."""

    name: str
    split: Sequence[Rows]
    spec: dict[str, Any] = field(default_factory=dict)


WAYS = [
    Way("several micro-batches", [[[0, 1], [2, 3, 4], [5, 6, 7, 8], [9, 10, 11]]]),
    Way("one sequence per micro-batch", [[[row] for row in ALL]]),
    Way("an empty micro-batch", [[[], ALL, []]]),
    Way("prompts not shared", [[ALL]], {"share_prompt": False}),
    Way("other order", [[ALL[::-1]]]),
    Way("groups torn apart", [[[0, 4, 1, 5, 2, 6, 3, 7], [8, 10, 9, 11]]]),
    Way("layers wrapped", [[[0, 1, 2], [3, 4, 5, 6, 7, 8, 9, 10, 11]]], {"wrap_min_num_params": WRAP}),
    Way("gradient checkpointing", [[ALL[:6], ALL[6:]]], {"gradient_checkpointing": True}),
    Way("two ranks", [[ALL[:7]], [ALL[7:]]]),
    Way("two ranks, micro-batches", [[[9, 10], [0, 1]], [[2, 3, 4, 5], [6, 7, 8, 11]]]),
    Way("two ranks, empty micro-batches", [[ALL[:8], [], [8, 9]], [[], [10, 11], []]]),
    Way("two ranks, one without sequences", [[ALL[:6], ALL[6:]], [[], []]]),
    Way("two ranks, layers wrapped", [[[0, 1], [4, 5]], [[2, 3, 6, 7], [8, 9, 10, 11]]], {"wrap_min_num_params": WRAP}),
    Way(
        "two ranks, everything at once",
        [[[10, 0, 8], [], [2, 5]], [[11, 1, 9], [3, 4], [6, 7]]],
        {"wrap_min_num_params": WRAP, "gradient_checkpointing": True, "share_prompt": False},
    ),
    Way(
        "two ranks, layers wrapped, compiled, gradient checkpointing",
        [[[0, 1], [4, 5]], [[2, 3, 6, 7], [8, 9, 10, 11]]],
        {"wrap_min_num_params": WRAP, "gradient_checkpointing": True, "compile": True},
    ),
    Way(
        "two ranks, not resharded",
        [[ALL[:5]], [ALL[5:]]],
        {"wrap_min_num_params": WRAP, "reshard_after_forward": False},
    ),
]


def gradient_of(answers: Sequence[Answer], before: dict[str, FloatArray]) -> Gradient:
    after = assemble([a.shards for a in answers])
    results = [a.results[0] for a in answers]
    assert all(r == results[0] for r in results), "every rank gets the same answer"
    assert not results[0].skipped
    gradient = {name: (before[name] - value) / np.float32(GRADIENT_SCALE) for name, value in after.items()}
    outputs = {row: values for a in answers for row, values in a.outputs.items()}
    return Gradient(gradient, outputs, results[0].metrics, results[0].grad_norm)


@pytest.fixture(scope="module")
def before(qwen2: Path) -> dict[str, FloatArray]:
    """The weights as they are on disk."""
    return dict(load_file(qwen2 / "model.safetensors"))


@pytest.fixture(scope="module")
def plain(qwen2: Path, solo: Solo, before: dict[str, FloatArray]) -> Gradient:
    """One rank, one micro-batch, nothing special."""
    return gradient_of(solo.run(train, Job(make_spec(qwen2), TABLE, ([ALL],))), before)


def test_the_gradient_is_seen(plain: Gradient) -> None:
    """The observation itself: norms agree with the engine's, and every parameter has a gradient."""
    size = np.sqrt(sum(float(np.sum(g.astype(np.float64) ** 2)) for g in plain.gradient.values()))
    assert plain.grad_norm == pytest.approx(size, rel=1e-5)
    assert min(float(np.abs(g).max()) for g in plain.gradient.values()) > 1e-6


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_nothing_depends_on_how_it_is_run(
    way: Way, qwen2: Path, solo: Solo, pair: Pair, plain: Gradient, before: dict[str, FloatArray]
) -> None:
    world = solo if len(way.split) == 1 else pair
    job = Job(make_spec(qwen2, **way.spec), TABLE, tuple(way.split))
    got = gradient_of(world.run(train, job), before)
    assert relative_error(got.gradient, plain.gradient) < TOLERANCE
    assert worst_error(got.gradient, plain.gradient) < 3 * TOLERANCE  # some are small sums of large terms
    assert got.grad_norm == pytest.approx(plain.grad_norm, rel=TOLERANCE)
    assert got.metrics == pytest.approx(plain.metrics, rel=TOLERANCE, abs=1e-6)
    assert got.outputs.keys() == plain.outputs.keys()
    for row, expected in plain.outputs.items():
        np.testing.assert_allclose(got.outputs[row], expected, atol=3e-6)


def test_all_metrics_of_the_loss_are_reported(plain: Gradient) -> None:
    assert LOSS.needs_reference
    assert {
        "actor/pg_loss",
        "actor/loss",
        "actor/kl_loss",
        "actor/entropy",
        "actor/ppo_kl",
        "actor/ratio_max",
        "actor/ratio_min",
        "actor/clip_frac",
        "mismatch/num_tokens",
    } <= plain.metrics.keys()
    asked = [row for row in ALL if row != 1]
    kept = sum(int(TABLE.columns["loss_mask"][row].sum()) for row in asked)
    assert plain.metrics["mismatch/num_tokens"] == kept
