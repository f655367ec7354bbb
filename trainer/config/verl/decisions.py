"""What takes other keys, or arithmetic, to translate. Each function is the `decide` of a row of the table.

They run once the configuration is composed; `look` gives the value of today's keys in it.
"""

from __future__ import annotations

from typing import Any

from trainer.config.errors import show
from trainer.config.verl.rules import NOTHING, Kind, Look, Verdict

LOSS_PARAMS = {
    "tau_pos": "sapo",
    "tau_neg": "sapo",
    "clip_cov_ratio": "clip_cov",
    "clip_cov_lb": "clip_cov",
    "clip_cov_ub": "clip_cov",
    "kl_cov_ratio": "kl_cov",
    "ppo_kl_coef": "kl_cov",
    "dro_beta": "dro",
}
"""Parameters that stand beside loss_mode in verl, and the loss that takes each."""

MUON = (
    "momentum",
    "nesterov",
    "split_qkv",
    "scale_mode",
    "coefficient_type",
    "num_ns_steps",
    "tp_mode",
    "fp32_matmul_prec",
    "extra_scale_factor",
    "scalar_optimizer",
    "match_adamw_update_rms",
)
"""Ends of the names of Muon's settings."""

_ACTOR = "actor_rollout_ref.actor"
_ROLLOUT = "actor_rollout_ref.rollout"
_PARTS = ("model", "optimizer", "extra")


def _sets(key: str, value: Any, why: str = "") -> Verdict:
    return Verdict(Kind.ALIAS, why, {key: value}, forced=True)


def _no_effect(why: str = NOTHING) -> Verdict:
    return Verdict(Kind.IGNORED, why)


def _refuse(why: str, remedy: str) -> Verdict:
    return Verdict(Kind.REFUSED, why, remedy=remedy)


def _parent(key: str, levels: int = 1) -> str:
    return key.rsplit(".", levels)[0]


def offload_policy(key: str, value: Any, look: Look) -> Verdict:
    """FSDP2's own offloading: everything on the host."""
    if value is not True:
        return _no_effect()
    names = ["param_offload"] if ".ref." in key else ["param_offload", "optimizer_offload"]
    return Verdict(Kind.ALIAS, "", {f"{_parent(key)}.{name}": True for name in names}, forced=True)


def determinism(key: str, value: Any, look: Look) -> Verdict:
    """Of one role there, of the run here."""
    return _sets("trainer.full_determinism", True, "of the whole run") if value is True else _no_effect()


def torch_compile(key: str, value: Any, look: Look) -> Verdict:
    """Only switching it off says something: it is on."""
    if value is not False:
        return _no_effect("compiling is on unless actor_rollout_ref.model.use_torch_compile=false")
    return _sets("actor_rollout_ref.model.use_torch_compile", False, "for every role")


def recompute(key: str, value: Any, look: Look) -> Verdict:
    """Recompute whole layers; anything less is `auto` here."""
    if value != "full" or ".ref." in key:
        return _no_effect("recomputation is decided by memory; enable_gradient_checkpointing steers it")
    model = "critic.model" if key.startswith("critic.") else "actor_rollout_ref.model"
    return _sets(f"{model}.enable_gradient_checkpointing", True, "which layers: decided by memory, if auto")


def min_lr(key: str, value: Any, look: Look) -> Verdict:
    """An absolute learning rate there, a share of lr here."""
    optim, lr = _parent(key), look(f"{_parent(key)}.lr")
    if not value:
        return _no_effect()
    if look(f"{optim}.lr_scheduler_type") == "constant" or not lr:
        return _no_effect("a constant learning rate has no lowest one")
    return _sets(f"{optim}.min_lr_ratio", value / lr, "divided by lr")


def cosine_shape(key: str, value: Any, look: Look) -> Verdict:
    """lr_decay_steps and num_cycles: nothing to a constant rate."""
    if value is None or value == 0.5 or look(f"{_parent(key)}.lr_scheduler_type") == "constant":
        return _no_effect("the learning rate is constant, or its cosine takes half a period over all steps")
    return _refuse("the cosine takes half a period over all steps", "take it out, and set trainer.total_training_steps")


