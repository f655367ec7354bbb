"""Shapes and configurations that the tests of the plan share."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import Qwen2Config

from trainer.config.load import load_config
from trainer.config.roles import training_roles
from trainer.config.schema import Config
from trainer.plan.layout import Layout, layout_of
from trainer.plan.memory import PhaseMemory
from trainer.plan.places import RankPlace, training_places
from trainer.plan.predict import DeviceMemory, Models, predict_devices

GIB = 1 << 30
H200 = int(139.8 * GIB)
ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
MEGATRON = f"{ACTOR}.strategy=megatron"

QWEN_1_5B = Qwen2Config(
    hidden_size=1536,
    intermediate_size=8960,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
    vocab_size=151_936,
    tie_word_embeddings=True,
)
QWEN_7B = Qwen2Config(
    hidden_size=3584,
    intermediate_size=18_944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    vocab_size=152_064,
    tie_word_embeddings=False,
)
BASE = [
    "data.train_files=train.jsonl",
    "actor_rollout_ref.model.path=org/model",
    "algorithm.adv_estimator=grpo",
    f"{ACTOR}.use_kl_loss=true",
    "trainer.n_gpus_per_node=1",
]
W1 = [  # as docs/benchmarks.md has it
    *BASE,
    "data.max_prompt_length=256",
    "data.max_response_length=1024",
    "data.train_batch_size=64",
    f"{ACTOR}.ppo_mini_batch_size=64",
    f"{ACTOR}.ppo_max_token_len_per_gpu=33792",
    f"{ROLLOUT}.n=8",
    f"{ROLLOUT}.max_num_seqs=512",
    f"{ROLLOUT}.gpu_memory_utilization=0.4",
]
W1_7B = [
    *W1,
    "data.max_response_length=512",
    "data.train_batch_size=32",
    f"{ACTOR}.ppo_mini_batch_size=32",
    f"{ACTOR}.ppo_max_token_len_per_gpu=8704",
    f"{ROLLOUT}.max_num_seqs=256",
    f"{ROLLOUT}.gpu_memory_utilization=0.25",
]


def config(base: Sequence[str], *overrides: str) -> Config:
    """Typed; later overrides win."""
    return load_config([*base, *overrides])


def language(hf: Qwen2Config) -> Layout:
    """The layout of a language model."""
    return layout_of(hf, "logprobs")


def rank(cfg: Config, role: str = "actor", number: int = 0) -> RankPlace:
    """One training rank of a role."""
    assert role in [each.name for each in training_roles(cfg)]
    return [place for place in training_places(cfg) if place.role.name == role][number]


def devices(cfg: Config, hf: Qwen2Config, total: int | None = H200) -> tuple[DeviceMemory, ...]:
    """Predictions where the reference alone has a pass before the update."""
    critic = layout_of(hf, "values") if cfg.use_critic else None
    return predict_devices(cfg, Models(language(hf), critic), total, annotates=("ref",))


def phases(cfg: Config, hf: Qwen2Config, total: int | None = H200) -> dict[str, PhaseMemory]:
    """Of the first kind of device."""
    return dict(devices(cfg, hf, total)[0].phases)
