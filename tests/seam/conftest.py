"""One real engine for all tests of the seam; `python scripts/vllm_versions.py matrix` runs them with other versions."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
_before: dict[str, str] = {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """After the last test of this directory, the environment is as it was before the engine: vLLM sets variables."""
    try:
        return (yield)
    finally:
        if _before and (nextitem is None or nextitem.path.parent != HERE):
            os.environ.clear()
            os.environ.update(_before)


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    from workers.rollout.vllm import selfcheck

    directory: Path = tmp_path_factory.mktemp("tiny")
    _before.update(os.environ)
    yield selfcheck.build(directory, "cpu")