def optimizer_offload(key: str, value: Any, look: Look) -> Verdict:
    """Megatron's optimizer on the CPU: here its state waits there between updates."""
    role = key.partition(".optim.")[0]
    if value is not True:
        return _no_effect("what leaves the GPU is decided by memory")
    fsdp = "fsdp" if role == "critic" else "fsdp_config"
    section = "megatron" if look(f"{role}.strategy") == "megatron" else fsdp
    return _sets(f"{role}.{section}.optimizer_offload", True, "its state waits in host memory; AdamW runs on the GPU")


def optimizer_field(key: str, value: Any, look: Look) -> Verdict:
    """Fields of the optimizer that have a key here."""
    optim, name = key.split(".override_optimizer_config.")
    return _no_effect() if value is None else _sets(f"{optim}.{name}", value)


def micro_batch(key: str, value: Any, look: Look) -> Verdict:
    """Sequences of all data-parallel ranks there, of one device here."""
    role = _parent(key)
    per_gpu = f"{role}.ppo_micro_batch_size_per_gpu"
    if value is None or look(per_gpu) is not None:
        return _no_effect(NOTHING if value is None else f"{per_gpu} is set as well, and counts")
    ranks = (look("trainer.nnodes") or 1) * (look("trainer.n_gpus_per_node") or 1)
    if look(f"{role}.strategy") == "megatron":
        megatron = f"{role}.megatron"
        model = [look(f"{megatron}.{name}_model_parallel_size") or 1 for name in ("tensor", "pipeline")]
        ranks = max(1, ranks // (model[0] * model[1]))
    return _sets(per_gpu, max(1, value // ranks), f"divided by the {ranks} data-parallel devices")


def dynamic_batches(key: str, value: Any, look: Look) -> Verdict:
    """With it verl ignores the number of sequences; here both count unless one is null."""
    per_gpu = f"{_parent(key)}.ppo_micro_batch_size_per_gpu"
    if value is True and look(per_gpu) is not None:
        return _sets(per_gpu, None, "micro-batches are planned by tokens, and only those count")
    return _no_effect("micro-batches are always planned by tokens, within ppo_max_token_len_per_gpu")


def grad_clip(key: str, value: Any, look: Look) -> Verdict:
    """The key of verl up to 0.7, dead since; 1.0 is the default of both."""
    optim = f"{_parent(key)}.optim.clip_grad"
    if value is None or value == look(optim):
        return _no_effect(f"{optim} clips, at the same value")
    if value == 1.0 or look(optim) != 1.0:
        return _no_effect(f"{optim}={show(look(optim))} clips (verl, too, has stopped reading this key)")
    return _sets(optim, value)


def load_contents(key: str, value: Any, look: Look) -> Verdict:
    """Whether all parts that a run needs are named."""
    named = [value] if isinstance(value, str) else list(value or _PARTS)
    missing = [part for part in _PARTS if part not in named]
    if not missing:
        return _no_effect("a checkpoint is always loaded as a whole")
    return _refuse(
        f"a checkpoint is always loaded as a whole, with {' and '.join(missing)}",
        "take it out; to start anew from a checkpoint's weights, name its Hugging Face copy in model.path",
    )


def loss_param(key: str, value: Any, look: Look) -> Verdict:
    """A parameter of one loss, which other losses do not take."""
    name = key.rpartition(".")[2]
    mode = look(f"{_ACTOR}.policy_loss.loss_mode")
    if value is None or mode != LOSS_PARAMS[name]:
        return _no_effect(f"of another policy loss than {mode}")
    return _sets(f"{_ACTOR}.policy_loss.params.{name}", value)


def critic_scale(key: str, value: Any, look: Look) -> Verdict:
    """The critic's divisor is the actor's."""
    if value is None or value == look(f"{_ACTOR}.loss_scale_factor"):
        return _no_effect(f"{_ACTOR}.loss_scale_factor holds for the critic too")
    return _refuse(
        f"{_ACTOR}.loss_scale_factor holds for the critic too", f"set {_ACTOR}.loss_scale_factor={show(value)}"
    )


def same_length(key: str, value: Any, look: Look) -> Verdict:
    """prompt_length, response_length and max_resp_len repeat a key of data's."""
    data = "data.max_prompt_length" if key.endswith("prompt_length") else "data.max_response_length"
    if value is None or value == look(data):
        return _no_effect(f"{data} says it")
    return _refuse(f"{data}={show(look(data))} says how long it may be", f"set {data}={show(value)}, or take this out")


def expert_parallel(key: str, value: Any, look: Look) -> Verdict:
    """vLLM has a switch: experts are divided among the devices of the replica."""
    if value in (None, 1):
        return _no_effect()
    return _sets(f"{_ROLLOUT}.engine_kwargs.vllm.enable_expert_parallel", True, "over the devices of a replica")


def scheduling(key: str, value: Any, look: Look) -> Verdict:
    """First come, first served is vLLM's own choice."""
    if value in (None, "fcfs"):
        return _no_effect("first come, first served is vLLM's own choice")
    return _sets(f"{_ROLLOUT}.engine_kwargs.vllm.scheduling_policy", value)


def train_sampling(key: str, value: Any, look: Look) -> Verdict:
    """Training on greedy responses learns nothing."""
    if value is False:
        return _refuse("greedy responses leave nothing to explore", "leave it true")
    return _no_effect("sampling follows temperature, top_p and top_k")


def val_sampling(key: str, value: Any, look: Look) -> Verdict:
    """Not sampling is a temperature of 0."""
    temperature = f"{_parent(key)}.temperature"
    if value is False and look(temperature) != 0:
        return _sets(temperature, 0.0, "greedy")
    return _no_effect("sampling follows temperature, top_p and top_k")


def gen_batch(key: str, value: Any, look: Look) -> Verdict:
    """Prompts of one generate call."""
    size = look("data.train_batch_size")
    if value in (None, 1, size) or look("algorithm.filter_groups.enable") is True:
        return _no_effect("as many prompts are generated at once as are missing")
    return _refuse(f"a step generates for data.train_batch_size={show(size)} prompts", "set that, and take this out")


def overlong(key: str, value: Any, look: Look) -> Verdict:
    """Off is a buffer without tokens."""
    if value is False and look("reward.overlong_buffer.len"):
        return _sets("reward.overlong_buffer.len", 0, "off")
    return _no_effect("reward.overlong_buffer.len above 0 turns it on")


def correction_loss(key: str, value: Any, look: Look) -> Verdict:
    """The loss of bypass_mode: PPO's clipped one, or the plain policy gradient."""
    if value == "reinforce" and look("algorithm.rollout_correction.bypass_mode") is True:
        return _sets(f"{_ACTOR}.policy_loss.loss_mode", "gpg", "the plain policy gradient")
    if value in (None, "ppo_clip", "reinforce"):
        return _no_effect(f"{_ACTOR}.policy_loss.loss_mode names the loss")
    return _refuse(f"{_ACTOR}.policy_loss.loss_mode names the loss", "set that, and take this out")


def gdpo_parts(key: str, value: Any, look: Look) -> Verdict:
    """Names of the parts of the reward that count."""
    if not value:
        return _no_effect()
    return _sets("algorithm.adv_params.weights", dict.fromkeys(value, 1.0), "each with weight 1")


def keep_one(key: str, value: Any, look: Look) -> Verdict:
    """Only the latest checkpoint."""
    return _sets("trainer.max_actor_ckpt_to_keep", 1) if value is True else _no_effect()


# values of keys that live here


def cap_clip(key: str, value: Any, look: Look) -> Verdict:
    """A lower clip above 1 never clips a ratio; a divergence it would."""
    if isinstance(value, (int, float)) and value > 1 and look(f"{_ACTOR}.policy_loss.loss_mode") != "dppo_kl":
        return Verdict(Kind.LIVE, "a ratio is never below 0", {key: 1.0})
    return Verdict(Kind.LIVE)


def no_limit(key: str, value: Any, look: Look) -> Verdict:
    """0 and below: no limit there."""
    if isinstance(value, int) and value <= 0:
        return Verdict(Kind.LIVE, "no limit there; a step that needs so many is stuck", {key: 1000})
    return Verdict(Kind.LIVE)


def loggers(key: str, value: Any, look: Look) -> Verdict:
    """`file` is what metrics.jsonl is."""
    if not isinstance(value, list) or "file" not in value:
        return Verdict(Kind.LIVE)
    rest = [name for name in value if name != "file"] or ["console"]
    return Verdict(Kind.LIVE, "metrics.jsonl is always written", {key: rest})


def steps_between(key: str, value: Any, look: Look) -> Verdict:
    """0 and false: never."""
    return Verdict(Kind.LIVE, "never", {key: -1}) if value is False or value == 0 else Verdict(Kind.LIVE)
