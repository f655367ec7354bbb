"""Models and worlds, made once for all engine tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_harness import Pair, Quad, Solo, make_model

ModelPath = Callable[[str, bool], Path]
HERE = Path(__file__).parent
WORLDS = ("solo", "pair", "quad")
_open: dict[str, Solo | Pair] = {}
_last_users: dict[str, str] = {}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a world go first: its processes are never quite idle (gloo looks 100 times a second for each of
    Megatron's many groups), and a world is closed when nobody needs it any more."""
    places = [place for place, item in enumerate(items) if item.path.parent == HERE]
    chosen = sorted((items[place] for place in places), key=lambda item: not _worlds(item))
    for place, item in zip(places, chosen, strict=True):
        items[place] = item
        _last_users.update(dict.fromkeys(_worlds(item), item.nodeid))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Closes the worlds that this test was the last to need; all of them after the last engine test of this process,
    which in one of several streams may be any."""
    try:
        return (yield)
    finally:
        is_last = nextitem is None or nextitem.path.parent != HERE
        for name, last in _last_users.items():
            if (is_last or last == item.nodeid) and name in _open:
                _open.pop(name).close()


def _worlds(item: pytest.Item) -> tuple[str, ...]:
    """Those that it may ask for; one that asks by name may ask for any."""
    names = getattr(item, "fixturenames", ())
    return WORLDS if "request" in names else tuple(name for name in WORLDS if name in names)


def _opened(name: str, world: Solo | Pair) -> Iterator[Any]:
    _open[name] = world
    yield world
    if name in _open:
        _open.pop(name).close()


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
    yield from _opened("solo", Solo())


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Two ranks."""
    yield from _opened("pair", Pair(tmp_path_factory.mktemp("pair")))


@pytest.fixture(scope="session")
def quad(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Quad]:
    """Four ranks."""
    yield from _opened("quad", Quad(tmp_path_factory.mktemp("quad")))
