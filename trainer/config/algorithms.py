"""Checks of the algorithm: its name or import path, its parameters, and whether the run has what it needs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from trainer.algorithms import custom
from trainer.algorithms.estimators.catalog import KEY, PARAMS_KEY, needs
from trainer.config.schema import AlgorithmConfig, Config

if TYPE_CHECKING:
    from trainer.algorithms.estimators.ragged import AdvantageInput

DRAWING_LOSS = "clip_cov"
"""The policy loss that chooses tokens at random."""
_N = "actor_rollout_ref.rollout.n"


def estimator_problems(cfg: Config) -> Iterator[str]:
    """What is wrong with the advantage estimator. One's own is imported, as the run will."""
    name, n = cfg.algorithm.adv_estimator, cfg.actor_rollout_ref.rollout.n
    yield from _parameters(cfg.algorithm)
    wanted = needs(name)
    if "groups" in wanted and n == 1:
        yield (
            f"{_N}=1: {KEY}={name} compares the responses to one prompt, and one alone has no baseline; set {_N}=8, "
            "for example"
        )
    if "values" in wanted and not cfg.use_critic:
        yield (f"critic.enable=false: {KEY}={name} needs the critic's values; set critic.enable=null, or {KEY}=grpo")


def _parameters(algorithm: AlgorithmConfig) -> Iterator[str]:
    if not algorithm.adv_params and not custom.is_path(algorithm.adv_estimator):
        return  # those built in have a default for each; what follows imports torch
    from trainer.algorithms.advantages import estimator

    try:
        chosen = estimator(algorithm.adv_estimator, algorithm.adv_params)
        if not custom.is_path(chosen.name):
            chosen(_two_responses(algorithm), algorithm)  # tries the values of the parameters
    except ValueError as error:
        yield str(error)
    except TypeError as error:
        yield f"{PARAMS_KEY}={algorithm.adv_params}: wrong kind of value for {KEY}={algorithm.adv_estimator} ({error})"


def _two_responses(algorithm: AlgorithmConfig) -> AdvantageInput:
    """A batch that every built-in estimator can work on, of two responses to one prompt."""
    import torch

    from trainer.algorithms.estimators.ragged import AdvantageInput

    weights = algorithm.adv_params.get("weights")
    names = list(weights) if isinstance(weights, dict) and weights else ["score"]
    score, column = torch.tensor([0.0, 1.0]), torch.full((2,), 0.5)
    return AdvantageInput(
        rewards=score,
        group=torch.zeros(2, dtype=torch.int64),
        lengths=torch.ones(2, dtype=torch.int64),
        values=column,
        parts=dict.fromkeys(names, score),
        baseline=column,
        logprobs=column.log(),
        sum_pi_squared=column,
    )
