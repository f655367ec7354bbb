"""All checks, in the order of the report. Each is a pure function: facts in, items out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from trainer.diagnosis import check_environment, check_gpu, check_packages, check_python, check_vllm
from trainer.diagnosis.facts import Facts
from trainer.diagnosis.items import BROKEN, Item, warning

Check = Callable[[Facts], Iterator[Item]]

OF_VLLM: tuple[Check, ...] = (
    check_python.python,
    check_gpu.torch_build,
    check_vllm.installation,
    check_vllm.compiled_code,
    check_vllm.known_faults,
    check_vllm.patches,
    check_packages.frameworks,
    check_packages.conflicts,
    check_packages.requirements,
    check_packages.torch_companions,
    check_packages.flash_attention,
    check_environment.variables,
)
"""What --check-vllm-compatibility runs."""

ALL: tuple[Check, ...] = (
    check_python.python,
    check_python.operating_system,
    check_gpu.driver,
    check_gpu.gpus,
    *OF_VLLM[1:-1],
    check_packages.optional,
    check_environment.variables,
    check_python.shared_memory,
    check_python.limits,
    check_python.memory,
    check_python.disk,
    check_python.ports,
)

AT_START: tuple[Check, ...] = (
    check_python.python,
    check_gpu.torch_build,
    check_vllm.installation,
    check_packages.frameworks,
    check_packages.conflicts,
    check_packages.torch_companions,
    check_environment.variables,
    check_python.shared_memory,
    check_python.limits,
)
"""Cheap ones, that tell what makes a run impossible; for `trainer.main`."""


def run(checks: Sequence[Check], facts: Facts) -> list[Item]:
    """The items of these checks. A check that fails itself is one warning: the others are still worth reading."""
    return [item for check in checks for item in _guarded(check, facts)]


def _guarded(check: Check, facts: Facts) -> list[Item]:
    try:
        return list(check(facts))
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        return [warning(check.__name__.replace("_", " "), f"this check failed: {said}", "please report it")]


def can_start(items: Sequence[Item]) -> bool:
    """Whether nothing stands against training."""
    return all(item.verdict != BROKEN for item in items)
