"""Megatron is FSDP: the same log-probs and, after three AdamW steps, the same weights, however the model is cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
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
    make_spec,
    one_by_one,
    train,
)

from workers.engines.base import ParallelSpec

TABLE = Table.random()
ALL = list(range(len(TABLE)))
ONE = ([ALL[:4], ALL[4:7], ALL[7:]],)
"""Micro-batches of one data-parallel rank; groups are torn apart, so shared prompts are there and not there."""
TWO = ([[9, 10], [0, 1, 4], ALL[5:7]], [[2, 3], [7, 8, 11], []])
FOUR = ([[9, 10]], [[0, 1, 4, 5, 6]], [[2, 3, 7, 8]], [[11]])
MANY = ([[0], [1, 2], [3, 4], [5], [6, 7, 8], [9, 10], [11]],)
RECOMPUTED = {"gradient_checkpointing": True}
STEPS = 3
OPTIMIZER = replace(ADAMW, eps=1e-4)
"""A larger eps: Adam divides the rounding noise of a gradient that is nearly zero by that gradient."""


@dataclass(frozen=True)
class Way:
    """One way to run the same three steps. kind, tied: of the model; spec: further fields of EngineSpec."""

    name: str
    world: str
    parallel: ParallelSpec
    kind: str = "qwen2"
    tied: bool = True
    split: Sequence[Rows] = ONE
    spec: dict[str, Any] = field(default_factory=dict)


WAYS = [
    Way("one rank", "solo", ParallelSpec()),
    Way("data parallel", "pair", ParallelSpec(), "qwen2", False, TWO),
    Way("tensor parallel", "pair", ParallelSpec(tensor=2)),
    Way("tensor parallel, untied", "pair", ParallelSpec(tensor=2), "llama", False),
    Way("tensor parallel, q and k normalised", "pair", ParallelSpec(tensor=2), "qwen3"),
    Way("sequence parallel", "pair", ParallelSpec(tensor=2, sequence=True), "qwen3", False),
    Way("pipeline", "pair", ParallelSpec(pipeline=2)),
    Way("pipeline, untied", "pair", ParallelSpec(pipeline=2), "llama", False),
    Way("interleaved pipeline", "pair", ParallelSpec(pipeline=2, virtual_pipeline=2), "deep", split=MANY),
    Way("recomputation", "pair", ParallelSpec(tensor=2, sequence=True), spec=RECOMPUTED),
    Way("pipeline, recomputation", "pair", ParallelSpec(pipeline=2), spec=RECOMPUTED),
    Way("prompts not shared", "solo", ParallelSpec(), spec={"share_prompt": False}),
    Way("tensor parallel pipeline", "quad", ParallelSpec(tensor=2, pipeline=2, sequence=True), "qwen3"),
    Way("data parallel pipeline", "quad", ParallelSpec(pipeline=2), "qwen2", True, TWO),
    Way("data parallel tensor parallel", "quad", ParallelSpec(tensor=2), "qwen2", True, TWO),
    Way("data parallel sequence parallel", "quad", ParallelSpec(tensor=2, sequence=True), "qwen3", False, TWO),
    Way("data parallel interleaved", "quad", ParallelSpec(pipeline=2, virtual_pipeline=2), "deep", True, TWO),
    Way("long pipeline", "quad", ParallelSpec(pipeline=4), "deep", False, MANY),
    Way("experts", "solo", ParallelSpec(), "qwen3_moe", False),
    Way("experts, named otherwise", "solo", ParallelSpec(), "mixtral", False),
    Way("experts, data parallel", "pair", ParallelSpec(), "qwen3_moe", False, TWO),
    Way("expert parallel", "pair", ParallelSpec(expert=2), "qwen3_moe", False, TWO),
    Way("expert parallel, named otherwise", "pair", ParallelSpec(expert=2), "mixtral", True, TWO),
    Way("expert parallel, recomputation", "pair", ParallelSpec(expert=2), "mixtral", False, TWO, RECOMPUTED),
    Way("experts, tensor parallel", "pair", ParallelSpec(tensor=2, sequence=True), "qwen3_moe", False),
    Way("experts, some layers without", "pair", ParallelSpec(expert=2), "mixed", False, TWO),
    Way("expert parallel pipeline", "quad", ParallelSpec(pipeline=2, expert=2), "qwen3_moe", False, TWO),
    Way("interleaved expert parallel", "quad", ParallelSpec(1, 2, 2, expert=2), "mixed", False, TWO),
    Way("experts, tensor and data parallel", "quad", ParallelSpec(tensor=2, sequence=True), "mixtral", False, TWO),
    Way("expert and data parallel", "quad", ParallelSpec(expert=2), "qwen3_moe", False, FOUR),
]


def outputs(answers: Sequence[Answer]) -> dict[int, FloatArray]:
    """Log-probs of every row, each from the one rank that holds them."""
    rows = [row for answer in answers for row in answer.outputs]
    assert sorted(rows) == ALL
    return {row: values for answer in answers for row, values in answer.outputs.items()}


@pytest.fixture(scope="module")
def fsdp(model_path: Callable[[str, bool], Path], solo: Solo) -> Callable[[str, bool], Answer]:
    """(kind, tied) -> what the FSDP engine does on one rank."""
    known: dict[tuple[str, bool], Answer] = {}

    def answer(kind: str, tied: bool) -> Answer:
        if (kind, tied) not in known:
            job = Job(make_spec(model_path(kind, tied), optimizer=OPTIMIZER), TABLE, ONE, steps=STEPS)
            (known[kind, tied],) = solo.run(train, job)
        return known[kind, tied]

    return answer


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_megatron_does_what_fsdp_does(
    way: Way,
    model_path: Callable[[str, bool], Path],
    fsdp: Callable[[str, bool], Answer],
    request: pytest.FixtureRequest,
) -> None:
    world: Solo | Pair | Quad = request.getfixturevalue(way.world)
    spec = make_spec(model_path(way.kind, way.tied), optimizer=OPTIMIZER, strategy="megatron", parallel=way.parallel)
    answers = world.run(train, Job(replace(spec, **way.spec), TABLE, tuple(way.split), steps=STEPS))
    expected = fsdp(way.kind, way.tied)
    for row, values in outputs(answers).items():
        np.testing.assert_allclose(values, expected.outputs[row], rtol=0, atol=1e-5)
    assert all(answer.results == answers[0].results for answer in answers), "every rank gets the same answer"
    for result, other in zip(answers[0].results, expected.results, strict=True):
        assert result.grad_norm == pytest.approx(other.grad_norm, rel=1e-5)
        assert result.metrics == pytest.approx(other.metrics, rel=1e-4, abs=1e-5)
        assert (result.lr, result.skipped) == (other.lr, False)
    weights = assemble([answer.shards for answer in answers])
    wanted = one_by_one(assemble([expected.shards]), way.kind)
    assert weights.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(weights[name], value, rtol=0, atol=1e-6, err_msg=name)
