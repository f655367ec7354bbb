"""Mixtures of experts on the Megatron engine: files, checkpoints, and routing that is told. (How they train is in
test_megatron_parity.)"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from engine_harness import (
    ADAMW,
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
    one_by_one,
    relative_error,
    train,
)
from safetensors.torch import load_file
from test_engine_checkpoints import save_between_steps
from test_engine_residency import train_in_turn
from test_engine_updates import step_good_bad_good
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoModelForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from workers.batch import CHOOSE, Batch, MicroBatch
from workers.engines.base import EngineSpec, ParallelSpec

TABLE = Table.random(seed=5)
ALL = list(range(len(TABLE)))
ONE = ([ALL],)
HALVES = ([ALL[:6]], [ALL[6:]])
OPTIMIZER = replace(ADAMW, lr_scheduler_type="cosine", total_steps=5, warmup_steps=1, eps=1e-4)
EXPERT, TENSOR = ParallelSpec(expert=2), ParallelSpec(tensor=2, sequence=True)
PIPELINE = ParallelSpec(pipeline=2, expert=2)
EXPERTS, LAYERS = 4, 2
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


@pytest.mark.parametrize(
    ("parallel", "world", "kind"),
    [
        (EXPERT, "pair", "mixtral"),
        (ParallelSpec(), "pair", "qwen3_moe"),
        (TENSOR, "pair", "mixed"),
        (EXPERT, "quad", "mixed"),
        (PIPELINE, "quad", "qwen3_moe"),
    ],
)
def test_exports_are_the_checkpoint(
    parallel: ParallelSpec, world: str, kind: str, model_path: ModelPath, request: pytest.FixtureRequest
) -> None:
    """As the hub has it: every tensor of every expert bit for bit, every element from one rank, and all ranks send."""
    ranks: Pair | Quad = request.getfixturevalue(world)
    path = model_path(kind, False)
    job = Job(spec_of(path, parallel, optimizer=None), TABLE, ONE * 4, steps=0)
    answers = ranks.run(train, job)
    assert_equal(weights(answers), on_disk(path))
    sent = [sum(data.size for _, data, *_ in answer.shards) for answer in answers]
    assert min(sent) > 0.5 * sum(sent) / len(sent), sent


def test_continuing_is_exact_and_saving_changes_nothing(model_path: ModelPath, pair: Pair, tmp_path: Path) -> None:
    job = Job(spec_of(model_path("qwen3_moe", False), EXPERT), TABLE, HALVES)
    expected = weights(pair.run(train, replace(job, steps=2)))
    assert_equal(weights(pair.run(save_between_steps, job, tmp_path)), expected)
    for step in (0, 1):
        continued = pair.run(train, replace(job, steps=2 - step, load=tmp_path / str(step)))
        assert_equal(weights(continued), expected)


def test_checkpoints_are_cut_anew(model_path: ModelPath, solo: Solo, pair: Pair, quad: Quad, tmp_path: Path) -> None:
    """Expert parallel, one rank, tensor parallel, a pipeline of expert parallel stages: each goes on by a step."""
    path = model_path("qwen3_moe", False)
    ways: list[tuple[Solo | Pair, ParallelSpec, Sequence[Rows]]]
    ways = [(solo, ParallelSpec(), ONE), (pair, TENSOR, ONE), (quad, PIPELINE, HALVES), (pair, EXPERT, HALVES)]
    job = Job(spec_of(path, EXPERT), TABLE, HALVES, save=tmp_path / "0")
    last = pair.run(train, job)
    for number, (world, parallel, split) in enumerate(ways):
        here = replace(job, spec=spec_of(path, parallel), split=tuple(split), load=tmp_path / str(number))
        assert_equal(weights(world.run(train, replace(here, steps=0, save=None))), weights(last))
        last = world.run(train, replace(here, save=tmp_path / str(number + 1)))
    uninterrupted = pair.run(train, replace(job, steps=1 + len(ways), save=None))
    assert last[0].results[0].grad_norm == pytest.approx(uninterrupted[0].results[-1].grad_norm, rel=1e-4)
    assert relative_error(weights(last), weights(uninterrupted)) < 1e-6


def test_a_step_that_is_not_finite_is_skipped_on_all_ranks(model_path: ModelPath, quad: Quad) -> None:
    """And leaves no trace, whichever rank's sequence it came from."""
    split = ([[0, 1, 2]], [[3, 4, 5]], [[6, 7, 8]], [[9, 10, 11]])
    job = Job(spec_of(model_path("qwen3_moe", False), EXPERT, optimizer=ADAMW), TABLE, split, temperature=1.0)
    without = quad.run(train, replace(job, steps=2))
    bad = replace(job, table=TABLE.with_column("advantages", math.nan, [9]))
    for answer, (skipped, finite, found) in zip(without, quad.run(step_good_bad_good, job, bad), strict=True):
        assert (skipped, finite) == ([False, True, False], [True, False, True])
        for name, data, *_ in answer.shards:
            np.testing.assert_array_equal(found[name][2].numpy(), data)


def gradient_bytes(mesh: DeviceMesh, spec: EngineSpec) -> tuple[int, int, int]:
    """Of parameters in float32, of gradients inside a step, and of those outside of it."""
    engine: Any = build(mesh, spec)
    training = engine._training
    storages = [
        b.grad_data.untyped_storage() for c in training.chunks for b in [*c.buffers, *c.expert_parallel_buffers]
    ]
    with training.gradients:
        inside = sum(storage.nbytes() for storage in storages)
    return sum(4 * p.numel() for p in engine._parameters.values()), inside, sum(s.nbytes() for s in storages)


