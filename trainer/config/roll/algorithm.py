"""Advantages, losses, KL and corrections of ROLL's RLVR pipeline."""

from __future__ import annotations

from typing import Any

from trainer.algorithms.estimators import catalog
from trainer.config.roll.tree import Options, Translation

_ACTOR = "actor_rollout_ref.actor"
_ESTIMATOR = "algorithm.adv_estimator"
_LOSS_MODE = f"{_ACTOR}.policy_loss.loss_mode"
_CLIP = f"{_ACTOR}.clip_ratio"
_VARIANT = "actor_train.pg_variant"
_UNBOUNDED = 1.0e9
"""A bound that never binds: ratios are held within exp(+-20)."""

_ADVANTAGE_KEYS = (
    "adv_estimator",
    "gamma",
    "norm_mean_type",
    "norm_std_type",
    "reward_clip",
    "whiten_rewards",
    "whiten_advantages",
    "advantage_clip",
    "max_len_mask",
    "difficulty_mask",
    "error_max_len_clip",
)
_NORMS = {None: None, "batch": "batch", "group": "group"}
_KL_KINDS = {"kl": "kl", "abs": "abs", "mse": "mse"}
_MODULE = "trainer.algorithms.estimators.roll"
_AGG_MODES = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")


def translate_algorithm(into: Translation) -> None:
    """Translate everything that says what is learnt."""
    _advantages(into)
    _policy_loss(into)
    _kl(into)
    if has_critic(into):
        _value_loss(into)
    _correction(into)


def has_critic(into: Translation) -> bool:
    """Whether a critic is trained: as the command line says it, or else the file."""
    enabled = into.given.get("critic.enable")
    return enabled if isinstance(enabled, bool) else "values" in catalog.needs(_estimator(into))


def _estimator(into: Translation) -> str:
    """As the command line names it, or else the file."""
    return str(into.given.get(_ESTIMATOR, into.roll.value("adv_estimator")))


def _advantages(into: Translation) -> None:
    into.copy("algorithm.gamma", "gamma")
    if _estimator(into) == "gae" or into.roll.has("lambd"):  # or else nobody wrote it, and nothing reads it
        into.copy("algorithm.lam", "lambd")
    if into.overridden(_ESTIMATOR):
        return  # whose parameters are not those of ROLL's estimator
    kinds = {"gae": "gae", "reinforce": "reinforce", "grpo": "grpo"}
    kind = into.choose("adv_estimator", kinds, "no estimator of RLVR's (ROLL has it for agents)")
    mean = into.choose("norm_mean_type", _NORMS, "running statistics of rewards are not kept")
    std = into.choose("norm_std_type", _NORMS, "running statistics of rewards are not kept")
    if kind is None:
        return
    if kind == "grpo":  # ROLL sets both for it
        mean = std = "group"
    params = _shaping(into, mean, std)
    name = _built_in(kind, params, gamma=into.roll.value("gamma"))
    if name is not None:
        into.put(_ESTIMATOR, name, *_ADVANTAGE_KEYS)
        if kind == "gae":
            into.put("algorithm.adv_params.whiten", into.roll.value("whiten_advantages"), "whiten_advantages")
        return
    into.put(_ESTIMATOR, f"{_MODULE}:{'gae' if kind == 'gae' else 'reinforce'}", *_ADVANTAGE_KEYS)
    into.put("algorithm.adv_params.gamma", into.roll.value("gamma"), "gamma")
    if kind == "gae":
        into.put("algorithm.adv_params.lam", into.roll.value("lambd"), "lambd")
    for param, (value, paths) in params.items():
        into.put(f"algorithm.adv_params.{param}", value, *paths)


