"""Predicted memory against arithmetic done here by hand, and against what real runs were measured to take."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from plan_world import (
    ACTOR,
    BASE,
    GIB,
    H200,
    MEGATRON,
    QWEN_1_5B,
    QWEN_7B,
    ROLLOUT,
    W1,
    W1_7B,
    config,
    devices,
    language,
    phases,
    rank,
)
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from trainer.batching import Limits, plan_batch
from trainer.plan.batches import Budget, budget_of
from trainer.plan.layout import layout_of
from trainer.plan.memory import CATEGORIES, PHASES
from trainer.plan.predict import Models, device_uses
from trainer.plan.replica import cache_bytes_per_token, replica_terms
from trainer.plan.training import activation_bytes, engine_terms

TIED = 1_543_714_304
UNTIED = 7_615_616_512
GRADIENTS = 4


@pytest.mark.parametrize(
    "hf",
    [
        QWEN_1_5B,
        QWEN_7B,
        Qwen3Config(num_hidden_layers=2, hidden_size=1024, intermediate_size=3072, num_key_value_heads=8),
        LlamaConfig(num_hidden_layers=2, num_key_value_heads=8),
        Qwen3MoeConfig(num_hidden_layers=2, num_experts=8),
        MixtralConfig(num_hidden_layers=2),
        Phi3Config(num_hidden_layers=2, pad_token_id=0),  # not in a table
    ],
    ids=lambda hf: hf.model_type,
)
def test_parameters_are_counted_exactly(hf: Any) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf)
    layers = [sum(p.numel() for p in layer.parameters()) for layer in model.base_model.layers]
    for head in ("logprobs", "values"):
        layout = layout_of(hf, head)
        body = sum(p.numel() for p in model.base_model.parameters()) + hf.hidden_size
        assert layout.total == (sum(p.numel() for p in model.parameters()) if head == "logprobs" else body)
        assert layout.in_layers == sum(layers) and layout.largest_layer == max(layers)
        assert layout.output == (hf.vocab_size * hf.hidden_size if head == "logprobs" else 0)


def test_parts_of_a_model_add_up_to_it() -> None:
    layout = language(QWEN_7B)
    norms = 28 * 2 * 3584 + 3584
    for tensor, pipeline in ((1, 1), (2, 1), (4, 1), (1, 2), (2, 4)):
        held = sum(sum(layout.held(tensor=tensor, pipeline=pipeline, stage=s)) for s in range(pipeline))
        assert held * tensor == UNTIED + (tensor - 1) * norms
    tied = language(QWEN_1_5B)
    table = 151_936 * 1536
    assert sum(tied.held()) == TIED
    assert sum(sum(tied.held(pipeline=2, stage=s)) for s in (0, 1)) == TIED + table, "the last stage has a copy"
    moe = layout_of(Qwen3MoeConfig(num_hidden_layers=2, num_experts=8), "logprobs")
    experts = 2 * 8 * 3 * 768 * 2048
    assert sum(moe.held(expert=4)) == moe.total - experts * 3 // 4


def test_activations_of_a_layer() -> None:
    hidden, query, kv, intermediate = 1536, 1536, 256, 8960
    into_products = hidden + query + hidden + intermediate  # of q/k/v, of o, of gate and up, of down
    into_attention, into_norms, into_silu = query + 2 * kv, 2 * hidden, 2 * intermediate
    numbers = into_products + into_attention + into_norms + into_silu
    layer = activation_bytes(language(QWEN_1_5B), 2)
    assert layer.whole == 2 * numbers + 4 * 12
    assert layer.input_only == 2 * hidden
    half = activation_bytes(language(QWEN_1_5B), 2, tensor=2, sequence=True)
    assert half.whole == layer.whole / 2 and half.input_only == hidden
    uncut = activation_bytes(language(QWEN_1_5B), 2, tensor=2, sequence=False)
    assert uncut.whole == half.whole + 2 * 4 * hidden / 2 and uncut.input_only == 2 * hidden


def test_activations_of_experts_are_of_those_that_a_token_goes_to() -> None:
    hf = Qwen3MoeConfig(num_hidden_layers=2, num_experts=64, num_experts_per_tok=4, moe_intermediate_size=768)
    one = activation_bytes(layout_of(hf, "logprobs"), 2).whole
    hf.num_experts_per_tok = 5
    assert activation_bytes(layout_of(hf, "logprobs"), 2).whole - one == 2 * (3 * 768 + 2 * 2048)


@pytest.mark.parametrize(("hf", "total"), [(QWEN_1_5B, TIED), (QWEN_7B, UNTIED)])
@pytest.mark.parametrize("ranks", [1, 8])
def test_fsdp_shards_everything_but_gradients_that_add_up(hf: Qwen2Config, total: int, ranks: int) -> None:
    cfg = config(
        W1, f"trainer.n_gpus_per_node={ranks}", "data.train_batch_size=512", f"{ACTOR}.ppo_mini_batch_size=512"
    )
    terms = engine_terms(cfg, rank(cfg), language(hf), None)
    assert terms.weights == 4 * total / ranks and terms.optimizer == 8 * total / ranks
    assert terms.gradients == GRADIENTS * total, "over several micro-batches they are kept whole"
    tight, roomy = (engine_terms(cfg, rank(cfg), language(hf), 4 * total * each).gradients for each in (9, 10))
    assert (tight, roomy) == (GRADIENTS * total / ranks, GRADIENTS * total), "up to a tenth of the device"
    one = config(W1, f"trainer.n_gpus_per_node={ranks}", f"{ACTOR}.ppo_max_token_len_per_gpu=10000000")
    assert engine_terms(one, rank(one), language(hf), None).gradients == GRADIENTS * total / ranks
    reference = engine_terms(cfg, rank(cfg, "ref"), language(hf), None)
    assert reference.weights == 2 * total / ranks and reference.optimizer == reference.gradients == 0
    half = config(W1, f"{ACTOR}.fsdp_config.model_dtype=bf16")
    assert engine_terms(half, rank(half), language(hf), None).weights == 2 * total


def test_megatron_holds_its_part_and_divides_the_optimizer() -> None:
    cut = [MEGATRON, f"{ACTOR}.megatron.tensor_model_parallel_size=2", "trainer.n_gpus_per_node=8"]
    cfg = config(W1_7B, *cut)
    layout = language(QWEN_7B)
    terms, part = engine_terms(cfg, rank(cfg), layout, None), sum(layout.held(tensor=2))
    assert terms.weights == 2 * part and terms.gradients == 4 * part
    assert terms.optimizer == 12 * part / 4, "bfloat16 weights, float32 masters and moments, over dp 4"
    same = config(W1_7B, *cut, f"{ACTOR}.megatron.dtype=float32")
    assert engine_terms(same, rank(same), layout, None).optimizer == 8 * part / 4, "the weights are the masters"
    staged = config(W1_7B, *cut, f"{ACTOR}.megatron.pipeline_model_parallel_size=2")
    first, last = (engine_terms(staged, rank(staged, number=n), layout, None) for n in (0, 7))
    assert first.num_layers == last.num_layers == 14
    assert first.forward.logits == 0 < last.forward.logits
    assert first.update is not None and first.update.in_flight == 2 * first.update.tokens


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize(
    ("prompts", "budget", "most"), [(8, 33_792, None), (8, 3000, None), (8, 10_000, 5), (2, 10**6, None)]
)
def test_micro_batches_are_those_of_the_planner(share: bool, prompts: int, budget: int, most: int | None) -> None:
    """The largest one has no fewer rows than planned, and not many more."""
    group = np.repeat(np.arange(prompts), 8)
    limits = Limits(budget, most, share)
    plan = plan_batch(
        np.full(len(group), 256),
        np.full(len(group), 1024),
        group,
        groups_per_minibatch=prompts,
        num_ranks=2,
        limits=limits,
    )
    budgeted = Budget(budget, most, 256, 1024, 8, share)
    micro = budgeted.micro(len(group) // 2)
    planned = [rows for ranks in plan.minibatches[0].ranks for rows in ranks]
    rows = max(len(set(group[list(each)])) * 256 + len(each) * 1024 if share else len(each) * 1280 for each in planned)
    assert rows <= micro.tokens <= max(rows * 1.15, 256 + 1024)
    assert micro.number <= plan.minibatches[0].num_micro_batches <= micro.number + 1
    assert micro.tokens <= budget


def test_budgets_are_those_of_the_role() -> None:
    cfg = config(
        W1, "actor_rollout_ref.ref.log_prob_max_token_len_per_gpu=5000", f"{ACTOR}.ppo_micro_batch_size_per_gpu=3"
    )
    assert budget_of(cfg, rank(cfg).role).sequences == 3
    reference = budget_of(cfg, rank(cfg, "ref").role)
    assert reference.tokens == 5000 and reference.sequences is None


def test_the_cache_is_what_the_share_leaves() -> None:
    cfg = config(W1_7B)
    layout = language(QWEN_7B)
    terms = replica_terms(cfg, layout, H200)
    assert cache_bytes_per_token(cfg.actor_rollout_ref.rollout, layout) == 2 * 28 * 4 * 128 * 2
    assert terms.weights == 2 * UNTIED
    assert terms.weights + terms.kv_cache + terms.activations + terms.context == int(0.25 * H200)
    assert terms.cache_tokens == terms.kv_cache // 57_344
    assert terms.concurrency == pytest.approx(terms.kv_cache / 57_344 / 768, rel=1e-4)
    given = replica_terms(config(W1_7B, f"{ROLLOUT}.kv_cache_gb=2"), layout, H200)
    assert given.kv_cache == 2 * GIB
    half = replica_terms(
        config(W1_7B, f"{ROLLOUT}.tensor_model_parallel_size=2", "trainer.n_gpus_per_node=2"), layout, H200
    )
    assert half.weights < 1.001 * UNTIED and half.concurrency > 2 * terms.concurrency
    small = replica_terms(config(W1_7B, f"{ROLLOUT}.engine_kwargs.vllm.kv_cache_dtype=fp8"), layout, H200)
    assert small.concurrency == pytest.approx(2 * terms.concurrency, rel=1e-3)
    eager = replica_terms(config(W1_7B, f"{ROLLOUT}.enforce_eager=true"), layout, H200)
    assert eager.graphs == 0 < terms.graphs


SHORT_7B = ["data.train_batch_size=8", f"{ACTOR}.ppo_mini_batch_size=8", f"{ROLLOUT}.max_num_seqs=64"]
SHORT_MEGATRON = [
    MEGATRON,
    "data.train_batch_size=16",
    f"{ACTOR}.ppo_mini_batch_size=16",
    f"{ROLLOUT}.max_num_seqs=128",
    f"{ROLLOUT}.gpu_memory_utilization=0.6",
]
TWO = ["trainer.n_gpus_per_node=2"]
TWO_MEGATRON = [*TWO, MEGATRON, f"{ACTOR}.megatron.tensor_model_parallel_size=2"]
TWO_7B = [
    *W1_7B,
    *TWO,
    "data.train_batch_size=16",
    f"{ACTOR}.ppo_mini_batch_size=16",
    f"{ROLLOUT}.max_num_seqs=128",
]
MEASURED = {  # docs/dry_run.md, GiB
    "W1": (QWEN_1_5B, [], {"generate": 80.9, "annotate": 28.8, "update": 114.7, "sync": 80.0}),
    "7B": (QWEN_7B, [*W1_7B, *SHORT_7B], {"generate": 125.2, "annotate": 111.1, "update": 139.5, "sync": 125.2}),
    "W1 on two": (QWEN_1_5B, TWO, {"generate": 70.0, "annotate": 18.9, "update": 101.0, "sync": 69.6}),
    "tp 2": (QWEN_1_5B, TWO_MEGATRON, {"generate": 72.2, "annotate": 19.5, "update": 58.6, "sync": 71.5}),
    "7B on two": (QWEN_7B, TWO_7B, {"generate": 87.8, "annotate": 62.0, "update": 134.8, "sync": 87.8}),
    "Megatron": (QWEN_1_5B, SHORT_MEGATRON, {"generate": 111.7, "annotate": 32.5, "update": 108.3, "sync": 111.2}),
}


@pytest.mark.parametrize("name", MEASURED)
def test_predictions_are_within_12_percent_of_what_was_measured(name: str) -> None:
    hf, overrides, measured = MEASURED[name]
    found = phases(config(W1, *overrides), hf)
    for phase, gib in measured.items():
        assert found[phase].total / GIB == pytest.approx(gib, rel=0.12), phase


def test_what_does_not_fit_waits_in_host_memory_or_is_recomputed() -> None:
    seven = phases(config(W1_7B), QWEN_7B)
    assert seven["update"].offloaded == {"ref_weights": 2 * UNTIED}
    assert seven["update"].recomputed and seven["update"].total < H200
    assert seven["annotate"].offloaded == {}
    roomy = phases(config(W1), QWEN_1_5B)
    assert roomy["update"].recomputed == 0 and not any(found.offloaded for found in roomy.values())
    always = phases(config(W1, f"{ACTOR}.fsdp_config.optimizer_offload=true"), QWEN_1_5B)
    assert always["generate"].offloaded == {"actor_optimizer": 8 * TIED}
    assert always["update"].offloaded == {}
    forced = phases(config(W1, "actor_rollout_ref.model.enable_gradient_checkpointing=true"), QWEN_1_5B)
    assert forced["update"].recomputed == 28 and forced["update"].total < roomy["update"].total / 2
    awake = phases(config(W1, f"{ROLLOUT}.free_cache_engine=false"), QWEN_1_5B)
    assert awake["update"].terms["kv_cache"] == roomy["generate"].terms["kv_cache"] > 0


def test_terms_are_all_there_and_add_up() -> None:
    found = phases(config(W1), QWEN_1_5B)
    assert tuple(found) == PHASES
    for phase in found.values():
        assert tuple(phase.terms) == CATEGORIES and phase.total == sum(phase.terms.values())
        assert 0 < phase.firm <= phase.floor <= phase.total
    assert found["update"].terms["gradients"] == 4 * TIED
    assert found["update"].terms["optimizer"] == 8 * TIED
    assert found["update"].terms["weights"] == (4 + 2) * TIED
    assert found["generate"].terms["weights"] == (4 + 2 + 2) * TIED
    assert found["asleep"].terms["kv_cache"] == found["asleep"].terms["gradients"] == 0
    rows = 33_792
    assert found["update"].terms["activations"] >= 28 * rows * activation_bytes(language(QWEN_1_5B), 2).whole
    chunk = 2 << 30
    head = 151_936 * 1536
    buffers = chunk + chunk // 2 + 6 * head + 2 * TIED  # logits, their gradient, the weight's, all gathered
    assert found["update"].terms["buffers"] - buffers == pytest.approx(1 << 30, rel=0.2), "two buckets of the sync"


def test_devices_that_do_the_same_are_told_together() -> None:
    apart = [f"{ACTOR}.device_mapping=0-3", f"{ROLLOUT}.device_mapping=4-7", "trainer.n_gpus_per_node=8"]
    found = devices(config(W1, *apart), QWEN_1_5B)
    assert [each.devices for each in found] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert [each.roles for each in found] == [("actor", "ref"), ("rollout",)]
    training, generating = (dict(each.phases) for each in found)
    assert "generate" not in training and "update" not in generating
    assert training["sync"].terms["kv_cache"] == 0, "and no buckets: weights go through host memory"
    cache = generating["generate"].terms["kv_cache"]
    assert generating["asleep"].terms["kv_cache"] == cache > 0, "it sleeps for nobody"
    told_to = dict(devices(config(W1, *apart, f"{ROLLOUT}.sleep_level=2"), QWEN_1_5B)[1].phases)
    assert told_to["asleep"].terms["kv_cache"] == 0
    cut = [MEGATRON, f"{ACTOR}.megatron.pipeline_model_parallel_size=2", "trainer.n_gpus_per_node=2"]
    stages = devices(config(W1, *cut), QWEN_1_5B)
    assert [each.devices for each in stages] == [(0,), (1,)]


def test_a_critic_is_a_body_with_a_scalar_head() -> None:
    cfg = config(W1, "critic.enable=true")
    models = Models(language(QWEN_1_5B), layout_of(QWEN_1_5B, "values"))
    (use,) = device_uses(cfg, models, H200, annotates=("ref", "critic")).values()
    critic = next(tenant for tenant in use.tenants if tenant.name == "critic")
    assert critic.terms.forward.logits == 0 and critic.terms.weights == 4 * (TIED + 1536)
    assert phases(cfg, QWEN_1_5B)["asleep"].total > phases(config(W1), QWEN_1_5B)["asleep"].total


def test_without_a_size_there_is_always_room() -> None:
    found = phases(config(BASE), QWEN_7B, None)
    assert found["update"].recomputed == 0 and not any(each.offloaded for each in found.values())
    assert found["generate"].terms["kv_cache"] == 0
