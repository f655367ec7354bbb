"""Validation: what failed is judged over all calls so far, not call by call."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from collect_world import Recorded

from trainer.evaluation import Evaluation
from trainer.scoring import RewardErrorRate
from workers.protocol import Prompt
from workers.rollout.spec import SamplingSpec

SAMPLING = SamplingSpec(1, 0.0, 1.0, -1, 8, False, stop_token_ids=(), logprobs="none")


def validate(num_failed: int, *, max_error_rate: float) -> dict[str, float]:
    """16 prompts, two per call; the last `num_failed` of them fail."""
    prompts = [Prompt(index=i, token_ids=(i,), data_source="sums") for i in range(16)]
    source: Any = Recorded(lambda index: [np.nan if index >= 16 - num_failed else 1.0])
    return Evaluation(prompts, SAMPLING, False, 2, max_error_rate).run(source, seed=(1,))[0]


def test_one_failure_in_a_small_call_does_not_end_a_run() -> None:
    metrics = validate(1, max_error_rate=0.1)
    assert metrics["val/reward_errors"] == 1
    assert metrics["val/accuracy"] == 1


def test_failures_of_all_calls_are_added_up() -> None:
    assert validate(3, max_error_rate=0.2)["val/reward_errors"] == 3
    with pytest.raises(RewardErrorRate, match="4 of 16 rewards failed"):
        validate(4, max_error_rate=0.2)
