"""A reward for random weights: any number will do, as long as responses differ."""

from __future__ import annotations

import zlib
from typing import Any


def compute_score(data_source: str, solution_str: str, ground_truth: Any, extra_info: Any) -> float:
    """Between 0 and 1, by the text's checksum."""
    return zlib.crc32(solution_str.encode()) / 2**32
