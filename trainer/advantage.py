"""From samples to advantages: fetches what the configured estimator computes on, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trainer.algorithms.advantages import AdvantageInput, estimator, explained_variance
from trainer.algorithms.kl import KLController, reward_penalty
from trainer.config.schema import AlgorithmConfig
from trainer.samples import Samples


@dataclass(frozen=True, slots=True)
class AdvantageComputer:
    """Adds the columns `advantages` (and `returns`) to samples."""

    algorithm: AlgorithmConfig

    def compute(self, samples: Samples, kl: KLController) -> tuple[Tensor, dict[str, float]]:
        """Returns the advantages [total response tokens] and metrics; moves the KL controller on."""
        chosen = estimator(self.algorithm.adv_estimator)
        lengths = torch.from_numpy(samples.meta.response_length.astype(np.int64))
        mask = samples.fetch_loss_mask()
        loss_mask = None if mask is None else torch.from_numpy(mask)
        token_rewards, metrics = self._kl_penalty(samples, lengths, loss_mask, kl)
        values = torch.from_numpy(samples.fetch_column("values")) if chosen.needs_values else None
        result = chosen.fn(
            AdvantageInput(
                rewards=torch.from_numpy(samples.rewards),
                group=torch.from_numpy(samples.meta.group.astype(np.int64)),
                lengths=lengths,
                token_rewards=token_rewards,
                values=values,
                loss_mask=loss_mask,
            ),
            self.algorithm,
        )
        samples.put_column("advantages", result.advantages.numpy())
        if result.returns is not None:
            samples.put_column("returns", result.returns.numpy())
            if values is not None:
                metrics["critic/explained_variance"] = explained_variance(values, result.returns, loss_mask)
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