def test_gradients_take_memory_inside_a_step_only(model_path: ModelPath, pair: Pair) -> None:
    for weights, inside, outside in pair.run(gradient_bytes, spec_of(model_path("qwen3_moe", False), EXPERT)):
        assert inside >= weights
        assert outside == 0


def test_offloading_changes_nothing(model_path: ModelPath, pair: Pair, tmp_path: Path) -> None:
    spec = spec_of(model_path("mixtral", False), EXPERT, dtype="bfloat16")
    kept = pair.run(train_in_turn, spec, False, tmp_path / "kept")
    moved = pair.run(train_in_turn, spec, True, tmp_path / "moved")
    assert [numbers for numbers, _, _ in moved] == [numbers for numbers, _, _ in kept]
    assert_equal(assemble([shards for _, shards, _ in moved]), assemble([shards for _, shards, _ in kept]))


def test_the_hugging_face_copy_is_exact(model_path: ModelPath, pair: Pair, tmp_path: Path) -> None:
    job = Job(spec_of(model_path("mixtral", False), EXPERT), TABLE, HALVES, save_hf=tmp_path)
    trained = weights(pair.run(train, job))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    copied = {name: p.detach().numpy() for name, p in model.named_parameters()}
    assert_equal(one_by_one(copied, "mixtral"), trained)


def told(micro: MicroBatch) -> Tensor:
    """A routing of the micro-batch's rows, at random; every third is the router's own affair."""
    generator = torch.Generator().manual_seed(7)
    size = (len(micro.input_ids), LAYERS, EXPERTS)
    routing = torch.rand(size, generator=generator).argsort(-1)[..., :2].short()
    routing[::3] = CHOOSE
    return routing


def train_as_told(mesh: DeviceMesh, job: Job) -> Answer:
    """Every micro-batch comes with a routing, which Hugging Face's routers follow too: experts as told; their shares by
    the softmax over all, made to add up to 1."""
    pack, choose = Batch.micro_batch, Qwen3MoeTopKRouter.forward
    given, num_calls = torch.empty(0), 0

    def packed(*args: Any, **options: Any) -> MicroBatch:
        nonlocal given
        micro = pack(*args, **options)
        given = told(micro)
        return replace(micro, routing=given)

    def follow(router: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        nonlocal num_calls
        logits, _, chosen = choose(router, hidden)
        routing, num_calls = given[:, num_calls % LAYERS], num_calls + 1
        chosen = torch.where(routing == CHOOSE, chosen, routing.long())
        shares = F.softmax(logits, dim=-1).gather(-1, chosen)
        return logits, shares / shares.sum(-1, keepdim=True), chosen

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batch, "micro_batch", packed)
        patch.setattr(Qwen3MoeTopKRouter, "forward", follow)
        return train(mesh, job)


def test_routing_that_is_told_is_taken(model_path: ModelPath, solo: Solo, pair: Pair) -> None:
    """As Hugging Face's formula has it with those experts: log-probs, and gradients, the routers' too."""
    path = model_path("qwen3_moe", False)
    job = Job(make_spec(path, optimizer=OPTIMIZER), TABLE, ONE, steps=2)
    (expected,) = solo.run(train_as_told, job)
    (untold,) = solo.run(train, job)
    assert max(np.abs(untold.outputs[r] - v).max() for r, v in expected.outputs.items() if v.size) > 1e-2
    for world, parallel, more in (
        (solo, ParallelSpec(), {}),
        (pair, TENSOR, {"gradient_checkpointing": True}),
        (pair, ParallelSpec(pipeline=2), {}),
    ):
        answers = world.run(train_as_told, replace(job, spec=spec_of(path, parallel, **more)))
        outputs = {row: values for answer in answers for row, values in answer.outputs.items()}
        for row, values in expected.outputs.items():
            np.testing.assert_allclose(outputs[row], values, rtol=0, atol=1e-5)
        wanted = one_by_one(assemble([expected.shards]), "qwen3_moe")
        for name, value in weights(answers).items():
            np.testing.assert_allclose(value, wanted[name], rtol=0, atol=1e-6, err_msg=name)


def replay(mesh: DeviceMesh, spec: EngineSpec) -> tuple[FloatArray, FloatArray]:
    """Log-probs by the routers' own choice, and by the same choice told in another order."""
    engine: Any = build(mesh, spec)
    batch, chosen = TABLE.batch(ALL), []
    hooks = [
        layer.mlp.router.register_forward_hook(lambda _, __, out: chosen.append(out[1].nonzero()[:, 1].view(-1, 2)))
        for stage in engine._chunks
        for layer in stage.decoder.layers
    ]
    own = engine.forward(batch, [ALL], temperature=1.0).numpy()
    for hook in hooks:
        hook.remove()
    pack, routing = Batch.micro_batch, torch.stack(chosen, dim=1).flip(-1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batch, "micro_batch", lambda *args, **options: replace(pack(*args, **options), routing=routing))
        return own, engine.forward(batch, [ALL], temperature=1.0).numpy()


def test_a_routers_own_choice_replayed_changes_no_bit(model_path: ModelPath, solo: Solo) -> None:
    for dtype in ("float32", "bfloat16"):
        spec = spec_of(model_path("qwen3_moe", False), ParallelSpec(), optimizer=None, dtype=dtype)
        ((own, replayed),) = solo.run(replay, spec)
        np.testing.assert_array_equal(own, replayed)
