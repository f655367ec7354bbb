"""Megatron's process groups. It keeps them in module globals, one set per process.

Here each ParallelSpec has its own set, so an actor may be cut differently from the reference beside it: every call into
an engine begins with `use`, which puts the engine's set into place.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from workers.engines.base import ParallelSpec


def _globals() -> dict[str, Any]:
    return {name: value for name, value in vars(parallel_state).items() if name.startswith("_") and name.isupper()}


_NOTHING = _globals()
_MADE: dict[tuple[dist.ProcessGroup, ParallelSpec], dict[str, Any]] = {}


def use(parallel: ParallelSpec) -> None:
    """Makes Megatron work with these groups; collective over all ranks the first time."""
    world = dist.group.WORLD
    assert world is not None
    key = world, replace(parallel, sequence=False)
    if key not in _MADE:
        vars(parallel_state).update(_NOTHING)
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
            expert_model_parallel_size=parallel.expert,
            create_gloo_process_groups=False,
            distributed_timeout_minutes=_timeout_minutes(world),
        )
        model_parallel_cuda_manual_seed(0, inference_rng_tracker=True)  # nothing here is random: it need not be tracked
        _MADE[key] = _globals()
    vars(parallel_state).update(_MADE[key])


def _timeout_minutes(group: dist.ProcessGroup) -> int:
    """The run's: Megatron's own is half an hour, and it counts in whole minutes."""
    backend = group._get_backend(group._device_types[0])
    return max(1, math.ceil(backend.options._timeout.total_seconds() / 60))
