"""Models and worlds, made once for all engine tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from engine_harness import Pair, Quad, Solo, make_model

ModelPath = Callable[[str, bool], Path]


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> ModelPath:
    """(kind, tied) -> directory of a tiny checkpoint."""
    root = tmp_path_factory.mktemp("models")
    made: dict[tuple[str, bool], Path] = {}

    def path(kind: str, tied: bool) -> Path:
        if (kind, tied) not in made:
            made[kind, tied] = make_model(root / f"{kind}-{tied}", kind, tied=tied)
        return made[kind, tied]

    return path


@pytest.fixture(scope="session")
def qwen2(model_path: ModelPath) -> Path:
    """A tied Qwen2, the architecture of the quick start."""
    return model_path("qwen2", True)


@pytest.fixture(scope="session")
def solo() -> Iterator[Solo]:
    """One rank."""
    world = Solo()
    yield world
    world.close()


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Two ranks."""
    world = Pair(tmp_path_factory.mktemp("pair"))
    yield world
    world.close()


@pytest.fixture(scope="session")
def quad(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Quad]:
    """Four ranks."""
    world = Quad(tmp_path_factory.mktemp("quad"))
    yield world
    world.close()
