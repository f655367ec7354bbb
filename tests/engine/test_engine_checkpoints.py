"""What an engine writes: sharded state to continue from under any number of ranks, Hugging Face copies, exports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_harness import (
    ADAMW,
    LENGTH,
    WRAP,
    Answer,
    FloatArray,
    Job,
    Pair,
    Solo,
    Table,
    assemble,
    build,
    data_rank,
    export,
    make_spec,
    relative_error,
    train,
)
from safetensors.numpy import load_file
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoModelForCausalLM

from trainer.algorithms.losses import ValueLoss
from workers.engines.base import Update

TABLE = Table.random(seed=5)
ALL = list(range(len(TABLE)))
HALVES = ([ALL[:6]], [ALL[6:]])
OPTIMIZER = replace(ADAMW, lr_scheduler_type="cosine", total_steps=5, warmup_steps=1, eps=1e-4)
ModelPath = Callable[[str, bool], Path]


def weights(answers: list[Answer]) -> dict[str, FloatArray]:
    return assemble([a.shards for a in answers])


def test_saved_by_two_ranks_and_continued_by_one(qwen2: Path, solo: Solo, pair: Pair, tmp_path: Path) -> None:
    job = Job(make_spec(qwen2, optimizer=OPTIMIZER, wrap_min_num_params=WRAP), TABLE, HALVES)
    uninterrupted = pair.run(train, replace(job, steps=3))
    saved = pair.run(train, replace(job, steps=2, save=tmp_path))
    alone = replace(job, spec=make_spec(qwen2, optimizer=OPTIMIZER), split=([ALL],), load=tmp_path)
    loaded = solo.run(train, replace(alone, steps=0))
    for name, expected in weights(saved).items():
        np.testing.assert_array_equal(weights(loaded)[name], expected)
    continued = solo.run(train, alone)
    assert relative_error(weights(continued), weights(uninterrupted)) < 1e-6
    assert continued[0].results[0].lr == uninterrupted[0].results[2].lr
    assert continued[0].results[0].grad_norm == pytest.approx(uninterrupted[0].results[2].grad_norm, rel=1e-5)


def test_saved_by_one_rank_and_continued_by_two(qwen2: Path, solo: Solo, pair: Pair, tmp_path: Path) -> None:
    job = Job(make_spec(qwen2, optimizer=OPTIMIZER), TABLE, ([ALL],))
    uninterrupted = solo.run(train, replace(job, steps=3))
    solo.run(train, replace(job, steps=2, save=tmp_path))
    continued = pair.run(train, replace(job, split=HALVES, load=tmp_path))
    assert relative_error(weights(continued), weights(uninterrupted)) < 1e-6


@pytest.mark.parametrize("steps_before", [0, 2])
def test_continuing_on_the_same_ranks_is_exact(qwen2: Path, pair: Pair, tmp_path: Path, steps_before: int) -> None:
    """Also before the first step, when the optimizer has no state yet (an actor during the critic's warm-up)."""
    job = Job(make_spec(qwen2, optimizer=OPTIMIZER), TABLE, HALVES)
    uninterrupted = weights(pair.run(train, replace(job, steps=steps_before + 2)))
    pair.run(train, replace(job, steps=steps_before, save=tmp_path))
    continued = weights(pair.run(train, replace(job, steps=2, load=tmp_path)))
    for name, expected in uninterrupted.items():
        np.testing.assert_array_equal(continued[name], expected, err_msg=name)


def save_between_steps(mesh: DeviceMesh, job: Job, directory: Path) -> Answer:
    """Saves before the first step and between two: it must change nothing."""
    engine = build(mesh, job.spec)
    rows = job.split[data_rank(mesh, job.spec)][0]
    batch, update = job.table.batch(rows), Update([range(len(rows))], job.table.norm())
    results = []
    for step in range(2):
        engine.save(directory / str(step))
        results.append(engine.train_step(batch, update, job.loss, temperature=job.temperature, entropy=True))
    return Answer(results, {}, export(engine), set())


def test_saving_changes_nothing(qwen2: Path, pair: Pair, tmp_path: Path) -> None:
    job = Job(make_spec(qwen2, optimizer=OPTIMIZER), TABLE, HALVES)
    undisturbed = pair.run(train, replace(job, steps=2))
    saving = pair.run(save_between_steps, job, tmp_path)
    for name, expected in weights(undisturbed).items():
        np.testing.assert_array_equal(weights(saving)[name], expected, err_msg=name)


def load_under_open_shards(mesh: DeviceMesh, job: Job, directory: Path) -> bool:
    """Whether shards taken for publishing before a load show what was loaded."""
    engine = build(mesh, job.spec)
    opened = list(engine.export_weights())
    before = [data.clone() for _, data, *_ in opened]
    engine.load(directory)
    now = list(engine.export_weights())
    changed = any(not torch.equal(old, new) for old, (_, new, *_) in zip(before, now, strict=True))
    return changed and all(torch.equal(a[1], b[1]) for a, b in zip(opened, now, strict=True))


def test_shards_opened_for_publishing_follow_a_load(qwen2: Path, solo: Solo, pair: Pair, tmp_path: Path) -> None:
    job = Job(make_spec(qwen2, optimizer=ADAMW), TABLE, HALVES, save=tmp_path)
    pair.run(train, job)
    assert pair.run(load_under_open_shards, job, tmp_path) == [True, True]
    assert solo.run(load_under_open_shards, job, tmp_path) == [True]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ["qwen2", "llama", "qwen3"])
