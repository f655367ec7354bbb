"""What an engine keeps, recomputes and gathers again for want of memory changes nothing that it computes.

A GPU's reading of its free memory is replaced here; a CPU is not planned for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_harness import ADAMW, CPU, LOSS, WRAP, FloatArray, Pair, Shard, Solo, Table, assemble, export, make_spec
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from workers.engines import fsdp, recompute
from workers.engines.base import EngineSpec, Update
from workers.engines.fsdp import FSDPEngine
from workers.engines.recompute import LayerBytes

TABLE = Table.random(seed=5)
PLENTY, LITTLE, TINY = 1 << 40, 0, 1 << 10
LAYERS = 2


@dataclass(frozen=True)
class Seen:
    """What one rank did: log-probs, the weights at the end, layers recomputed, whether parameters stayed gathered.

    sent: of the first step's two micro-batches, whether the rank had its rows of earlier ones' gradients by then.
    """

    outputs: FloatArray
    shards: list[Shard]
    recomputed: int
    gathered: bool
    sent: tuple[bool, ...]


def two_steps(mesh: DeviceMesh, spec: EngineSpec, free: Sequence[int] | None, total: int, hf: Path) -> Seen:
    """Forward, step, forward, step, save. After each call all parameters are this rank's rows again."""
    sent: list[bool] = []
    with pytest.MonkeyPatch.context() as patch:
        if free is not None:
            for module in (fsdp, recompute):
                patch.setattr(module, "free_bytes", lambda device: free[mesh.get_rank()])
        patch.setattr(recompute, "total_bytes", lambda device: total << 40 * mesh.get_rank())
        engine = FSDPEngine(spec, mesh, CPU)
        engine._recompute.layer_bytes = LayerBytes(1000.0, 100.0)
        rows = list(range(len(TABLE)))[mesh.get_rank() :: mesh.size()]
        batch, split = TABLE.batch(rows), [list(range(3)), list(range(3, len(rows)))]
        every = [list(range(len(rows)))]
        outputs = []
        for micro_batches in (split, every):
            outputs.append(engine.forward(batch, micro_batches, temperature=1.0).numpy())
            assert all(isinstance(p, DTensor) for p in engine._module.parameters())
            assert engine.forward_wants(batch, micro_batches) > 0
            update = Update(micro_batches, TABLE.norm())
            assert engine.update_wants(batch, update) > engine.forward_wants(batch, micro_batches)
            engine.train_step(batch, update, partial(watched, engine, sent), temperature=1.0, entropy=True)
            assert all(isinstance(p, DTensor) for p in engine._module.parameters())
        engine.save_hf(hf)
        stays = engine._stays_gathered
        return Seen(np.concatenate(outputs), export(engine), engine._recompute.num_recomputed, stays, tuple(sent[:2]))


def watched(engine: FSDPEngine, sent: list[bool], *arguments: Any) -> Any:
    """The loss; notes whether this rank holds its rows of the gradients of earlier micro-batches."""
    groups = [part._get_fsdp_state()._fsdp_param_group for part in fsdp._sharded_parts(engine._module)]
    sent.append(any(p.sharded_param.grad is not None for group in groups if group for p in group.fsdp_params))
    return LOSS(*arguments)


@dataclass(frozen=True)
class Case:
    """Settings, the free memory of each rank, and what is expected: layers recomputed, parameters gathered.

    total: memory of a device.
    """

    reshard: bool | str
    checkpointing: bool | str
    free: tuple[int, int] | None
    recomputed: int
    gathered: bool
    total: int = PLENTY


CASES = {
    "no plan on a cpu": Case("auto", "auto", None, 0, False),
    "never resharded": Case(False, False, None, 0, False),
    "plenty": Case("auto", "auto", (PLENTY, PLENTY), 0, True),
    "little": Case("auto", "auto", (LITTLE, LITTLE), LAYERS, False),
    "little on one rank": Case("auto", "auto", (PLENTY, LITTLE), LAYERS, False),
    "plenty, all recomputed": Case("auto", True, (PLENTY, PLENTY), LAYERS, True),
    "plenty, always resharded": Case(True, "auto", (PLENTY, PLENTY), 0, False),
    "gradients that are large for the device": Case("auto", "auto", (PLENTY, PLENTY), 0, True, TINY),
    "the same, and little is free": Case(True, True, (LITTLE, LITTLE), LAYERS, False, TINY),
}


@pytest.mark.parametrize("world", ["solo", "pair"])
@pytest.mark.parametrize("name", CASES)
def test_room_changes_nothing(
    name: str, world: str, qwen2: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    ranks: Solo | Pair = request.getfixturevalue(world)
    case = CASES[name]
    if world == "solo" and case.free is not None and len(set(case.free)) > 1:
        case = Case(case.reshard, case.checkpointing, (PLENTY, PLENTY), 0, True, case.total)
    spec = make_spec(qwen2, optimizer=ADAMW, wrap_min_num_params=WRAP)
    plain = ranks.run(two_steps, spec, None, PLENTY, tmp_path / "plain")
    spec = make_spec(
        qwen2,
        optimizer=ADAMW,
        wrap_min_num_params=WRAP,
        reshard_after_forward=case.reshard,
        gradient_checkpointing=case.checkpointing,
    )
    seen = ranks.run(two_steps, spec, case.free, case.total, tmp_path / "seen")
    assert {one.sent for one in plain} == {(False, False)}
    assert {one.sent for one in seen} == {(False, case.total == TINY and ranks.size > 1)}
    assert {(one.recomputed, one.gathered) for one in seen} == {(case.recomputed, case.gathered)}
    for one, other in zip(seen, plain, strict=True):
        np.testing.assert_allclose(one.outputs, other.outputs, rtol=1e-6)
    got, expected = (assemble([one.shards for one in answers]) for answers in (seen, plain))
    for parameter, value in expected.items():
        np.testing.assert_allclose(got[parameter], value, rtol=1e-5, atol=1e-7, err_msg=parameter)
