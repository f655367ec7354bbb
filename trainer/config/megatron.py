"""Checks of what `strategy=megatron` asks for: sizes that fit the devices, and a Megatron-core to run.

What takes the model's own config to see (does tp divide its heads?) `trainer.inputs` asks of the engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from trainer.config.roles import TrainingRole
from trainer.config.schema import RefMegatronConfig
from trainer.diagnosis.check_packages import MEGATRON_THAT_RUNS, megatron_trouble

_SIZES = {name for name in RefMegatronConfig.model_fields if name.endswith("_size")}


def megatron_problems(roles: Sequence[tuple[TrainingRole, int]]) -> Iterator[str]:
    """What is wrong with the roles that Megatron runs. roles: all of them, each with its number of devices."""
    checked: list[tuple[dict[str, Any], int]] = []
    for role, num_devices in roles:
        if role.megatron is None:
            continue
        if not checked:
            yield from _installed(role)
        settings = role.megatron.model_dump(include=_SIZES), num_devices
        if settings not in checked:  # those of the actor, unless told otherwise: one mistake is told once
            yield from _sizes(role, role.megatron, num_devices)
            checked.append(settings)


def _sizes(role: TrainingRole, megatron: RefMegatronConfig, num_devices: int) -> Iterator[str]:
    key, per_model = role.engine_key, role.ranks_per_model
    tp, pp = megatron.tensor_model_parallel_size, megatron.pipeline_model_parallel_size
    if num_devices % per_model:
        yield (
            f"{key}.tensor_model_parallel_size={tp} x pipeline_model_parallel_size={pp}: {per_model} devices hold one "
            f"model, and do not divide the {num_devices} of {role.key}; change them, {role.key}.device_mapping, or "
            f"trainer.n_gpus_per_node; {_fitting(tp, pp, num_devices)} would fit"
        )
    chunks = megatron.virtual_pipeline_model_parallel_size
    if chunks is not None and pp == 1:
        yield (
            f"{key}.virtual_pipeline_model_parallel_size={chunks}: chunks of pipeline stages, and there is one stage; "
            f"set {key}.pipeline_model_parallel_size=2 or more, or leave it null"
        )
    ep, dp = megatron.expert_model_parallel_size, num_devices // per_model
    if num_devices % per_model == 0 and dp % ep:
        yield (
            f"{key}.expert_model_parallel_size={ep}: experts are spread over data-parallel devices, and {ep} does not "
            f"divide the {dp} of {role.key}; set it to a divisor of {dp}"
        )


def _fitting(tp: int, pp: int, num_devices: int) -> str:
    """Sizes at most these whose product divides the devices: the pipeline as it is, if it can be."""
    pipelines = [pp, *(size for size in range(pp - 1, 0, -1))]
    cuts = ((t, p) for p in pipelines for t in range(tp, 0, -1) if num_devices % (t * p) == 0)
    tensor, pipeline = next(cuts)
    return f"tensor_model_parallel_size={tensor} x pipeline_model_parallel_size={pipeline}"


def _installed(role: TrainingRole) -> Iterator[str]:
    try:
        found: str | None = version("megatron-core")
    except PackageNotFoundError:
        found = None
    trouble = megatron_trouble(found, has_triton=find_spec("triton") is not None)
    if trouble:
        yield f"{role.key}.strategy=megatron: {trouble}; {MEGATRON_THAT_RUNS.text}, or set {role.key}.strategy=fsdp"
