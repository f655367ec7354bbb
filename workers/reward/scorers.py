"""Built-in reward functions, chosen by a row's data source when no reward function of the user's own is configured."""

from __future__ import annotations

import re
from typing import Any

_GSM8K_ANSWER = re.compile(r"#### (\-?[0-9\.\,]+)")
_GSM8K_TAIL = 300  # characters: an answer stands at the end, and searching a long text for it is slow


def gsm8k(solution_str: str, ground_truth: str) -> float:
    """1 if the last `#### <number>` in the final 300 characters equals the ground truth, else 0 (verl's rule)."""
    answers = _GSM8K_ANSWER.findall(solution_str[-_GSM8K_TAIL:])
    if not answers:
        return 0.0
    return float(answers[-1].replace(",", "").replace("$", "") == ground_truth)


def exact_match(solution_str: str, ground_truth: str) -> float:
    """1 if the response equals the ground truth, white space at both ends aside, else 0."""
    return float(solution_str.strip() == ground_truth.strip())


SCORERS = {"openai/gsm8k": gsm8k}
"""data source -> scorer; every other data source gets `exact_match`."""


def compute_score(data_source: str, solution_str: str, ground_truth: Any, extra_info: dict[str, Any]) -> float:
    """Score one response with the built-in scorer of its data source.

    Raises ValueError where the row has no ground truth: a comparison with nothing would be a silent 0.
    """
    if ground_truth is None:
        raise ValueError("the row has no ground truth; set data.answer_key to the column with the answer")
    return SCORERS.get(data_source, exact_match)(solution_str, str(ground_truth))
