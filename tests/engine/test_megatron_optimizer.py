"""The optimizer that data-parallel replicas divide: its size, replicas that stay alike, checkpoints of its pieces."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_harness import (
    ADAMW,
    CPU,
    LOSS,
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
    data_rank,
    make_spec,
    relative_error,
    train,
)
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoModelForCausalLM, Qwen2Config

from workers.engines.base import EngineSpec, ParallelSpec, Update
from workers.engines.megatron.engine import MegatronEngine
from workers.engines.megatron.slices import Slice, part_of

TABLE = Table.random(seed=5)
ALL = list(range(len(TABLE)))
ONE: tuple[Rows, ...] = ([ALL[:6], ALL[6:]],)
TWO: tuple[Rows, ...] = ([ALL[:6]], [ALL[6:]])
FOUR: tuple[Rows, ...] = ([ALL[:3]], [ALL[3:6]], [ALL[6:9]], [ALL[9:]])
OPTIMIZER = replace(ADAMW, lr_scheduler_type="cosine", total_steps=9, warmup_steps=1, eps=1e-4)
SINGLE, TENSOR, PIPELINE = ParallelSpec(), ParallelSpec(tensor=2), ParallelSpec(pipeline=2)
BOTH = ParallelSpec(tensor=2, pipeline=2, sequence=True)
REPLICATED = [("pair", SINGLE), ("quad", TENSOR), ("quad", PIPELINE)]
ModelPath = Callable[[str, bool], Path]


def spec_of(path: Path, parallel: ParallelSpec, **changes: Any) -> EngineSpec:
    return make_spec(path, **({"optimizer": OPTIMIZER, "strategy": "megatron", "parallel": parallel} | changes))


def weights(answers: Sequence[Answer]) -> dict[str, FloatArray]:
    return assemble([a.shards for a in answers])


def assert_equal(got: dict[str, FloatArray], expected: dict[str, FloatArray]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 5),
    box=st.tuples(*[st.integers(0, 4)] * 4),
    segment=st.tuples(*[st.integers(0, 25)] * 2),
    is_vector=st.booleans(),
)
def test_pieces_are_all_of_a_segment_once(
    rows: int, columns: int, box: tuple[int, ...], segment: tuple[int, ...], is_vector: bool
) -> None:
    """Of a tensor that fills a box of a parameter, all that any run of the parameter's elements has, in its place."""
    parameter = torch.arange(rows * columns).view(rows * columns if is_vector else (rows, columns))
    bounds = [
        sorted((min(a, size), min(b, size))) for size, a, b in zip(parameter.shape, box[::2], box[1::2], strict=False)
    ]
    view = parameter[tuple(slice(*pair) for pair in bounds)]
    shape, first = tuple(size + 1 for size in view.shape), (1,) * view.ndim
    start, end = sorted(min(bound, parameter.numel()) for bound in segment)
    elements = torch.cat([torch.full((3,), -9), parameter.view(-1)[start:end].clone()])[3:]
    pieces = list(part_of(Slice("x", view, first, shape), int(view.storage_offset()), elements, start))
    assert len(pieces) <= 3
    found = torch.full(shape, -1)
    for piece in pieces:
        assert piece.local.numel() and (found[piece.box] == -1).all()
        assert piece.local.untyped_storage().data_ptr() == elements.untyped_storage().data_ptr(), "no copy"
        found[piece.box] = piece.local
    expected = torch.full(shape, -1)
    expected[tuple(slice(1, None) for _ in shape)] = torch.where((view >= start) & (view < end), view, -1)
    assert torch.equal(found, expected)


