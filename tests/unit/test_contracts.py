"""The rules of the house, read off the source: who imports whom, no defaults outside configs/, no machine paths."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
VLLM_HOME = ROOT / "workers" / "rollout" / "vllm"
HEAVY = ("torch", "ray", "vllm", "transformers", "tensordict", "wandb", "pandas", "pyarrow")
MACHINE_PATHS = tuple(f"/{name}/" for name in ("work", "root"))
"""Put together here, so that this file does not contain them."""


def sources(*packages: str) -> list[Path]:
    found = [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]
    assert found
    return found


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import in a file, inside functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield node.lineno, str(node.module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            argument = node.args[0]
            if isinstance(argument, ast.Constant):
                yield node.lineno, str(argument.value)


def offences(paths: list[Path], package: str) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in paths
        for line, module in imports(path)
        if module.split(".")[0] == package
    ]


def test_workers_never_import_the_trainer() -> None:
    assert offences(sources("workers"), "trainer") == []


def test_only_the_rollout_imports_vllm() -> None:
    elsewhere = [path for path in sources("trainer", "workers") if VLLM_HOME not in path.parents]
    assert offences(elsewhere, "vllm") == []
    assert offences(sorted(VLLM_HOME.glob("*.py")), "vllm"), "the rule looks at the right place"


@pytest.mark.parametrize("package", ["trainer", "workers"])
def test_neither_imports_scripts_or_tests(package: str) -> None:
    for forbidden in ("scripts", "tests", "examples"):
        assert offences(sources(package), forbidden) == []


def test_only_its_engine_imports_megatron() -> None:
    """Whatever differs between its versions is in one folder, and what does not use it starts without it."""
    elsewhere = [p for p in sources("trainer", "workers") if "workers/engines/megatron" not in p.as_posix()]
    assert offences(elsewhere, "megatron") == []


def is_configuration(node: ast.expr) -> bool:
    """cfg, self.cfg, cfg.trainer, config.actor ...: a name of configuration anywhere along the dots."""
    names = ast.unparse(node).replace("()", "").split(".")
    return any(name in ("cfg", "config", "_cfg", "_config") for name in names)


def dynamic_reads(path: Path) -> Iterator[int]:
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        if isinstance(function, ast.Name) and function.id in ("getattr", "hasattr"):
            if is_configuration(node.args[0]):
                yield node.lineno
        elif isinstance(function, ast.Attribute) and function.attr == "get" and is_configuration(function.value):
            yield node.lineno


def test_configuration_is_read_by_attribute() -> None:
    """No getattr(cfg, ...) and no cfg.get(key, default): a default lives in configs/ and nowhere else."""
    found = [
        f"{path.relative_to(ROOT)}:{line}" for path in sources("trainer", "workers") for line in dynamic_reads(path)
    ]
    assert found == []


def test_the_rule_on_reads_sees_what_it_should(tmp_path: Path) -> None:
    bad = ["getattr(cfg, 'a')", "cfg.trainer.get('a', 1)", "hasattr(self.cfg.actor, 'x')", "self._config.get('a')"]
    good = ["getattr(torch, cfg.dtype)", "results.get('a')", "cfg.trainer.device"]
    file = tmp_path / "example.py"
    file.write_text("\n".join(bad + good))
    assert list(dynamic_reads(file)) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "module",
    ["trainer.main", "trainer.config.load", "workers.protocol", "workers.rollout.spec", "workers.reward.function"],
)
def test_what_starts_first_imports_nothing_heavy(module: str) -> None:
    program = f"import sys, {module}; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


def repository_files() -> list[Path]:
    """Files git knows or would take, or all outside hidden directories where there is no git."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.CalledProcessError):
        return [p for p in ROOT.rglob("*") if p.is_file() and not any(part.startswith(".") for part in p.parts)]
    return [path for name in listed.splitlines() if (path := ROOT / name).is_file()]


def test_no_file_names_a_path_of_some_machine() -> None:
    found = []
    for path in repository_files():
        text = path.read_bytes().decode("utf-8", errors="ignore")
        for number, line in enumerate(text.splitlines(), start=1):
            if any(name in line for name in MACHINE_PATHS):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert found == []