def _shaping(into: Translation, mean: Any, std: Any) -> dict[str, tuple[Any, tuple[str, ...]]]:
    """Parameters of our estimators after ROLL (trainer/algorithms/estimators/roll.py), with the keys they come from."""
    roll = into.roll
    found: dict[str, tuple[Any, tuple[str, ...]]] = {}
    for param, value, path in (
        ("norm_mean", mean, "norm_mean_type"),
        ("norm_std", std, "norm_std_type"),
        ("reward_clip", roll.value("reward_clip"), "reward_clip"),
        ("advantage_clip", roll.value("advantage_clip"), "advantage_clip"),
    ):
        if value:
            found[param] = (value, (path,))
    for flag in ("whiten_rewards", "whiten_advantages"):
        if roll.value(flag):
            found[flag] = (True, (flag,))
    if roll.value("max_len_mask") and "data.max_response_length" in into.values:
        found["max_length"] = (into.values["data.max_response_length"], ("max_len_mask", "response_length"))
    if roll.value("difficulty_mask") and roll.value("num_return_sequences_in_group") > 1:
        low, high = "difficulty_low_threshold", "difficulty_high_threshold"
        found["min_group_reward"] = (roll.value(low), ("difficulty_mask", low))
        found["max_group_reward"] = (roll.value(high), ("difficulty_mask", high))
    if roll.value("error_max_len_clip"):
        path = "error_max_len_threshold"
        found["max_failed_length"] = (roll.value(path), ("error_max_len_clip", path))
    return found


def _built_in(kind: str, params: dict[str, tuple[Any, tuple[str, ...]]], *, gamma: float) -> str | None:
    """The built-in estimator that does the same, where there is one."""
    values = {name: value for name, (value, _) in params.items()}
    if kind == "gae" and set(values) <= {"whiten_advantages"}:
        return "gae"
    if kind != "gae" and values == {"whiten_advantages": True}:
        return "reinforce_plus_plus"
    if kind != "gae" and values == {"norm_mean": "group", "norm_std": "group"} and gamma == 1:
        return "grpo"
    if kind != "gae" and values == {"norm_mean": "group"} and gamma == 1:
        return "dr_grpo"
    return None


def _policy_loss(into: Translation) -> None:
    loss = _loss_mode(into)
    into.put(_LOSS_MODE, loss, "importance_sampling", _VARIANT)
    if not into.overridden(_CLIP):  # which both bounds follow
        _clip_range(into, cispo=loss == "cispo" and into.given.get(_LOSS_MODE, loss) == loss)
    dual = 1.0 + 2.0 * into.roll.value("pg_clip") if into.roll.value("dual_clip_loss") else _UNBOUNDED
    into.put(f"{_ACTOR}.clip_ratio_c", dual, "dual_clip_loss", "pg_clip")
    mode = into.choose(
        "loss_agg_mode", {name: name for name in _AGG_MODES}, "no such aggregation in ROLL", f"{_ACTOR}.loss_agg_mode"
    )
    into.put(f"{_ACTOR}.loss_agg_mode", mode, "loss_agg_mode")
    if mode == "seq-mean-token-sum-norm" and "data.max_response_length" in into.values:
        lengths = into.values["data.max_prompt_length"] + into.values["data.max_response_length"]
        into.put(f"{_ACTOR}.loss_scale_factor", float(lengths - 1), "loss_agg_mode", "response_length")
    into.copy(f"{_ACTOR}.entropy_coeff", "entropy_loss_coef")
    into.copy(f"{_ACTOR}.optim.clip_grad", "max_grad_norm")


def _clip_range(into: Translation, *, cispo: bool) -> None:
    """The range of the ratio: ROLL's one number or two. cispo: the fixed range of that loss of ROLL's."""
    ranged = into.roll.value("use_pg_clip_range")
    if not ranged and not cispo:
        into.copy(_CLIP, "pg_clip")
    for side in ("low", "high"):
        path = f"pg_clip_{side}" if ranged else "pg_clip"
        value, source = (0.1, _VARIANT) if cispo else (into.roll.value(path), path)
        into.put(f"{_CLIP}_{side}", value, source)


def _loss_mode(into: Translation) -> Any:
    """ROLL's ActorWorker has PPO's loss, by token or sequence; its ActorPGWorker a choice."""
    worker = str(into.roll.value("actor_train.worker_cls") or "ActorWorker").rpartition(".")[2]
    if worker == "ActorPGWorker":
        variants = {"ppo": "ppo", "vanilla": "gpg", "topr": "topr", "cispo": "cispo"}
        if into.roll.value(_VARIANT) == "topr":
            into.tell(
                f"roll.{_VARIANT}=topr: good is what has a positive advantage; ROLL goes by the reward", _LOSS_MODE
            )
        reason = "no such loss, or with bounds that no key of ROLL's configuration holds"
        return into.choose(_VARIANT, variants, reason, _LOSS_MODE)
    if worker != "ActorWorker":
        into.refuse("actor_train.worker_cls", "a worker of one's own is not there", "leave it out", _LOSS_MODE)
    if into.roll.has(_VARIANT):
        into.notices.append(
            f"roll.{_VARIANT}={into.roll.value(_VARIANT)}: no effect: only ROLL's ActorPGWorker reads it"
        )
    modes = {"token": "ppo", "seq": "gspo"}
    return into.choose("importance_sampling", modes, "no such ratio", _LOSS_MODE)


