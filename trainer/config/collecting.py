"""Checks of how a step comes by its samples: dynamic sampling, punished length."""

from __future__ import annotations

from collections.abc import Iterator

from trainer.config.schema import Config

_CANNOT_PUNISH = {
    "gdpo": "takes the parts of the rewards, and the punishment is of the whole",
    "max_rl": "takes rewards for probabilities, and a failure that is punished has less than 0",
}
"""Estimators that a punishment of length does nothing to, or breaks."""


def collecting_problems(cfg: Config) -> Iterator[str]:
    """What contradicts each other."""
    length, buffer = cfg.data.max_response_length, cfg.reward.overlong_buffer.len
    if buffer > length:
        yield (
            f"reward.overlong_buffer.len={buffer}: longer than data.max_response_length={length}, so every response "
            f"would be punished; set it to a part of that, e.g. {max(1, length // 4)}, or to 0"
        )
    if buffer and cfg.algorithm.adv_estimator in _CANNOT_PUNISH:
        estimator = cfg.algorithm.adv_estimator
        yield (
            f"reward.overlong_buffer.len={buffer}: algorithm.adv_estimator={estimator} {_CANNOT_PUNISH[estimator]}; "
            "set it to 0, or choose another estimator"
        )
    n = cfg.actor_rollout_ref.rollout.n
    if cfg.algorithm.filter_groups.enable and n == 1:
        yield (
            "algorithm.filter_groups.enable=true: compares the responses to one prompt, and "
            "actor_rollout_ref.rollout.n=1; set actor_rollout_ref.rollout.n=8, for example, or leave it off"
        )
