"""The model, the data, what is sampled, how each role is optimised, and the run itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trainer.config.algorithms import DRAWING_LOSS
from trainer.config.errors import show
from trainer.config.roll.engines import SECTIONS
from trainer.config.roll.tree import Translation

_ACTOR, _ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
_MODEL = "actor_rollout_ref.model.path"
_SCHEDULES = {
    "constant": "constant",
    "constant_with_warmup": "constant",
    "linear": "linear",
    "cosine": "cosine",
    "cosine_with_min_lr": "cosine",
}
_TEMPLATES: dict[str, dict[str, Any]] = {"native": {}, "qwen2_5": {}, "qwen3": {"enable_thinking": True}}
_TRACKERS = {
    "tensorboard": ["console", "tensorboard"],
    "wandb": ["console", "wandb"],
    "stdout": ["console"],
    None: ["console"],
}


def translate_model(into: Translation, roles: Sequence[str]) -> None:
    """Translate the checkpoints; ROLL takes `pretrain` unless all of its three roles name their own."""
    if not into.overridden(_MODEL):
        _checkpoint(into)
    _options(into)
    if "critic" in roles:
        path = "critic.model_args.model_name_or_path"
        path = path if into.roll.has(path) else "reward_pretrain"
        if into.roll.has(path):
            into.copy("critic.model.path", path)


def _checkpoint(into: Translation) -> None:
    own = {role: into.roll.value(f"{role}.model_args.model_name_or_path") for role in ("actor_train", "actor_infer")}
    own["reference"] = into.roll.value("reference.model_args.model_name_or_path")
    path, names = "pretrain", {into.roll.value("pretrain")}
    if None not in own.values():
        path, names = "actor_train.model_args.model_name_or_path", set(own.values())
    if len(names) > 1:
        into.refuse(path, "actor, rollout and reference start from one checkpoint", "name the same in all three")
    if None in names:
        into.problems.append("roll.pretrain=null: names no model; give a directory or hub name")
        return
    into.put(_MODEL, into.roll.value(path), path)


def _options(into: Translation) -> None:
    path = "actor_train.model_args.model_config_kwargs"
    if into.roll.value(path):
        into.copy("actor_rollout_ref.model.override_config", path)
    path = "actor_train.model_args.disable_gradient_checkpointing"
    into.put("actor_rollout_ref.model.enable_gradient_checkpointing", False if into.roll.value(path) else "auto", path)


def translate_data(into: Translation) -> None:
    """Translate files, columns and the chat template."""
    roll, data = into.roll, "actor_train.data_args"
    files = roll.value(f"{data}.file_name")
    if not files and not into.overridden("data.train_files"):
        into.problems.append(f"roll.{data}.file_name=null: names no data; give parquet or JSON lines files")
    elif files:
        into.put("data.train_files", files if isinstance(files, list) else [files], f"{data}.file_name")
    column = f"{data}.messages" if roll.has(f"{data}.messages") else f"{data}.prompt"
    if roll.has(column):
        into.copy("data.prompt_key", column)
    into.put("data.answer_key", "ground_truth", f"{data}.response")
    into.sources["data.answer_key"] = "the column that ROLL's rewards read"
    into.copy("data.reward_fn_key", f"{data}.tag")
    if roll.has("validation.data_args.file_name"):
        files = roll.value("validation.data_args.file_name")
        into.put("data.val_files", files if isinstance(files, list) else [files], "validation.data_args.file_name")
    if roll.has("validation.data_args.file_name") or into.given.get("data.val_files"):
        into.copy("trainer.test_freq", "eval_steps")
    _template(into, "global_template" if roll.has("global_template") else f"{data}.template")


def _template(into: Translation, path: str) -> None:
    name = into.roll.value(path)
    if name not in _TEMPLATES:
        into.refuse(
            path,
            "a template of ROLL's own",
            f"give it as data.chat_template, and write {', '.join(_TEMPLATES)} here: the tokenizer's",
            "data.chat_template",
        )
    elif _TEMPLATES[name]:
        into.put("data.apply_chat_template_kwargs", _TEMPLATES[name], path)


def translate_sampling(into: Translation) -> None:
    """Translate how responses are sampled, in training and in validation."""
    for role, section in (("actor_infer", _ROLLOUT), ("validation", f"{_ROLLOUT}.val_kwargs")):
        if role == "validation" and not into.roll.has("validation"):
            continue
        for name in ("temperature", "top_p"):
            path = f"{role}.generating_args.{name}"
            into.put(f"{section}.{name}", float(into.roll.value(path)), path)
        path = f"{role}.generating_args.top_k"
        into.put(f"{section}.top_k", into.roll.value(path) if into.roll.value(path) > 0 else -1, path)
    if into.roll.has("validation"):
        into.copy(f"{_ROLLOUT}.val_kwargs.n", "validation.generating_args.num_return_sequences")


def translate_optimizers(into: Translation, roles: Sequence[str]) -> None:
    """Translate learning rates and their schedules, of the roles that are trained."""
    for role in (role for role in roles if role != "reference"):
        optim, training = f"{SECTIONS[role]}.optim", f"{role}.training_args"
        into.put(f"{optim}.lr", float(into.roll.value(f"{training}.learning_rate")), f"{training}.learning_rate")
        into.put(
            f"{optim}.weight_decay", float(into.roll.value(f"{training}.weight_decay")), f"{training}.weight_decay"
        )
        betas = [f"{training}.adam_beta1", f"{training}.adam_beta2"]
        into.put(f"{optim}.betas", [into.roll.value(path) for path in betas], *betas)
        path = f"{training}.lr_scheduler_type"
        ours = f"{optim}.lr_scheduler_type"
        into.put(ours, into.choose(path, _SCHEDULES, "no such schedule", ours), path)
        into.put(
            f"{optim}.lr_warmup_steps", into.roll.value(f"{training}.warmup_steps") or -1, f"{training}.warmup_steps"
        )
        ratio = f"{training}.warmup_ratio"
        into.put(f"{optim}.lr_warmup_steps_ratio", float(into.roll.value(ratio)), ratio)
        _least_rate(into, role, optim)
        if role == "critic":
            path = "critic.model_args.disable_gradient_checkpointing"
            value = False if into.roll.value(path) else "auto"
            into.put("critic.model.enable_gradient_checkpointing", value, path)


def _least_rate(into: Translation, role: str, optim: str) -> None:
    options = into.roll.strategy_config(role).either("lr_scheduler_kwargs", {})
    path = f"{role}.strategy_args.strategy_config.lr_scheduler_kwargs"
    if set(options) - {"min_lr"} or not isinstance(options.get("min_lr", 0.0), int | float):
        into.problems.append(f"roll.{path}={show(options)}: only min_lr, a number, is there; leave the others out")
    elif options and into.values[f"{optim}.lr"]:
        into.put(f"{optim}.min_lr_ratio", options["min_lr"] / into.values[f"{optim}.lr"], path)


def translate_run(into: Translation) -> None:
    """Translate names, lengths, folders, trackers and time limits of the run."""
    roll = into.roll
    into.copy("trainer.total_training_steps", "max_steps")
    into.copy("trainer.save_freq", "save_steps")
    seeds = ("data.seed", f"{_ROLLOUT}.seed")
    for key in (*seeds, f"{_ACTOR}.data_loader_seed") if _updates_draw(into) else seeds:
        into.copy(key, "seed")
    for key, path in (
        ("trainer.experiment_name", "exp_name"),
        ("trainer.project_name", "tracker_kwargs.project"),
        (f"{_ROLLOUT}.update_weights_bucket_megabytes", "model_update_buffer_size_mb"),
    ):
        if roll.has(path):
            into.copy(key, path)
    if roll.has("max_ckpt_to_keep"):
        into.put("trainer.max_actor_ckpt_to_keep", roll.value("max_ckpt_to_keep") or None, "max_ckpt_to_keep")
    if roll.has("rpc_timeout"):
        for key in (f"{_ROLLOUT}.timeout_s", "trainer.step_timeout_s"):
            into.put(key, float(roll.value("rpc_timeout")), "rpc_timeout")
    if roll.has("track_with"):
        tracker = into.choose("track_with", _TRACKERS, "no such tracker", "trainer.logger")
        into.put("trainer.logger", tracker, "track_with")
    _folders(into)
    saved = [path for path in _SAVES_HF if roll.value(path)]
    if saved:
        into.put(f"{_ACTOR}.checkpoint.save_contents", ["model", "optimizer", "extra", "hf_model"], *saved)


def _updates_draw(into: Translation) -> bool:
    """Whether chance has a part in the updates: in the order of the mini-batches, or in the choice of tokens."""
    shuffles = (f"{_ACTOR}.shuffle", "critic.shuffle")
    chooses = into.given.get(f"{_ACTOR}.policy_loss.loss_mode") == DRAWING_LOSS
    return chooses or any(into.given.get(key, into.values.get(key)) for key in shuffles)


_SAVES_HF = ("actor_train.training_args.save_hf_model", "actor_train.strategy_args.strategy_config.save_hf_model")


def _folders(into: Translation) -> None:
    roll, checkpoints = into.roll, "checkpoint_config.output_dir"
    if roll.has(checkpoints):
        into.copy("trainer.default_local_dir", checkpoints)
    elif roll.has("output_dir"):
        name = roll.value("exp_name") if roll.has("exp_name") else "default"
        into.put("trainer.default_local_dir", f"{roll.value('output_dir')}/{name}", "output_dir", "exp_name")
    resume = roll.value("resume_from_checkpoint")
    if isinstance(resume, str):
        into.put("trainer.resume_mode", "resume_path", "resume_from_checkpoint")
        into.put("trainer.resume_from_path", resume, "resume_from_checkpoint")
    else:
        into.put("trainer.resume_mode", "auto" if resume else "disable", "resume_from_checkpoint")
