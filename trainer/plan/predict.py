"""Predicted memory of all devices of a run, from its configuration and the models' configs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from trainer.config.mapping import frees_cache, is_shared, replica_devices
from trainer.config.roles import RoleName
from trainer.config.schema import Config
from trainer.engines import offloads
from trainer.plan.layout import Layout
from trainer.plan.memory import DeviceUse, PhaseMemory, Tenant, predict
from trainer.plan.places import RankPlace, training_places
from trainer.plan.replica import COLLECTIVE_BYTES, ReplicaTerms, replica_terms
from trainer.plan.training import engine_terms


@dataclass(frozen=True, slots=True)
class Models:
    """Layouts: of the language model, and of the critic's with its scalar head (None: there is no critic)."""

    language: Layout
    critic: Layout | None

    def of(self, role: RoleName) -> Layout:
        """Of a training role."""
        if role != "critic":
            return self.language
        assert self.critic is not None
        return self.critic


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Devices that do the same, and each one's memory by phase. replica: None: they do not generate."""

    devices: tuple[int, ...]
    roles: tuple[str, ...]
    phases: Mapping[str, PhaseMemory]
    replica: ReplicaTerms | None


def predict_devices(
    cfg: Config, models: Models, total: int | None, *, annotates: tuple[RoleName, ...]
) -> tuple[DeviceMemory, ...]:
    """Every device that a role uses, alike ones together. total: bytes of a GPU; None: not known.

    annotates: the roles with a pass over the batch before the update.
    """
    uses = device_uses(cfg, models, total, annotates=annotates)
    groups: dict[int, list[int]] = {}
    kinds: list[DeviceUse] = []
    for device, use in sorted(uses.items()):
        if use not in kinds:
            kinds.append(use)
        groups.setdefault(kinds.index(use), []).append(device)
    return tuple(
        DeviceMemory(tuple(devices), _roles(kinds[number]), predict(kinds[number], total), kinds[number].replica)
        for number, devices in groups.items()
    )


def device_uses(
    cfg: Config, models: Models, total: int | None, *, annotates: tuple[RoleName, ...]
) -> dict[int, DeviceUse]:
    """Who is on each device that anybody uses."""
    replica, generating = replica_terms(cfg, models.language, total), replica_devices(cfg)
    places = training_places(cfg)
    asleep = {device for each in generating if _sleeps(cfg, each) for device in each}
    devices = {device for devices in generating for device in devices} | {place.device for place in places}
    uses = {}
    for device in devices:
        here = [place for place in places if place.device == device]
        uses[device] = DeviceUse(
            tenants=tuple(_tenant(cfg, models, place, total) for place in here),
            annotates=annotates,
            replica=replica if any(device in each for each in generating) else None,
            sleeps=device in asleep,
            sync_buffers=_sync_buffers(cfg, models.language, places, generating) if here else 0,
            collectives=COLLECTIVE_BYTES if any(p.num_ranks > 1 or p.role.megatron for p in here) else 0,
        )
    return uses


def _sleeps(cfg: Config, devices: tuple[int, ...]) -> bool:
    """Whether the replica on these devices gives memory back."""
    rollout = cfg.actor_rollout_ref.rollout
    return rollout.sleep_level != 0 and frees_cache(rollout, shared=is_shared(cfg, devices))


def _tenant(cfg: Config, models: Models, place: RankPlace, total: int | None) -> Tenant:
    name = place.role.name
    layout = models.of(name)
    return Tenant(name, engine_terms(cfg, place, layout, total), offloads(place.role))


def _sync_buffers(cfg: Config, layout: Layout, places: list[RankPlace], generating: tuple[tuple[int, ...], ...]) -> int:
    """Of the GPU's memory where one rank and every replica share it, else weights travel through host memory.

    Two buffers that take turns, each as large as the largest bucket it had.
    """
    actors = {place.device for place in places if place.role.name == "actor"}
    if len(actors) != 1 or actors != {device for devices in generating for device in devices}:
        return 0
    rollout = cfg.actor_rollout_ref.rollout
    itemsize = 4 if rollout.dtype == "float32" else 2
    limit, buckets = rollout.update_weights_bucket_megabytes << 20, [0]
    for tensor in layout.tensors:
        size = 0 if tensor.is_copy else tensor.numel * itemsize
        if buckets[-1] and buckets[-1] + size > limit:
            buckets.append(0)
        buckets[-1] += size
    return max(buckets[0::2], default=0) + max(buckets[1::2], default=0)


def _roles(use: DeviceUse) -> tuple[str, ...]:
    return (*(tenant.name for tenant in use.tenants), *(["rollout"] if use.replica else []))
