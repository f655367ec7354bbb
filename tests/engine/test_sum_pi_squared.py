"""The sum of the squared probabilities at each response token: the same from every engine, however the model is cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_harness import FloatArray, Pair, Quad, Rows, Solo, Table, build, data_rank, make_spec
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoModelForCausalLM

from workers.engines.base import EngineSpec, ParallelSpec

TABLE = Table.random(seed=3)
ALL = list(range(len(TABLE)))
ONE = ([ALL[:4], ALL[4:7], ALL[7:]],)
TWO = ([[9, 10], [0, 1, 4], ALL[5:7]], [[2, 3], [7, 8, 11], []])
TEMPERATURE = 0.7
WHOLE = ParallelSpec()


@dataclass(frozen=True)
class Way:
    """One way to compute them."""

    name: str
    world: str
    strategy: str = "megatron"
    parallel: ParallelSpec = WHOLE
    split: Sequence[Rows] = ONE


WAYS = [
    Way("FSDP", "solo", "fsdp"),
    Way("FSDP, two ranks", "pair", "fsdp", split=TWO),
    Way("Megatron", "solo"),
    Way("tensor parallel", "pair", parallel=ParallelSpec(tensor=2)),
    Way("pipeline", "pair", parallel=ParallelSpec(pipeline=2)),
    Way("tensor parallel pipeline", "quad", parallel=ParallelSpec(tensor=2, pipeline=2, sequence=True)),
]


def forward(mesh: DeviceMesh, spec: EngineSpec, split: Sequence[Rows]) -> dict[int, FloatArray]:
    """What this rank holds, by row."""
    engine = build(mesh, spec)
    share = mesh.get_rank() if spec.strategy == "fsdp" else data_rank(mesh, spec)
    rows = [row for micro in split[share] for row in micro]
    batch, place = TABLE.batch(rows), {row: i for i, row in enumerate(rows)}
    local = [[place[row] for row in micro] for micro in split[share]]
    flat = engine.forward(batch, local, temperature=TEMPERATURE, output="sum_pi_squared").numpy()
    return {row: flat[batch.token_index([i])] for row, i in place.items() if engine.holds_outputs}


def formula(path: Path) -> list[FloatArray]:
    """Hugging Face's own model in float64, one sequence at a time."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, attn_implementation="eager")
    found = []
    for prompt, response in zip(TABLE.prompts, TABLE.responses, strict=True):
        ids = torch.from_numpy(np.concatenate([prompt, response])).long()
        with torch.no_grad():
            logits = model(input_ids=ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
        found.append((logits / TEMPERATURE).softmax(-1).square().sum(-1)[: len(response)].numpy())
    return found


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_fsdp_and_megatron_compute_the_formula(
    way: Way, model_path: Callable[[str, bool], Path], request: pytest.FixtureRequest
) -> None:
    path = model_path("qwen3", False)
    world: Solo | Pair | Quad = request.getfixturevalue(way.world)
    spec = make_spec(path, optimizer=None, strategy=way.strategy, parallel=way.parallel)
    answers = world.run(forward, spec, way.split)
    assert sorted(row for answer in answers for row in answer) == ALL, "each row from the one rank that holds it"
    expected = formula(path)
    assert max(values.max() for values in expected if len(values)) > 1.5 / 37, "not a uniform distribution"
    for answer in answers:
        for row, values in answer.items():
            np.testing.assert_allclose(values, expected[row], rtol=1e-5)
