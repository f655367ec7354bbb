"""The packed model against Hugging Face's own, one sequence at a time, and the optimizer against torch's AdamW."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_harness import (
    ADAMW,
    CPU,
    LOSS,
    FloatArray,
    Job,
    Solo,
    Table,
    assemble,
    make_spec,
    relative_error,
    train,
    worst_error,
)
from tensordict import TensorDict
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from workers.batch import MicroBatch, Segments
from workers.engines.attention import prepare
from workers.engines.models import decoder_layers, load_model

TABLE = Table.random(seed=7)
ALL = list(range(len(TABLE)))
TEMPERATURE = 0.8
ModelPath = Callable[[str, bool], Path]


def plain_model(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")


def plain_logprobs(model: PreTrainedModel, table: Table, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of all response tokens: every sequence by itself, the textbook formulas."""
    logprobs, entropies = [], []
    for prompt, response in zip(table.prompts, table.responses, strict=True):
        ids = torch.from_numpy(np.concatenate([prompt, response])).long()
        logits = model(input_ids=ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1] / temperature
        logp = torch.log_softmax(logits, dim=-1)[: len(response)]
        logprobs.append(logp.gather(-1, ids[len(prompt) :, None]).squeeze(-1))
        entropies.append(-(logp.exp() * logp).sum(-1))
    return torch.cat(logprobs), torch.cat(entropies)


def gradients(module: torch.nn.Module, prefix: str = "") -> dict[str, FloatArray]:
    return {
        name.removeprefix(prefix): parameter.grad.numpy()
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ["qwen2", "llama", "qwen3"])
def test_packed_logprobs_and_gradients_are_those_of_hugging_face(kind: str, tied: bool, model_path: ModelPath) -> None:
    path = model_path(kind, tied)
    ours = load_model(make_spec(path))
    batch = TABLE.batch(ALL)
    micro = batch.micro_batch(ALL, TABLE.norm(), share_prompt=True, device=CPU)
    layout = prepare(micro.segments, torch.float32)
    logprobs, entropies = ours(micro, layout, TEMPERATURE, True)
    theirs = plain_model(path)
    expected, expected_entropies = plain_logprobs(theirs, TABLE, TEMPERATURE)
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(entropies, expected_entropies, rtol=0, atol=1e-5)
    weights = torch.randn(2, len(expected), generator=torch.Generator().manual_seed(1))
    (logprobs @ weights[0] + entropies @ weights[1]).backward()
    (expected @ weights[0] + expected_entropies @ weights[1]).backward()
    assert relative_error(gradients(ours, "model."), gradients(theirs)) < 1e-5
    assert worst_error(gradients(ours, "model."), gradients(theirs)) < 1e-5


def test_layers_are_found(model_path: ModelPath) -> None:
    for kind in ("qwen2", "llama", "qwen3"):
        layers = decoder_layers(load_model(make_spec(model_path(kind, True))))
        assert [type(layer).__name__ for layer in layers] == [f"{kind.capitalize()}DecoderLayer"] * 2


def test_the_configuration_can_be_overridden(qwen2: Path) -> None:
    spec = make_spec(qwen2, override_config={"rope_parameters": {"rope_type": "default", "rope_theta": 55.0}})
    assert load_model(spec).model.config.rope_parameters["rope_theta"] == 55.0


def as_micro_batch(table: Table) -> MicroBatch:
    """What the loss reads of a micro-batch that holds the whole table."""
    lengths = torch.tensor([len(r) for r in table.responses])
    total = int(lengths.sum())
    columns = {name: torch.from_numpy(np.concatenate(values)) for name, values in table.columns.items()}
    none = torch.zeros(0, dtype=torch.int64)
    return MicroBatch(
        input_ids=none,
        position_ids=none,
        segments=Segments(none, (), none, ()),
        predictor=none,
        targets=none,
        sequence=torch.repeat_interleave(torch.arange(len(table)), lengths),
        tokens=TensorDict(columns, [total]),
        num_sequences=len(table),
        norm=table.norm(),
    )


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_steps_equal_those_of_a_plain_loop(kind: str, model_path: ModelPath, solo: Solo) -> None:
    """Two AdamW steps with clipping and warm-up: Hugging Face model, torch.optim.AdamW, no packing, no sharding."""
    path = model_path(kind, False)
    optimizer_spec = replace(ADAMW, warmup_steps=4)
    job = Job(make_spec(path, optimizer=optimizer_spec), TABLE, ([ALL[:4], ALL[4:]],), steps=2, temperature=TEMPERATURE)
    (answer,) = solo.run(train, job)
    model = plain_model(path).train()
    before = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    decayed = [p for n, p in model.named_parameters() if "norm" not in n and "bias" not in n]
    others = [p for n, p in model.named_parameters() if "norm" in n or "bias" in n]
    groups = [{"params": decayed, "weight_decay": ADAMW.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=ADAMW.betas, eps=ADAMW.eps)
    for step in range(2):
        logprobs, entropies = plain_logprobs(model, TABLE, TEMPERATURE)
        loss, _ = LOSS(logprobs, entropies, as_micro_batch(TABLE))
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), ADAMW.clip_grad)
        for group in optimizer.param_groups:
            group["lr"] = ADAMW.lr * (step + 1) / 4
        optimizer.step()
        assert answer.results[step].grad_norm == pytest.approx(float(norm), rel=1e-5)
        assert answer.results[step].metrics["actor/loss"] == pytest.approx(float(loss.detach()), rel=1e-5, abs=1e-6)
        assert answer.results[step].lr == pytest.approx(ADAMW.lr * (step + 1) / 4)
    moved = {name: p.detach().numpy() - before[name] for name, p in model.named_parameters()}
    ours = {name: value - before[name] for name, value in assemble([answer.shards]).items()}
    assert relative_error(ours, moved) < 1e-3  # of the change: the weights themselves agree to 1e-6
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(ours[name] + before[name], parameter.detach().numpy(), atol=1e-6, err_msg=name)