def optimizer_bytes(mesh: DeviceMesh, spec: EngineSpec) -> tuple[int, int, int]:
    """What is there before the first step, what was said to be missing, and what there is after it."""
    engine = build(mesh, spec)
    rows = ALL[data_rank(mesh, spec) :: spec.parallel.data_size(mesh.size())]
    part = engine.parts["optimizer"]
    before, missing = part.resident_bytes, part.unmade_bytes
    update = Update([range(len(rows))], TABLE.norm())
    engine.train_step(TABLE.batch(rows), update, LOSS, temperature=1.0, entropy=True)
    assert part.unmade_bytes == 0
    return before, missing, part.resident_bytes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_replicas_divide_the_optimizer(dtype: str, model_path: ModelPath, solo: Solo, pair: Pair, quad: Quad) -> None:
    """12 bytes per parameter, or 8 where the weights are the masters, over all replicas."""
    path = model_path("qwen2", False)
    spec = spec_of(path, SINGLE, dtype=dtype)
    sizes = [world.run(optimizer_bytes, spec) for world in (solo, pair, quad)]
    (alone,) = sizes[0]
    num_elements = sum(v.size for v in weights(solo.run(train, Job(spec, TABLE, ONE, steps=0))).values())
    assert alone[2] == (8 if dtype == "float32" else 12) * num_elements
    for size, ranks in zip((1, 2, 4), sizes, strict=True):
        assert all(before + missing == after for before, missing, after in ranks)
        assert sum(after for *_, after in ranks) == alone[2]
        assert max(after for *_, after in ranks) < 1.03 * alone[2] / size


def checksums(engine: Any) -> dict[str, bytes]:
    assert isinstance(engine, MegatronEngine)
    return {name: p.detach().view(torch.uint8).numpy().tobytes() for name, p in engine._parameters.items()}


def watched(mesh: DeviceMesh, job: Job, bad: Job, directory: Path) -> list[dict[str, bytes]]:
    """All bits of the parameters: built, after a step, a skipped one, another, and back where the step had led."""
    engine = build(mesh, job.spec)
    rows = job.split[data_rank(mesh, job.spec)][0]
    update = Update([range(len(rows))], job.table.norm())
    seen = [checksums(engine)]
    for chosen in (job, bad, job):
        result = engine.train_step(chosen.table.batch(rows), update, chosen.loss, temperature=1.0, entropy=True)
        assert result.skipped == (chosen is bad)
        seen.append(checksums(engine))
        if len(seen) == 2:
            engine.save(directory)
    engine.load(directory)
    return [*seen, checksums(engine)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("world", "parallel"), REPLICATED)
