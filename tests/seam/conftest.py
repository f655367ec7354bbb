"""One real engine for all tests of the seam; `python scripts/vllm_versions.py matrix` runs them with other versions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    from workers.rollout.vllm import selfcheck

    directory: Path = tmp_path_factory.mktemp("tiny")
    yield selfcheck.build(directory, "cpu")
