"""Optimizer steps: what is decayed, when a step is skipped, values, and half precision."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_harness import (
    ADAMW,
    GRADIENT_SCALE,
    LENGTH,
    LOSS,
    OBSERVED,
    WRAP,
    FloatArray,
    Job,
    Pair,
    Solo,
    Table,
    assemble,
    build,
    data_rank,
    make_spec,
    relative_error,
    train,
)
from safetensors.numpy import load_file
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from trainer.algorithms.losses import PolicyLoss, ValueLoss
from workers.batch import MicroBatch
from workers.engines.base import Update
from workers.engines.optimizer import learning_rate

TABLE = Table.random(seed=3)
ALL = list(range(len(TABLE)))
HALVES = ([ALL[:6]], [ALL[6:]])
VALUE_LOSS = ValueLoss(clip=10.0, agg_mode="token-mean", length=LENGTH)


def weights_on_disk(path: Path) -> dict[str, FloatArray]:
    return dict(load_file(path / "model.safetensors"))


@dataclass(frozen=True)
class Poisoned:
    """The policy loss, with a constant added on sequences of some length: its value breaks, its gradient does not."""

    constant: float
    loss: PolicyLoss = LOSS

    def __call__(self, outputs: Tensor, entropy: Tensor | None, micro: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        value, metrics = self.loss(outputs, entropy, micro)
        return value + self.constant, metrics


def step_good_bad_good(mesh: DeviceMesh, job: Job, bad: Job) -> tuple[list[bool], list[bool], dict[str, list[Tensor]]]:
    """A good step, a bad one and a good one; which were skipped, and the weights after each."""
    engine = build(mesh, job.spec)
    split = job.split[data_rank(mesh, job.spec)]
    rows = [row for micro in split for row in micro]
    update = Update([[rows.index(row) for row in micro] for micro in split], job.table.norm())
    skipped, finite = [], []
    weights: dict[str, list[Tensor]] = {}
    for chosen in (job, bad, job):
        batch = chosen.table.batch(rows)
        result = engine.train_step(batch, update, chosen.loss, temperature=1.0, entropy=True)
        skipped.append(result.skipped)
        finite.append(math.isfinite(result.grad_norm))
        for name, data, *_ in engine.export_weights():
            weights.setdefault(name, []).append(data.detach().clone())
    return skipped, finite, weights


@pytest.mark.parametrize("poison", ["advantage", "infinite", "loss"])
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(poison: str, qwen2: Path, pair: Pair) -> None:
    job = Job(make_spec(qwen2, optimizer=ADAMW), TABLE, HALVES)
    bad = {
        "advantage": replace(job, table=TABLE.with_column("advantages", math.nan, [9])),
        "infinite": replace(job, table=TABLE.with_column("advantages", math.inf, [9])),
        "loss": replace(job, loss=Poisoned(math.nan)),
    }[poison]
    answers = pair.run(step_good_bad_good, job, bad)
    for skipped, _, weights in answers:
        assert skipped == [False, True, False]
        for first, second, third in weights.values():
            assert torch.equal(first, second)
            assert first.numel() == 0 or not torch.equal(second, third)


def test_a_skipped_step_leaves_no_trace_in_the_optimizer(qwen2: Path, pair: Pair) -> None:
    job = Job(make_spec(qwen2, optimizer=ADAMW), TABLE, HALVES)
    bad = replace(job, table=TABLE.with_column("advantages", math.nan, [9]))
    with_skip = [weights for _, _, weights in pair.run(step_good_bad_good, job, bad)]
    without = assemble([a.shards for a in pair.run(train, replace(job, steps=2, temperature=1.0))])
    for name, expected in without.items():
        np.testing.assert_array_equal(torch.cat([w[name][2] for w in with_skip]).numpy(), expected)


def test_norms_and_biases_are_not_decayed(qwen2: Path, solo: Solo) -> None:
    """A step whose gradient is zero shows the decay alone."""
    optimizer = replace(OBSERVED, lr=0.1, weight_decay=0.5, eps=1e-8)
    loss = replace(LOSS, entropy_coeff=0.0, kl_loss_coef=None)
    job = Job(make_spec(qwen2, optimizer=optimizer), TABLE.with_column("advantages", 0.0), ([ALL],), loss=loss)
    after = assemble([a.shards for a in solo.run(train, job)])
    for name, before in weights_on_disk(qwen2).items():
        is_decayed = "norm" not in name and "bias" not in name
        expected = before * np.float32(0.95) if is_decayed else before
        np.testing.assert_allclose(after[name], expected, rtol=1e-6 if is_decayed else 0, err_msg=name)


def test_learning_rate_warms_up_then_stays() -> None:
    spec = replace(ADAMW, lr=2.0, warmup_steps=4, total_steps=10)
    assert [learning_rate(spec, step) for step in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert learning_rate(replace(spec, warmup_steps=0), 0) == 2.0


def test_learning_rate_falls_along_a_cosine() -> None:
    spec = replace(ADAMW, lr=2.0, lr_scheduler_type="cosine", warmup_steps=2, total_steps=12, min_lr_ratio=0.1)
    rates = [learning_rate(spec, step) for step in range(16)]
    assert rates[:3] == [1.0, 2.0, 2.0]
    assert rates[7] == pytest.approx(0.5 * (2.0 + 0.2))
    assert rates[12:] == pytest.approx([0.2] * 4)
    assert all(a >= b for a, b in pairwise(rates[2:]))


def test_learning_rate_falls_along_a_line() -> None:
    spec = replace(ADAMW, lr=2.0, lr_scheduler_type="linear", warmup_steps=2, total_steps=12, min_lr_ratio=0.5)
    assert [learning_rate(spec, step) for step in (0, 1, 2, 7, 12, 20)] == pytest.approx([1.0, 2.0, 2.0, 1.5, 1.0, 1.0])


def test_steps_use_the_schedule(qwen2: Path, solo: Solo) -> None:
    optimizer = replace(ADAMW, warmup_steps=2, lr_scheduler_type="cosine", total_steps=4)
    (answer,) = solo.run(train, Job(make_spec(qwen2, optimizer=optimizer), TABLE, ([ALL],), steps=4))
    assert [r.lr for r in answer.results] == [learning_rate(optimizer, step) for step in range(4)]


def test_the_gradient_norm_is_clipped(qwen2: Path, solo: Solo) -> None:
    spec = make_spec(qwen2, optimizer=replace(OBSERVED, clip_grad=0.25))
    (answer,) = solo.run(train, Job(spec, TABLE, ([ALL],)))
    before, after = weights_on_disk(qwen2), assemble([answer.shards])
    moved = [((before[name] - value) / GRADIENT_SCALE).ravel() for name, value in after.items()]
    assert answer.results[0].grad_norm > 0.25  # what is reported is the norm before clipping
    assert np.linalg.norm(np.concatenate(moved)) == pytest.approx(0.25, rel=1e-4)


def test_a_value_model_learns(qwen2: Path, solo: Solo, pair: Pair) -> None:
    """One and two ranks agree, and on two ranks one has no row of the value head."""
    table = TABLE.with_column("returns", 1.0).with_column("values", 0.0)
    optimizer = replace(ADAMW, lr=1e-2, clip_grad=10.0)
    job = Job(make_spec(qwen2, head="values", optimizer=optimizer), table, ([ALL],), loss=VALUE_LOSS, steps=8)
    (alone,) = solo.run(train, job)
    assert all(not values.any() for values in alone.outputs.values()), "values start at zero"
    losses = [r.metrics["critic/value_loss"] for r in alone.results]
    assert losses[0] == pytest.approx(0.5)
    assert losses[-1] < 0.25 * losses[0]
    together = pair.run(train, replace(job, split=HALVES))
    assert together[1].shards[-1][0] == "value_head.weight"
    assert together[1].shards[-1][1].shape == (0, 24)
    assert relative_error(assemble([a.shards for a in together]), assemble([alone.shards])) < 1e-5
    assert [r.metrics["critic/value_loss"] for r in together[0].results] == pytest.approx(losses, rel=1e-4)


def test_a_forward_engine_has_no_optimizer(qwen2: Path, solo: Solo, pair: Pair) -> None:
    """A reference model: log-probs only."""
    job = Job(make_spec(qwen2, optimizer=None), TABLE, ([ALL],), steps=0)
    (alone,) = solo.run(train, job)
    together = pair.run(train, replace(job, split=HALVES))
    outputs = together[0].outputs | together[1].outputs
    for row, expected in alone.outputs.items():
        np.testing.assert_allclose(outputs[row], expected, atol=1e-6)


def test_bfloat16_computes_and_float32_remembers(qwen2: Path, solo: Solo, pair: Pair) -> None:
    exact = solo.run(train, Job(make_spec(qwen2, optimizer=ADAMW), TABLE, ([ALL],)))[0]
    spec = make_spec(qwen2, optimizer=ADAMW, dtype="bfloat16", wrap_min_num_params=WRAP)
    together = pair.run(train, Job(spec, TABLE, HALVES))
    assert {d for a in together for d in a.dtypes} == {torch.float32}
    for answer in together:
        for row, values in answer.outputs.items():
            assert values.dtype == np.float32
            np.testing.assert_allclose(values, exact.outputs[row], atol=0.05)
    after = assemble([a.shards for a in together])
    for name, value in after.items():
        tensor = torch.from_numpy(value)
        assert not torch.equal(tensor, tensor.bfloat16().float()), f"{name} was rounded"
    assert together[0].results[0].grad_norm == pytest.approx(exact.results[0].grad_norm, rel=0.05)