def test_exports_are_the_checkpoint(kind: str, tied: bool, model_path: ModelPath, pair: Pair) -> None:
    """Every tensor of the Hugging Face checkpoint, every row once, bit for bit; rows do not divide evenly."""
    path = model_path(kind, tied)
    job = Job(make_spec(path, optimizer=None, wrap_min_num_params=WRAP), TABLE, HALVES, steps=0)
    exported = weights(pair.run(train, job))
    expected = load_file(path / "model.safetensors")
    assert ("lm_head.weight" in expected) is not tied
    assert exported.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(exported[name], value, err_msg=name)


@pytest.mark.parametrize(("kind", "tied"), [("qwen2", True), ("llama", False)])
def test_the_hugging_face_copy_is_exact(
    kind: str, tied: bool, model_path: ModelPath, pair: Pair, tmp_path: Path
) -> None:
    spec = make_spec(model_path(kind, tied), optimizer=ADAMW)
    trained = weights(pair.run(train, Job(spec, TABLE, HALVES, save_hf=tmp_path)))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == torch.float32
    assert model.config.tie_word_embeddings is tied
    copied = {name: p.detach().numpy() for name, p in model.named_parameters()}
    assert copied.keys() == trained.keys()
    for name, expected in trained.items():
        np.testing.assert_array_equal(copied[name], expected, err_msg=name)
    on_disk = weights_on_disk(model_path(kind, tied))
    assert any(not np.array_equal(on_disk[name], value) for name, value in trained.items())


def weights_on_disk(path: Path) -> dict[str, FloatArray]:
    return dict(load_file(path / "model.safetensors"))


def test_a_value_model_is_saved_and_continued(qwen2: Path, solo: Solo, pair: Pair, tmp_path: Path) -> None:
    """Its head has one row: the second rank has none of it."""
    loss = ValueLoss(clip=10.0, agg_mode="token-mean", length=LENGTH)
    job = Job(make_spec(qwen2, head="values", optimizer=OPTIMIZER), TABLE, HALVES, loss=loss)
    uninterrupted = pair.run(train, replace(job, steps=3))
    pair.run(train, replace(job, steps=2, save=tmp_path))
    continued = solo.run(train, replace(job, split=([ALL],), load=tmp_path))
    assert relative_error(weights(continued), weights(uninterrupted)) < 1e-6
