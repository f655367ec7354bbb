"""The three run-time patches, on modules written like vLLM 0.7's. (test_contract.py: on the real sources.)"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from workers.rollout.vllm import patches

FILES = {
    "distributed/parallel_state.py": """
_STATE = None

def initialize_model_parallel(tensor_model_parallel_size=1, pipeline_model_parallel_size=1):
    global _STATE
    world_size = 8
    if (world_size != tensor_model_parallel_size * pipeline_model_parallel_size):
        raise RuntimeError("world size")
    _STATE = tensor_model_parallel_size
""",
    "executor/uniproc_executor.py": """
class ExecutorWithExternalLauncher:
    def _init_executor(self):
        rank = 11
        local_rank = rank
        self.local_rank = local_rank
""",
    "model_executor/model_loader/weight_utils.py": """
class torch:
    class cuda:
        calls = 0
        @staticmethod
        def empty_cache():
            torch.cuda.calls += 1

def pt_weights_iterator(files):
    for file in files:
        yield file
        torch.cuda.empty_cache()
""",
    "model_executor/model_loader/loader.py": """
from oldvllm.model_executor.model_loader.weight_utils import pt_weights_iterator
""",
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name, text in FILES.items():
        path = tmp_path / "oldvllm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "oldvllm"
    for name in [name for name in sys.modules if name.startswith("oldvllm")]:
        del sys.modules[name]


def module(package: str, name: str) -> Any:
    return importlib.import_module(f"{package}.{name}")


def test_all_three_are_applied_and_only_once(package: str, tmp_path: Path) -> None:
    before = {name: (tmp_path / "oldvllm" / name).read_text() for name in FILES}
    assert patches.apply(package) == ["world-size check", "local rank", "empty_cache"]
    assert patches.apply(package) == []
    assert before == {name: (tmp_path / "oldvllm" / name).read_text() for name in FILES}  # files are not touched


def test_a_world_larger_than_the_engine(package: str) -> None:
    state = module(package, "distributed.parallel_state")
    with pytest.raises(RuntimeError):
        state.initialize_model_parallel(2, 1)
    patches.apply(package)
    state.initialize_model_parallel(2, 1)
    assert state._STATE == 2  # `global` still means the module


def test_local_rank_of_the_environment(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    patches.apply(package)
    executor = module(package, "executor.uniproc_executor").ExecutorWithExternalLauncher()
    executor._init_executor()
    assert executor.local_rank == 3


def test_copies_taken_by_import_are_replaced_too(package: str) -> None:
    loader = module(package, "model_executor.model_loader.loader")
    utils = module(package, "model_executor.model_loader.weight_utils")
    patches.apply(package)
    assert list(loader.pt_weights_iterator([1, 2])) == [1, 2]
    assert utils.torch.cuda.calls == 0


@pytest.mark.parametrize("patch", patches.PATCHES, ids=lambda p: p.name)
def test_a_function_without_the_fault_stays_as_it_is(patch: patches.Patch) -> None:
    source = "def f(world_size, n):\n    if world_size != n:\n        raise ValueError\n    return n\n"
    tree, changed = patch.rewritten(source)
    assert not changed and ast.unparse(tree) == ast.unparse(ast.parse(source))
