"""Imports without the garbage collector; and what the driver does not import at all."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from workers.imports import big_imports

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def thawed() -> Iterator[None]:
    """What a test froze is none of the others' business."""
    yield
    gc.unfreeze()
    gc.enable()


def test_nothing_is_collected_inside_and_all_is_kept_after() -> None:
    frozen = gc.get_freeze_count()
    with big_imports():
        assert not gc.isenabled()
        made: list[list[int]] = [[] for _ in range(1000)]
    assert gc.isenabled()
    assert gc.get_freeze_count() >= frozen + len(made)


def test_an_import_that_fails_leaves_the_collector_on() -> None:
    with pytest.raises(ModuleNotFoundError), big_imports():
        import no_such_module  # noqa: F401
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    with big_imports():
        pass
    assert not gc.isenabled()


def test_the_driver_does_without_what_only_workers_need() -> None:
    """Seconds in the life of every run, before the first actor starts."""
    of_workers = {"tensordict", "vllm", "megatron.core", "torch.distributed.tensor", "workers.engines.fsdp"}
    code = f"import sys, trainer.main, trainer.run; print(sorted({of_workers} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n", done.stderr
