"""Packaging of Tandem. `bash scripts/install.sh` installs it with everything it needs."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "trainer/_version.py").read_text()).group(1)


def requirements(name: str) -> list[str]:
    """Requirements of a file, without comments and references to other files."""
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    return [line.split(" #")[0].strip() for line in lines if line.strip() and not line.startswith(("#", "-", "."))]


setup(
    name="tandem-rl",
    version=VERSION,
    description="Distributed reinforcement learning for language models, on a laptop and on a cluster",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["trainer*", "workers*", "configs*"]),
    package_data={
        "trainer.tracking": ["assets/*"],
        "trainer.diagnosis": ["*.json"],
        "workers.rollout.vllm": ["*.json"],
        "configs": ["*.yaml", "**/*.yaml"],
    },
    install_requires=requirements("common.txt"),
    extras_require={
        "cpu": [r for r in requirements("cpu.txt")],
        "cuda": requirements("cuda.txt"),
        "dev": requirements("dev.txt"),
    },
)