def _kl(into: Translation) -> None:
    roll = into.roll
    into.copy(f"{_ACTOR}.use_kl_loss", "use_kl_loss")
    into.copy(f"{_ACTOR}.kl_loss_coef", "kl_loss_coef")
    into.put(f"{_ACTOR}.kl_loss_type", "low_var_kl", "use_kl_loss")
    into.copy("algorithm.use_kl_in_reward", "add_token_level_kl")
    if not roll.value("add_token_level_kl"):
        return
    ours = "algorithm.kl_penalty"
    into.put(ours, into.choose("kl_penalty", _KL_KINDS, "takes whole distributions", ours), "kl_penalty")
    into.copy("algorithm.kl_ctrl.kl_coef", "init_kl_coef")
    into.put("algorithm.kl_ctrl.type", "adaptive" if roll.has("target_kl") else "fixed", "target_kl")
    if roll.has("target_kl"):
        into.copy("algorithm.kl_ctrl.target_kl", "target_kl")
        into.copy("algorithm.kl_ctrl.horizon", "kl_horizon")


def _value_loss(into: Translation) -> None:
    clip = into.roll.value("value_clip")
    into.put("critic.cliprange_value", _UNBOUNDED if clip is None else clip, "value_clip")
    into.put("critic.loss_agg_mode", "seq-mean-token-mean", "adv_estimator")
    into.copy("critic.optim.clip_grad", "max_grad_norm")
    into.copy("trainer.critic_warmup", "critic_warmup")


def _correction(into: Translation) -> None:
    roll, ours, weight = into.roll, "algorithm.rollout_correction", "train_infer_correction.is_weight"
    used = False
    if roll.value(f"{weight}.enabled"):
        kinds = {"token": "token", "sequence": "sequence", "geometric": "geometric"}
        kind = into.choose(f"{weight}.weight_type", kinds, "segments of several turns have no weight of their own")
        into.put(f"{ours}.rollout_is", kind, f"{weight}.enabled", f"{weight}.weight_type")
        into.put(f"{ours}.rollout_is_threshold", roll.value(f"{weight}.upper_bound"), f"{weight}.upper_bound")
        used = True
    used = _rejection(into, ours) or used
    if used:
        into.put("actor_rollout_ref.rollout.calculate_log_probs", True, "train_infer_correction")


def _rejection(into: Translation, ours: str) -> bool:
    """ROLL's filters by ratio, trainer / sampler, as ours, whose bounds are of sampler / trainer."""
    path, statistics, bounds = "train_infer_correction.filters", [], []
    kinds = {"token": "token_k1", "sequence": "seq_sum_k1", "geometric": "seq_mean_k1"}
    for number, given in enumerate(into.roll.value(path) or []):
        rule = Options(given if isinstance(given, dict) else {})
        if not rule.either("enabled", False):
            continue
        kind = rule.either("agg_type", "token")
        if kind not in kinds or rule.either("diff_enabled", False):
            into.problems.append(
                f"roll.{path}[{number}]: only ratios of tokens, sequences and their geometric mean reject here; "
                "set diff_enabled to false and agg_type to token, sequence or geometric"
            )
        elif rule.either("ratio_enabled", True):
            low, high = rule.either("ratio_low", 0.8), rule.either("ratio_high", 1.2)
            statistics.append(kinds[kind])
            bounds.append(f"{1 / high:.6g}_{1 / low:.6g}")
    if statistics:
        into.put(f"{ours}.rollout_rs", ",".join(statistics), path)
        into.put(f"{ours}.rollout_rs_threshold", ",".join(bounds), path)
    return bool(statistics)
