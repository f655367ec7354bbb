"""Finding vLLM and reading its sources without importing it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from workers.rollout.vllm.installed import Sources

FILES = {
    "engine/arg_utils.py": """
from dataclasses import dataclass
from vllm.engine.base import Base as Parent

@dataclass
class EngineArgs(Parent):
    model: str = "m"
    seed: int | None = None
    plain = 3

@dataclass
class AsyncEngineArgs(EngineArgs):
    extra: bool = False
""",
    "engine/base.py": """
class Root:
    root: int = 0

class Base(Root):
    inherited: int = 1
    def wake_up(self, tags=None): ...
""",
    "entrypoints/llm.py": """
from typing import overload
from vllm.engine.base import Base
from torch import nn

class LLM(nn.Module, Base):
    @overload
    def sleep(self, level: int): ...
    def sleep(self, level: int = 1, *, mode: str = "abort"): ...
    async def later(self, a, /, b): ...

try:
    def helper(x, y): ...
except ImportError:
    pass
if True:
    ALIAS = LLM
""",
    "envs.py": """
if TYPE_CHECKING:
    VLLM_A: int = 0
environment_variables = {
    # "VLLM_COMMENT": no
    "VLLM_B": lambda: 1,
}
""",
    "package/__init__.py": "class Inside:\n    x: int\n",
}


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Sources(tmp_path)


def test_fields_are_annotated_names_of_the_class_and_its_bases(sources: Sources) -> None:
    assert sources.fields("engine.arg_utils", "EngineArgs") == {"model", "seed", "inherited", "root"}
    assert sources.fields("engine.arg_utils", "AsyncEngineArgs") == {"model", "seed", "inherited", "root", "extra"}
    assert sources.fields("engine.arg_utils", "Missing") == frozenset()
    assert sources.fields("no.such.module", "EngineArgs") == frozenset()


def test_members_are_methods_and_attributes(sources: Sources) -> None:
    assert {"plain", "model", "wake_up"} <= sources.members("engine.arg_utils", "EngineArgs")


def test_parameters_of_the_last_definition_of_bases_and_of_functions(sources: Sources) -> None:
    assert sources.parameters("entrypoints.llm", "LLM.sleep") == ("level", "mode")
    assert sources.parameters("entrypoints.llm", "LLM.wake_up") == ("tags",)
    assert sources.parameters("entrypoints.llm", "LLM.later") == ("a", "b")
    assert sources.parameters("entrypoints.llm", "helper") == ("x", "y")
    assert sources.parameters("entrypoints.llm", "LLM.missing") is None
    assert sources.parameters("entrypoints.llm", "missing") is None


def test_names_of_a_module(sources: Sources) -> None:
    assert {"LLM", "helper", "ALIAS", "Base", "nn"} <= sources.names("entrypoints.llm")


def test_variables_it_reads(sources: Sources) -> None:
    assert sources.variables("envs") == {"VLLM_A", "VLLM_B"}


def test_packages_and_modules(sources: Sources) -> None:
    assert sources.has_module("package") and sources.has_module("entrypoints.llm")
    assert not sources.has_module("entrypoints.nothing")
    assert sources.fields("package", "Inside") == {"x"}


def _find(path: Path) -> str:
    """What `find` says in a process that sees this directory before everything else."""
    root = Path(__file__).resolve().parents[2]
    code = "from workers.rollout.vllm import installed as i; f = i.find(); print(f and (f.version, str(f.root)))"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],  # -S: without what is installed
        env={"PYTHONPATH": f"{path}:{root}"},
        capture_output=True,
        text=True,
    )
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


def test_a_file_that_broke_off_is_named(tmp_path: Path) -> None:
    (tmp_path / "envs.py").write_text("names = (")
    with pytest.raises(ValueError, match=r"envs in .* is not whole"):
        Sources(tmp_path).names("envs")


def test_absent(tmp_path: Path) -> None:
    assert _find(tmp_path) == "None"


@pytest.mark.parametrize(
    "text", ["__version__ = version = '0.9.2+cpu'\n", '__version__ = "0.9.2+cpu"\n', "a = 1\n__version__ = '0.9.2+cpu'"]
)
def test_version_as_each_release_writes_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("raise ImportError('never imported')")
    (tmp_path / "vllm" / "_version.py").write_text(text)
    assert _find(tmp_path) == str(("0.9.2+cpu", str(tmp_path / "vllm")))


def test_an_installation_that_does_not_know_its_version(tmp_path: Path) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("")
    assert "says nowhere which version it is; install it again" in _find(tmp_path)
