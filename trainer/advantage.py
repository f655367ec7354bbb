"""From samples to advantages: fetches what the configured estimator computes on, and nothing else."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trainer.algorithms.advantages import AdvantageInput, Estimator, estimator, explained_variance
from trainer.algorithms.custom import is_path
from trainer.algorithms.estimators.returns import reward_to_come
from trainer.algorithms.kl import KLController, reward_penalty
from trainer.config.errors import user_errors
from trainer.config.schema import AlgorithmConfig
from trainer.samples import Samples


@dataclass(frozen=True, slots=True)
class AdvantageComputer:
    """Adds the columns `advantages` (and `returns`) to samples."""

    algorithm: AlgorithmConfig

    def compute(self, samples: Samples, kl: KLController) -> tuple[Tensor, dict[str, float]]:
        """Returns the advantages [total response tokens] and metrics; moves the KL controller on.

        Raises UserError for rewards that are not finite or that the estimator cannot use; what one's own estimator
        raises stays as it is, with its traceback.
        """
        chosen = estimator(self.algorithm.adv_estimator, self.algorithm.adv_params)
        with nullcontext() if is_path(chosen.name) else user_errors():
            return self._compute(chosen, samples, kl)

    def _compute(self, chosen: Estimator, samples: Samples, kl: KLController) -> tuple[Tensor, dict[str, float]]:
        lengths = torch.from_numpy(samples.meta.response_length.astype(np.int64))
        mask = samples.fetch_loss_mask()
        loss_mask = None if mask is None else torch.from_numpy(mask)
        token_rewards, metrics = self._kl_penalty(samples, lengths, loss_mask, kl)
        x = AdvantageInput(
            rewards=torch.from_numpy(samples.rewards),
            group=torch.from_numpy(samples.meta.group.astype(np.int64)),
            lengths=lengths,
            token_rewards=token_rewards,
            values=_column(samples, "values", chosen.needs_values),
            loss_mask=loss_mask,
            parts={name: torch.from_numpy(part) for name, part in samples.parts.items()} if chosen.needs_parts else {},
            baseline=_baseline(samples) if chosen.needs_baseline else None,
            logprobs=_column(samples, "old_logprobs", chosen.needs_logprobs),
            sum_pi_squared=_column(samples, "sum_pi_squared", chosen.needs_sum_pi_squared),
        )
        result = chosen(x, self.algorithm)
        samples.put_column("advantages", result.advantages.numpy())
        if "values" in samples.columns:  # there is a critic, which may be trained although the estimator does without
            returns = reward_to_come(x, gamma=self.algorithm.gamma) if result.returns is None else result.returns
            samples.put_column("returns", returns.numpy())
            if x.values is not None:
                metrics["critic/explained_variance"] = explained_variance(x.values, returns, loss_mask)
        return result.advantages, metrics

    def _kl_penalty(
        self, samples: Samples, lengths: Tensor, loss_mask: Tensor | None, kl: KLController
    ) -> tuple[Tensor | None, dict[str, float]]:
        if not self.algorithm.use_kl_in_reward:
            return None, {}
        policy = torch.from_numpy(samples.fetch_column("old_logprobs"))
        reference = torch.from_numpy(samples.fetch_column("ref_logprobs"))
        mask = torch.ones(len(policy), dtype=torch.bool) if loss_mask is None else loss_mask
        coef = kl.coef
        penalty, mean = reward_penalty(policy, reference, mask, lengths, kind=self.algorithm.kl_penalty, coef=coef)
        kl.update(mean, len(samples))
        return penalty, {"kl/reward_kl": mean, "kl/reward_kl_coef": coef}


def _column(samples: Samples, name: str, wanted: bool) -> Tensor | None:
    return torch.from_numpy(samples.fetch_column(name)) if wanted else None


def _baseline(samples: Samples) -> Tensor | None:
    return None if samples.baseline is None else torch.from_numpy(samples.baseline)
