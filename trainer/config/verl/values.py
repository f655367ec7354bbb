"""Keys that live here under verl's name, with values that are called otherwise, or mean nothing, here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from trainer.config.verl import decisions
from trainer.config.verl.rules import Decide


class Value(NamedTuple):
    """What a value is called here, and why."""

    new: Any
    why: str = ""


_ACTOR = "actor_rollout_ref.actor"
_ROLLOUT = "actor_rollout_ref.rollout"
_FSDP2 = Value("fsdp", "FSDP here is FSDP2")
_ENGINE = Value("vllm", "generation is vLLM's here, whatever engine it was")
_FROM_TRAINER = Value("dummy", "the first weights come from the trainer")
_MASTER = {"bfloat16": Value("bf16"), "float32": Value("fp32")}
_COMPUTE = {"bf16": Value("bfloat16"), "fp32": Value("float32")}
_WARM_UP = {None: Value(-1, "lr_warmup_steps_ratio says it")}
_SECTIONS = {
    "model_dtype": (f"{_ACTOR}.fsdp_config", "critic.fsdp", f"{_ACTOR}.megatron"),
    "dtype": tuple(
        f"{role}.{engine}"
        for role in (_ACTOR, "actor_rollout_ref.ref", "critic")
        for engine in ("fsdp" if role == "critic" else "fsdp_config", "megatron")
    ),
}

VALUES: Mapping[str, Mapping[Any, Value]] = {
    **{f"{role}.strategy": {"fsdp2": _FSDP2} for role in (_ACTOR, "actor_rollout_ref.ref", "critic")},
    f"{_ACTOR}.policy_loss.loss_mode": {"vanilla": Value("ppo"), "geo_mean": Value("gmpo")},
    **{f"{section}.model_dtype": _MASTER for section in _SECTIONS["model_dtype"]},
    **{f"{section}.dtype": _COMPUTE for section in _SECTIONS["dtype"]},
    **{f"{role}.optim.lr_warmup_steps": _WARM_UP for role in (_ACTOR, "critic")},
    "actor_rollout_ref.model.tokenizer_path": {
        None: Value("${actor_rollout_ref.model.path}", "the tokenizer lies beside the model")
    },
    f"{_ROLLOUT}.name": dict.fromkeys(("sglang", "sglang_async", "trtllm", "hf"), _ENGINE),
    f"{_ROLLOUT}.load_format": {
        **dict.fromkeys(("dummy_dtensor", "dummy_hf", "dummy_megatron", "dtensor", "megatron", "hf"), _FROM_TRAINER),
        "safetensors": Value("auto"),
    },
    f"{_ROLLOUT}.top_k": {0: Value(-1, "all tokens")},
    f"{_ROLLOUT}.val_kwargs.top_k": {0: Value(-1, "all tokens")},
    "data.seed": {None: Value(1)},
    "algorithm.adv_estimator": {"rloo_vectorized": Value("rloo"), "grpo_vectorized": Value("grpo")},
    "algorithm.filter_groups.metric": dict.fromkeys(
        ("score", "seq_reward", "seq_final_reward"), Value(None, "the reward itself")
    ),
    "reward.custom_reward_function.name": {None: Value("compute_score")},
    "trainer.resume_from_path": {"false": Value(None)},
}
"""Key -> value in verl, as `plain` writes it -> value here."""

DECISIONS: Mapping[str, Decide] = {
    f"{_ACTOR}.clip_ratio_low": decisions.cap_clip,
    "algorithm.filter_groups.max_num_gen_batches": decisions.no_limit,
    "trainer.logger": decisions.loggers,
    "trainer.test_freq": decisions.steps_between,
}
"""Key -> what finds out whether its value is called otherwise here."""
