"""Reward of the quick-start task: 1 for exactly the right answer, 0 for anything else.

This is all that a reward of your own needs: a plain function with this signature, named in the configuration by

    reward.custom_reward_function.path=examples/addition_reward.py
    reward.custom_reward_function.name=compute_score
"""

from __future__ import annotations

from typing import Any


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None
) -> float:
    """1.0 if the response is the right answer, character for character.

    data_source: the row's data set, here always "addition".
    solution_str: the response as text, without the end-of-text character.
    ground_truth: the right answer, e.g. "46".
    extra_info: the row's extra_info column; not used.
    """
    return float(solution_str == ground_truth)


def compute_parts(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None
) -> dict[str, float]:
    """The same reward under `score`, and its parts: `right`, the same again, and `near`, the share of right characters.

    Parts are logged (reward/part/<name>), and are what algorithm.adv_estimator=gdpo learns from.
    """
    right = float(solution_str == ground_truth)
    same = sum(a == b for a, b in zip(solution_str, ground_truth, strict=False))
    return {"score": right, "right": right, "near": same / max(len(solution_str), len(ground_truth))}