def test_replicas_are_alike_to_the_last_bit(
    world: str, parallel: ParallelSpec, dtype: str, qwen2: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    ranks: Pair | Quad = request.getfixturevalue(world)
    job = Job(spec_of(qwen2, parallel, dtype=dtype), TABLE, TWO)
    bad = replace(job, table=TABLE.with_column("advantages", math.nan, [9]))
    answers = ranks.run(watched, job, bad, tmp_path)
    for rank in (rank for rank in range(ranks.size) if parallel.data_rank(rank, ranks.size) == 0):
        assert answers[rank] == answers[rank + parallel.tensor]
    for built, stepped, skipped, again, loaded in answers:
        assert stepped == skipped == loaded
        assert built != stepped != again


@pytest.mark.parametrize(
    ("dtype", "master"), [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")]
)
@pytest.mark.parametrize(("world", "parallel"), REPLICATED)
def test_continuing_is_exact(
    world: str,
    parallel: ParallelSpec,
    dtype: str,
    master: str,
    qwen2: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    ranks: Pair | Quad = request.getfixturevalue(world)
    job = Job(spec_of(qwen2, parallel, dtype=dtype, master_dtype=master), TABLE, TWO, save=tmp_path)
    expected = ranks.run(train, replace(job, steps=3, save=None))
    ranks.run(train, replace(job, steps=1))
    continued = ranks.run(train, replace(job, steps=2, load=tmp_path, save=None))
    assert continued[0].results == expected[0].results[1:]
    assert_equal(weights(continued), weights(expected))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpoints_are_cut_anew(dtype: str, qwen2: Path, solo: Solo, pair: Pair, quad: Quad, tmp_path: Path) -> None:
    """However many replicas divide what, each continues the one before by a step: state is what one rank would have."""
    ways: list[tuple[Pair, ParallelSpec, tuple[Rows, ...]]]
    ways = [(pair, SINGLE, TWO), (quad, TENSOR, TWO), (quad, BOTH, ONE), (quad, PIPELINE, TWO), (quad, SINGLE, FOUR)]
    alone = Job(spec_of(qwen2, SINGLE, dtype=dtype), TABLE, ONE, save=tmp_path / "0")
    solo.run(train, alone)
    last: Sequence[Answer] = []
    for number, (world, parallel, split) in enumerate(ways):
        spec = spec_of(qwen2, parallel, dtype=dtype)
        here = replace(alone, spec=spec, split=split, load=tmp_path / str(number), save=tmp_path / str(number + 1))
        last = world.run(train, here)
    back = replace(alone, load=tmp_path / str(len(ways)), save=tmp_path / "back", steps=0)
    assert_equal(weights(solo.run(train, back)), weights(last))
    (uninterrupted,) = solo.run(train, replace(alone, steps=1 + len(ways), save=tmp_path / "whole"))
    assert last[0].results[0].lr == uninterrupted.results[-1].lr
    assert relative_error(weights(last), weights([uninterrupted])) < (1e-6 if dtype == "float32" else 1e-3)
    for name, value in stored(tmp_path / str(len(ways))).items():
        np.testing.assert_array_equal(value, stored(tmp_path / "back")[name], err_msg=name)


def stored(directory: Path) -> dict[str, FloatArray]:
    """All tensors of a checkpoint, put together here."""
    found: dict[str, Any] = {}
    planner = _EmptyStateDictLoadPlanner()
    _load_state_dict(found, storage_reader=FileSystemReader(directory), planner=planner, no_dist=True)
    return {name: tensor.numpy() for name, tensor in found.items()}


@pytest.mark.parametrize(("world", "parallel"), [*REPLICATED, ("quad", SINGLE)])
def test_every_element_is_written_once(
    world: str, parallel: ParallelSpec, qwen2: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """And every rank writes its share."""
    ranks: Pair | Quad = request.getfixturevalue(world)
    split = {1: ONE, 2: TWO, 4: FOUR}[parallel.data_size(ranks.size)]
    ranks.run(train, Job(spec_of(qwen2, parallel, dtype="bfloat16"), TABLE, split, save=tmp_path))
    metadata = FileSystemReader(tmp_path).read_metadata()
    for name, tensor in metadata.state_dict_metadata.items():
        assert sum(math.prod(chunk.sizes) for chunk in tensor.chunks) == math.prod(tensor.size), name
    assert metadata.storage_data is not None
    known = sum(entry.length for entry in metadata.storage_data.values())
    files = [file.stat().st_size for file in sorted(tmp_path.glob("*.distcp"))]
    assert known == sum(files), "nothing in the files that the index does not know"
    assert len(files) == ranks.size
    assert min(files) > 0.5 * max(files)


def test_a_checkpoint_of_another_model_is_refused(model_path: ModelPath, solo: Solo, tmp_path: Path) -> None:
    saved = spec_of(model_path("qwen2", True), SINGLE)
    solo.run(train, Job(saved, TABLE, ONE, steps=0, save=tmp_path / "saved"))
    wide = tmp_path / "wide"
    config = Qwen2Config.from_pretrained(saved.model_path, intermediate_size=56)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(wide)
    others = {
        r"no tensor model\.lm_head\.weight": spec_of(model_path("qwen2", False), SINGLE),
        r"shape \(40, 24\) in the checkpoint, expected \(56, 24\)": spec_of(wide, SINGLE),
    }
    for message, spec in others.items():
        with pytest.raises(CheckpointException, match=message):
            solo.run(train, Job(spec, TABLE, ONE, steps=0, load=tmp_path / "saved"))


def timeouts(mesh: DeviceMesh, spec: EngineSpec) -> set[timedelta]:
    from megatron.core import parallel_state

    build(mesh, spec)
    found = [parallel_state.get_tensor_model_parallel_group(), parallel_state.get_data_parallel_group()]
    return {group._get_backend(CPU).options._timeout for group in found}


def test_megatron_waits_as_long_as_the_run_does(qwen2: Path, pair: Pair) -> None:
    assert pair.run(timeouts, spec_of(qwen2, SINGLE, optimizer=None)) == [{timedelta(minutes=1)}] * 2
