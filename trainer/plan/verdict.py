"""What of a plan cannot work, and what comes close to that.

Refused is what does not fit although all is offloaded and recomputed that may be. Lengths are guesses: no response
may be as long as it is allowed to be. What depends on them is refused only where it is far off.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trainer.config.schema import Config
from trainer.plan.memory import PhaseMemory
from trainer.plan.predict import DeviceMemory
from trainer.plan.replica import ReplicaTerms
from trainer.shortage import remedies
from trainer.tracking.text import size

_ROLLOUT = "actor_rollout_ref.rollout"
_CALLS = {"start": "start", "generate": "generate", "annotate": "forward", "update": "update", "sync": "load_bucket"}
_RECOMPUTES = "enable_gradient_checkpointing=true"
_TOLERANCE = 1.15
"""A prediction that lengths decide is off by up to this."""
_NEAR = 0.95
"""Share of a device from which on the least that a phase takes is a near miss."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """problems: nothing can start; warnings: it may not."""

    problems: tuple[str, ...]
    warnings: tuple[str, ...]


def judge(cfg: Config, memory: Sequence[DeviceMemory], total: int | None, longest_cache_bytes: int) -> Verdict:
    """Of predictions for GPUs of `total` bytes. longest_cache_bytes: what the longest sequence takes of a KV cache."""
    if total is None:
        return Verdict((), ())
    problems: dict[str, None] = {}
    warnings: dict[str, None] = {}
    for devices in memory:
        if devices.replica is not None:
            _judge_cache(cfg, devices.replica, total, longest_cache_bytes, problems, warnings)
        for phase, found in devices.phases.items():
            if phase == "asleep" or (phase == "sync" and _is_told(devices, problems, warnings)):
                continue
            if found.firm > total or found.floor > _TOLERANCE * total:
                problems[_told(cfg, devices, phase, found, total, "needs")] = None
            elif found.floor > _NEAR * total:
                warnings[_told(cfg, devices, phase, found, total, "may need")] = None
    return Verdict(tuple(problems), tuple(warnings))


def _judge_cache(
    cfg: Config,
    replica: ReplicaTerms,
    total: int,
    longest: int,
    problems: dict[str, None],
    warnings: dict[str, None],
) -> None:
    """vLLM refuses to start where not one sequence fits into its cache."""
    rollout = cfg.actor_rollout_ref.rollout
    length = rollout.max_model_len or cfg.max_sequence_length
    if rollout.kv_cache_gb is not None:
        share, room = f"{_ROLLOUT}.kv_cache_gb={rollout.kv_cache_gb}", replica.kv_cache
    else:
        share = f"{_ROLLOUT}.gpu_memory_utilization={rollout.gpu_memory_utilization}"
        room = int(rollout.gpu_memory_utilization * total) - replica.weights
    more = _raised(cfg, replica, total, longest)
    wanted = f"the KV cache of one sequence of {length} tokens takes {size(longest)}"
    if room < longest:
        left = f"{size(max(0, room))} of {size(total)} are left for it beside weights of {size(replica.weights)}"
        problems[
            f"{share}: {wanted}, and {left}; {more}, lower data.max_response_length ({_ROLLOUT}.max_model_len), or "
            f"raise {_ROLLOUT}.tensor_model_parallel_size (now {rollout.tensor_model_parallel_size})"
        ] = None
    elif replica.kv_cache < longest:
        warnings[f"{share}: {wanted}, and about {size(replica.kv_cache)} will be left; {more}"] = None


def _raised(cfg: Config, replica: ReplicaTerms, total: int, longest: int) -> str:
    """What to raise the cache to."""
    if cfg.actor_rollout_ref.rollout.kv_cache_gb is not None:
        return f"raise it to {math.ceil(longest / (1 << 30) * 100) / 100:g} or more"
    needed = replica.weights + replica.activations + replica.context + longest
    share = math.ceil(needed / total * 20) / 20
    return f"raise it to {share:g} or more" if share < 1 else "take a larger GPU"


def _is_told(devices: DeviceMemory, problems: Mapping[str, None], warnings: Mapping[str, None]) -> bool:
    """A replica that is too large to generate is so while it gets weights, and what helps is told there."""
    where = f"({spans(devices.devices)})"
    return any(": generate" in text and where in text for text in (*problems, *warnings))


def _told(cfg: Config, devices: DeviceMemory, phase: str, found: PhaseMemory, total: int, needs: str) -> str:
    """The figures, and the keys that would help, what costs least first."""
    whose = f" of the {'reference' if found.role == 'ref' else found.role}" if found.role else ""
    is_critic = found.role == "critic"
    key = "critic.model.path" if is_critic else "actor_rollout_ref.model.path"
    path = cfg.critic.model.path if is_critic else cfg.actor_rollout_ref.model.path
    keys = list(dict.fromkeys(remedies(cfg, _CALLS[phase], found.role or "actor", device="cuda")))
    keys = [each for each in keys if not (_RECOMPUTES in each and each.endswith("(now auto)"))]  # it is counted already
    help_ = f"; {', or '.join(keys)}" if keys else ""
    return (
        f"{key}={path}: {phase}{whose} {needs} {size(found.floor)} of a GPU's {size(total)} "
        f"({spans(devices.devices)}) with all offloaded and recomputed that may be{help_}"
    )


def spans(devices: Sequence[int]) -> str:
    """Device numbers for people: "GPU 0", "GPUs 0-3, 6"."""
    ranges: list[list[int]] = []
    for device in sorted(devices):
        if ranges and device == ranges[-1][1] + 1:
            ranges[-1][1] = device
        else:
            ranges.append([device, device])
    shown = ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in ranges)
    return f"GPU{'s' if len(devices) > 1 else ''} {shown}"


def longest_cache(cfg: Config, per_token: int) -> int:
    """Bytes that one sequence of the greatest length takes of a replica's cache, on each of its devices."""
    rollout = cfg.actor_rollout_ref.rollout
    return (rollout.max_model_len or cfg.max_sequence_length) * per_token
