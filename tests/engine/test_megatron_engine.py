"""What an engine must do, done by Megatron: checkpoints, exports, skipped steps, offloading, values, bfloat16."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_harness import (
    ADAMW,
    LENGTH,
    LOSS,
    VOCABULARY,
    Answer,
    FloatArray,
    Job,
    Pair,
    Quad,
    Rows,
    Solo,
    Table,
    assemble,
    build,
    make_spec,
    relative_error,
    train,
)
from safetensors.torch import load_file, save_file
from test_engine_checkpoints import load_under_open_shards, save_between_steps
from test_engine_residency import train_in_turn
from test_engine_updates import Poisoned, step_good_bad_good
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoModelForCausalLM

from trainer.algorithms.losses import ValueLoss
from workers.engines.base import EngineSpec, ParallelSpec, Update

TABLE = Table.random(seed=5)
ALL = list(range(len(TABLE)))
ONE = ([ALL[:6], ALL[6:]],)
OPTIMIZER = replace(ADAMW, lr_scheduler_type="cosine", total_steps=5, warmup_steps=1, eps=1e-4)
VALUE_LOSS = ValueLoss(clip=10.0, agg_mode="token-mean", length=LENGTH)
TENSOR, PIPELINE = ParallelSpec(tensor=2), ParallelSpec(pipeline=2)
BOTH = ParallelSpec(tensor=2, pipeline=2, sequence=True)
LAYERS = 2
ModelPath = Callable[[str, bool], Path]


def spec_of(path: Path, parallel: ParallelSpec, **changes: Any) -> EngineSpec:
    settings = {"optimizer": OPTIMIZER, "strategy": "megatron", "parallel": parallel} | changes
    return make_spec(path, **settings)


def weights(answers: Sequence[Answer]) -> dict[str, FloatArray]:
    return assemble([a.shards for a in answers])


def assert_equal(got: dict[str, FloatArray], expected: dict[str, FloatArray]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


def on_disk(path: Path) -> dict[str, FloatArray]:
    return {name: tensor.float().numpy() for name, tensor in load_file(path / "model.safetensors").items()}


def attention_passes(mesh: DeviceMesh, spec: EngineSpec) -> int:
    """How often one optimizer step over two micro-batches computes the attention of a layer."""
    from workers.engines.megatron import model

    counted, original = [0], model.packed_attention

    def count(*args: Any) -> torch.Tensor:
        counted[0] += 1
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "packed_attention", count)
        train(mesh, Job(spec, TABLE, ONE))
    return counted[0] - 2 * LAYERS  # `train` runs forward too


@pytest.mark.parametrize(("setting", "passes"), [(False, 2), (True, 4), ("auto", 2)])
def test_recomputation_computes_every_layer_again(
    model_path: ModelPath, solo: Solo, setting: bool | str, passes: int
) -> None:
    spec = spec_of(model_path("qwen2", True), ParallelSpec(), gradient_checkpointing=setting)
    assert solo.run(attention_passes, spec) == [passes * LAYERS]


@pytest.mark.parametrize(
    ("parallel", "world"), [(TENSOR, "pair"), (PIPELINE, "pair"), (ParallelSpec(), "pair"), (BOTH, "quad")]
)
def test_exports_are_the_checkpoint(
    parallel: ParallelSpec, world: str, model_path: ModelPath, request: pytest.FixtureRequest
) -> None:
    """Every tensor bit for bit, every element once, and every rank sends some; the vocabulary does not divide."""
    ranks: Pair | Quad = request.getfixturevalue(world)
    for kind, tied in (("qwen2", True), ("llama", False), ("qwen3", True)):
        job = Job(spec_of(model_path(kind, tied), parallel, optimizer=None), TABLE, ONE * 2, steps=0)
        answers = ranks.run(train, job)
        assert_equal(weights(answers), on_disk(model_path(kind, tied)))
        sent = [sum(data.size for _, data, *_ in answer.shards) for answer in answers]
        assert min(sent) > 0.5 * sum(sent) / len(sent), sent


@pytest.mark.parametrize("parallel", [TENSOR, PIPELINE])
def test_continuing_is_exact_and_saving_changes_nothing(
    parallel: ParallelSpec, qwen2: Path, pair: Pair, tmp_path: Path
) -> None:
    """Also from before the first step, when the optimizer has no state yet."""
    job = Job(spec_of(qwen2, parallel), TABLE, ([ALL],))
    expected = weights(pair.run(train, replace(job, steps=2)))
    assert_equal(weights(pair.run(save_between_steps, job, tmp_path)), expected)
    for step in (0, 1):
        continued = pair.run(train, replace(job, steps=2 - step, load=tmp_path / str(step)))
        assert_equal(weights(continued), expected)


def test_checkpoints_are_cut_anew(qwen2: Path, solo: Solo, pair: Pair, quad: Quad, tmp_path: Path) -> None:
    """One rank, tensor parallel, pipeline, both, data parallel: each continues the one before by a step."""
    halves = ([ALL[:6]], [ALL[6:]])
    ways: list[tuple[Solo | Pair, ParallelSpec, Sequence[Rows]]]
    ways = [(pair, TENSOR, ONE), (pair, PIPELINE, ONE), (quad, BOTH, ONE), (pair, ParallelSpec(), halves)]
    job = Job(spec_of(qwen2, ParallelSpec()), TABLE, ONE, save=tmp_path / "0")
    last = solo.run(train, job)
    for number, (world, parallel, split) in enumerate(ways):
        here = replace(job, spec=spec_of(qwen2, parallel), split=tuple(split), load=tmp_path / str(number))
        assert_equal(weights(world.run(train, replace(here, steps=0, save=None))), weights(last))
        last = world.run(train, replace(here, save=tmp_path / str(number + 1)))
    (uninterrupted,) = solo.run(train, replace(job, steps=1 + len(ways), save=None))
    assert last[0].results[0].lr == uninterrupted.results[-1].lr
    assert last[0].results[0].grad_norm == pytest.approx(uninterrupted.results[-1].grad_norm, rel=1e-4)
    assert relative_error(weights(last), weights([uninterrupted])) < 1e-6


def test_shards_opened_for_publishing_follow_a_load(qwen2: Path, pair: Pair, tmp_path: Path) -> None:
    for parallel in (TENSOR, PIPELINE):
        job = Job(spec_of(qwen2, parallel), TABLE, ONE, save=tmp_path / str(parallel.tensor))
        pair.run(train, job)
        assert pair.run(load_under_open_shards, job, job.save) == [True, True]


@pytest.mark.parametrize(("kind", "tied", "parallel"), [("qwen2", True, PIPELINE), ("llama", False, TENSOR)])
def test_the_hugging_face_copy_is_exact(
    kind: str, tied: bool, parallel: ParallelSpec, model_path: ModelPath, pair: Pair, tmp_path: Path
) -> None:
    job = Job(spec_of(model_path(kind, tied), parallel), TABLE, ONE, save_hf=tmp_path)
    trained = weights(pair.run(train, job))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (model.dtype, model.config.tie_word_embeddings) == (torch.float32, tied)
    assert_equal({name: p.detach().numpy() for name, p in model.named_parameters()}, trained)


def test_large_checkpoints_are_in_several_files(qwen2: Path, solo: Solo, tmp_path: Path) -> None:
    """Written and read."""
    import workers.engines.megatron.checkpoint as checkpoint

    def copy(mesh: DeviceMesh) -> None:
        build(mesh, spec_of(qwen2, ParallelSpec(), optimizer=None)).save_hf(tmp_path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "MAX_FILE_BYTES", 8000)
        solo.run(copy)
    assert len(set(json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"].values())) > 2
    again = solo.run(train, Job(spec_of(tmp_path, ParallelSpec(), optimizer=None), TABLE, ONE, steps=0))
    assert_equal(weights(again), on_disk(qwen2))


@pytest.mark.parametrize("parallel", [TENSOR, PIPELINE, ParallelSpec()])
def test_a_step_that_is_not_finite_is_skipped_on_all_ranks(parallel: ParallelSpec, qwen2: Path, pair: Pair) -> None:
    """And leaves no trace: the next step is that of a run which never saw it."""
    split = ONE if parallel != ParallelSpec() else ([ALL[:6]], [ALL[6:]])
    job = Job(spec_of(qwen2, parallel, optimizer=ADAMW), TABLE, split, temperature=1.0)
    without = pair.run(train, replace(job, steps=2))
    bad_advantage = replace(job, table=TABLE.with_column("advantages", math.nan, [9]))
    for bad in (bad_advantage, replace(job, loss=Poisoned(math.inf))):
        for answer, (skipped, finite, found) in zip(without, pair.run(step_good_bad_good, job, bad), strict=True):
            assert (skipped, finite) == ([False, True, False], [True, False, True])
            for name, data, *_ in answer.shards:
                first, second, third = (tensor.numpy() for tensor in found[name])
                np.testing.assert_array_equal(first, second)
                np.testing.assert_array_equal(third, data)


@pytest.mark.parametrize("parallel", [TENSOR, ParallelSpec()])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_offloading_changes_nothing(
    dtype: str, parallel: ParallelSpec, qwen2: Path, pair: Pair, tmp_path: Path
) -> None:
    spec = spec_of(qwen2, parallel, dtype=dtype)
    kept = pair.run(train_in_turn, spec, False, tmp_path / "kept")
    moved = pair.run(train_in_turn, spec, True, tmp_path / "moved")
    assert [numbers for numbers, _, _ in moved] == [numbers for numbers, _, _ in kept]
    assert_equal(assemble([shards for _, shards, _ in moved]), assemble([shards for _, shards, _ in kept]))
    assert all(away["weights"] > 0 and away["optimizer"] > 0 for _, _, away in moved)


def test_bfloat16_computes_and_float32_remembers(qwen2: Path, solo: Solo, pair: Pair, tmp_path: Path) -> None:
    """Weights leave as the model computes with them; what is saved is the float32 that they were rounded from."""
    exact = solo.run(train, Job(spec_of(qwen2, ParallelSpec()), TABLE, ONE, steps=2))[0]
    job = Job(spec_of(qwen2, TENSOR, dtype="bfloat16"), TABLE, ONE, steps=2, save=tmp_path)
    answers = pair.run(train, job)
    assert {dtype for answer in answers for dtype in answer.dtypes} == {torch.bfloat16}
    for row, values in answers[0].outputs.items():
        np.testing.assert_allclose(values, exact.outputs[row], atol=0.05)
    assert answers[0].results[0].grad_norm == pytest.approx(exact.results[0].grad_norm, rel=0.05)
    (restored,) = solo.run(train, replace(job, spec=spec_of(qwen2, ParallelSpec()), load=tmp_path, save=None, steps=0))
    assert relative_error(weights([restored]), weights([exact])) < 1e-3
    for name, value in weights([restored]).items():
        tensor = torch.from_numpy(value)
        assert not torch.equal(tensor, tensor.bfloat16().float()), f"{name} was rounded"
        assert torch.equal(torch.from_numpy(weights(answers)[name]), tensor.bfloat16().float()), name


@pytest.mark.parametrize("parallel", [TENSOR, replace(TENSOR, sequence=True), PIPELINE])
def test_a_value_model_learns_as_with_fsdp(parallel: ParallelSpec, qwen2: Path, solo: Solo, pair: Pair) -> None:
    table = TABLE.with_column("returns", 1.0).with_column("values", 0.0)
    optimizer = replace(ADAMW, lr=1e-2, clip_grad=10.0)
    job = Job(make_spec(qwen2, head="values", optimizer=optimizer), table, ONE, loss=VALUE_LOSS, steps=3)
    (expected,) = solo.run(train, job)
    answers = pair.run(train, replace(job, spec=replace(job.spec, strategy="megatron", parallel=parallel)))
    assert [r.metrics["critic/value_loss"] for r in answers[0].results] == pytest.approx(
        [r.metrics["critic/value_loss"] for r in expected.results], rel=1e-5
    )
    assert relative_error(weights(answers), weights([expected])) < 1e-5


def actor_beside_reference(mesh: DeviceMesh, actor: EngineSpec, reference: EngineSpec) -> list[FloatArray]:
    """Log-probs of both, in turn, before and after a step of the actor; zeros from ranks that hold none."""
    engines = [build(mesh, actor), build(mesh, reference)]
    assert list(engines[1].parts) == ["weights"]
    batch, update = TABLE.batch(ALL), Update([ALL], TABLE.norm())
    found = []
    for step in range(2):
        if step:
            engines[0].train_step(batch, update, LOSS, temperature=1.0, entropy=True)
        for engine in engines:
            values = engine.forward(batch, [ALL], temperature=1.0).numpy()
            found.append(values if engine.holds_outputs else np.zeros_like(values))
    return found


def test_engines_cut_differently_live_side_by_side(qwen2: Path, pair: Pair) -> None:
    answers = pair.run(actor_beside_reference, spec_of(qwen2, TENSOR), spec_of(qwen2, PIPELINE, optimizer=None))
    before, reference, after, again = (sum(parts) for parts in zip(*answers, strict=True))
    np.testing.assert_allclose(before, reference, atol=1e-5)
    np.testing.assert_array_equal(reference, again)
    assert np.abs(after - before).max() > 1e-4


def test_a_model_that_cannot_be_cut_so_is_refused(qwen2: Path, tmp_path: Path, solo: Solo) -> None:
    def make(mesh: DeviceMesh, spec: EngineSpec) -> None:
        build(mesh, spec)

    with pytest.raises(
        ValueError, match="tensor_model_parallel_size=3 does not divide the model's num_attention_heads=4"
    ):
        solo.run(make, spec_of(qwen2, ParallelSpec(tensor=3)))
    weights_there = load_file(qwen2 / "model.safetensors")
    (tmp_path / "config.json").write_text((qwen2 / "config.json").read_text())
    with pytest.raises(ValueError, match="has none"):
        solo.run(make, spec_of(tmp_path, ParallelSpec()))
    save_file({n: t for n, t in weights_there.items() if "layers.1.mlp.up" not in n}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"no tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        solo.run(make, spec_of(tmp_path, ParallelSpec()))
    with pytest.raises(ValueError, match=rf"shape \[{VOCABULARY}, 24\], expected \(50, 24\)"):
        solo.run(make, spec_of(qwen2, ParallelSpec(), override_config={"vocab_size": 50}))
