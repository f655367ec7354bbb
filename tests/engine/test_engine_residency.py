"""Engines whose parts leave the device between calls: the same training, to the last bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from engine_harness import (
    ADAMW,
    CPU,
    LOSS,
    NO_WRAP,
    WRAP,
    Pair,
    Shard,
    Solo,
    Table,
    assemble,
    build,
    data_rank,
    export,
    make_spec,
)
from torch.distributed.device_mesh import DeviceMesh

from workers.engines.base import EngineSpec, Update
from workers.engines.fsdp import FSDPEngine
from workers.memory import DeviceMemory, HostMeter

TABLE = Table.random(seed=5)
ALL = list(range(len(TABLE)))
BOTH = ("weights", "optimizer")


def train_in_turn(
    mesh: DeviceMesh, spec: EngineSpec, offload: bool, directory: Path
) -> tuple[list[float], list[Shard], dict[str, int]]:
    """Forward, three steps, a checkpoint and its return, a step: losses, weights, and what was away in between."""
    memory = DeviceMemory(HostMeter())
    engine = build(mesh, spec)
    memory.add("actor", engine.parts, dict.fromkeys(engine.parts, offload))
    optimizer = engine.parts["optimizer"]
    unmade, made = optimizer.unmade_bytes, optimizer.resident_bytes + optimizer.away_bytes
    assert unmade > 0
    shards = list(engine.export_weights())  # as the weight sync holds them, from before the first step
    rows = ALL[data_rank(mesh, spec) :: spec.parallel.data_size(mesh.size())]
    batch, micro_batches = TABLE.batch(rows), [list(range(len(rows)))]
    update = Update(micro_batches, TABLE.norm())
    outputs: list[float] = []
    for step in range(4):
        with memory.use("forward", "actor", ("weights",)):
            outputs += engine.forward(batch, micro_batches, temperature=1.0).tolist()
        with memory.use("update", "actor", BOTH):
            result = engine.train_step(batch, update, LOSS, temperature=1.0, entropy=True)
            outputs += [result.grad_norm, result.metrics["actor/loss"]]
        if step == 1:
            with memory.use("save", "actor", BOTH):
                engine.save(directory)
                engine.save_hf(directory / "hf")
        if step == 2:
            with memory.use("load", "actor", BOTH):
                engine.load(directory)
    away = {name: part.away_bytes for name, part in engine.parts.items()}
    assert (optimizer.unmade_bytes, optimizer.resident_bytes + optimizer.away_bytes) == (0, made + unmade)
    assert all(part.resident_bytes == 0 for part in engine.parts.values()) == offload
    with memory.use("publish", "actor", ("weights",)):
        for (name, held, *_), (_, now, *_) in zip(shards, engine.export_weights(), strict=True):
            assert torch.equal(held, now), name
        after = export(engine)
    return outputs, after, away


@pytest.mark.parametrize(("dtype", "wrap"), [("float32", NO_WRAP), ("bfloat16", WRAP)])
@pytest.mark.parametrize("world", ["solo", "pair"])
def test_offloading_changes_nothing(
    world: str, dtype: str, wrap: int, qwen2: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    ranks: Solo | Pair = request.getfixturevalue(world)
    spec = make_spec(qwen2, optimizer=ADAMW, dtype=dtype, wrap_min_num_params=wrap)
    kept = ranks.run(train_in_turn, spec, False, tmp_path / "kept")
    moved = ranks.run(train_in_turn, spec, True, tmp_path / "moved")
    assert [outputs for outputs, _, _ in moved] == [outputs for outputs, _, _ in kept]
    expected = assemble([shards for _, shards, _ in kept])
    for name, weight in assemble([shards for _, shards, _ in moved]).items():
        np.testing.assert_array_equal(weight, expected[name], err_msg=name)
    sizes = {name: 4 * value.size for name, value in expected.items()}
    away = {name: sum(away[name] for _, _, away in moved) for name in BOTH}
    assert away["weights"] >= sum(sizes.values()), "all of it, with FSDP2's padding"
    assert 2 * sum(sizes.values()) <= away["optimizer"] <= 2 * away["weights"]
    assert all(not any(away.values()) for _, _, away in kept)


def test_a_reference_has_weights_to_move_and_no_optimizer(qwen2: Path, solo: Solo) -> None:
    def parts(mesh: DeviceMesh) -> list[str]:
        return list(FSDPEngine(make_spec(qwen2, optimizer=None), mesh, CPU).parts)

    assert solo.run(parts) == [["weights"]]


def test_evicted_memory_is_given_back(qwen2: Path, solo: Solo) -> None:
    """Storages are really empty: what a parameter and FSDP2's own view of it hold is nothing."""

    def sizes(mesh: DeviceMesh) -> set[int]:
        engine = FSDPEngine(make_spec(qwen2, optimizer=ADAMW), mesh, CPU)
        engine.parts["weights"].evict(1 << 40)
        found = {tensor.untyped_storage().nbytes() for _, tensor, *_ in engine.export_weights()}
        engine.parts["weights"].restore()
        assert all(bool(torch.isfinite(tensor).all()) for _, tensor, *_ in engine.export_weights())
        return found

    assert solo.run(sizes) == [{0}]
