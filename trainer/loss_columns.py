"""What the policy loss takes from the whole batch of a step: chosen tokens, normalised weights. Made on the driver."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trainer.algorithms.losses import PolicyLoss, driver_columns
from trainer.algorithms.policy.base import BatchInput
from trainer.samples import Samples


@dataclass(frozen=True, slots=True)
class LossColumns:
    """Adds the columns that the loss names to samples; most losses name none. seed: of draws, with the step."""

    loss: PolicyLoss
    seed: int

    def compute(self, samples: Samples, advantages: Tensor, *, step: int) -> None:
        """advantages: [total response tokens]. Fetches log-probs only where there is a column to make."""
        if not self.loss.columns:
            return
        mask = samples.fetch_loss_mask()
        bypass = self.loss.correction.bypass
        sampler = torch.from_numpy(samples.fetch_sampler_logprobs()) if self.loss.needs_sampler else None
        old = sampler if bypass else torch.from_numpy(samples.fetch_column("old_logprobs"))
        assert old is not None, "bypass_mode needs the sampler"
        x = BatchInput(
            old=old,
            advantages=advantages,
            mask=torch.ones(len(old), dtype=torch.bool) if mask is None else torch.from_numpy(mask),
            lengths=torch.from_numpy(samples.meta.response_length.astype(np.int64)),
            sampler=sampler,
        )
        for name, column in driver_columns(self.loss, x, seed=(self.seed, step)).items():
            samples.put_column(name, column.numpy())
