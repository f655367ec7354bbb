"""Checks between keys: what the schema cannot see because it takes two keys, or a file, to be wrong.

`validate` runs on the driver before any actor starts. First the keys against each other, all problems in one error;
then what the keys point to (model, data, reward function), again all problems in one error. The checks themselves lie
beside this file, by subject; what the model's own config contradicts is in `model`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from trainer.config.algorithms import estimator_problems
from trainer.config.batches import batch_problems
from trainer.config.collecting import collecting_problems
from trainer.config.corrections import policy_loss_problems, rollout_correction_problems
from trainer.config.course import course_problems
from trainer.config.errors import UserError, raise_problems
from trainer.config.inputs import check_model_path, check_reward_function, find_data_files
from trainer.config.mapping import count_devices, device_problems
from trainer.config.megatron import megatron_problems
from trainer.config.model import override_problems
from trainer.config.notices import notices
from trainer.config.roles import training_roles
from trainer.config.rollout import rollout_problems
from trainer.config.schema import Config


def validate(cfg: Config) -> list[str]:
    """Return notices about settings that are allowed but may surprise; raise ValueError listing what is wrong."""
    raise_problems([problem for check in _KEY_CHECKS for problem in check(cfg)])
    raise_problems(list(_input_problems(cfg)))
    return notices(cfg)


def _megatron(cfg: Config) -> Iterator[str]:
    counts = [
        (role, count_devices(role.config.device_mapping, f"{role.key}.device_mapping", num_devices=cfg.num_devices))
        for role in training_roles(cfg)
    ]
    yield from megatron_problems([(role, count) for role, count in counts if count is not None])


def _input_problems(cfg: Config) -> Iterator[str]:
    model, data, function = cfg.actor_rollout_ref.model, cfg.data, cfg.reward.custom_reward_function
    checks: list[Callable[[], object]] = [
        lambda: check_model_path(model.path, model.tokenizer_path),
        lambda: find_data_files(data.train_files, "data.train_files"),
        lambda: find_data_files(data.val_files or (), "data.val_files"),
        lambda: check_reward_function(function.path, function.name),
        lambda: _check_resume(cfg),
    ]
    if cfg.use_critic and cfg.critic.model.path != model.path:
        checks.append(lambda: check_model_path(cfg.critic.model.path, model.tokenizer_path, key="critic.model.path"))
    for check in checks:
        try:
            check()
        except ValueError as error:
            yield str(error)


def _check_resume(cfg: Config) -> None:
    path = cfg.trainer.resume_from_path
    if cfg.trainer.resume_mode == "resume_path" and path is not None and not Path(path).is_dir():
        raise UserError(
            f"trainer.resume_from_path={path}: no such directory; give a checkpoint, e.g. "
            f"{cfg.trainer.default_local_dir}/checkpoints/step_10"
        )


_KEY_CHECKS = (
    batch_problems,
    rollout_problems,
    override_problems,
    device_problems,
    _megatron,
    estimator_problems,
    policy_loss_problems,
    rollout_correction_problems,
    course_problems,
    collecting_problems,
)
