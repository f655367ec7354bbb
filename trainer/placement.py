"""Roles onto devices: a Ray cluster, one placement group per node, one bundle per device.

A device is a GPU, or a worker slot of one CPU where there is none. Devices are numbered globally, node by node. Actors
of several roles on one device share it in time; each takes its device by number, so Ray's bundles only reserve it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ray
import torch
import torch.distributed as dist
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from trainer.config.schema import Config
from trainer.config.validate import check_shared_devices

DeviceType = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True)
class Device:
    """One device of the cluster: its bundle, and its number on its node (a CUDA device index; 0 on CPU)."""

    group: PlacementGroup
    bundle: int
    node: int
    local_index: int


@dataclass(frozen=True, slots=True)
class Cluster:
    """The reserved devices, in global order."""

    device_type: DeviceType
    devices: tuple[Device, ...]
    cpus_per_node: int
    groups: tuple[PlacementGroup, ...]

    def threads(self, num_ranks: int) -> int:
        """CPU threads each of `num_ranks` training processes may use: the cores of its node, shared evenly."""
        return max(1, self.cpus_per_node * len(self.groups) // num_ranks)

    def release(self) -> None:
        """Gives the devices back."""
        for group in self.groups:
            remove_placement_group(group)


def connect(cfg: Config) -> None:
    """Joins the cluster at ray_kwargs.ray_init.address or RAY_ADDRESS, or starts a local one that ends with us.

    Raises ValueError if there is no cluster at that address.
    """
    settings = cfg.ray_kwargs.ray_init
    address = settings.address or os.environ.get("RAY_ADDRESS")
    quiet: dict[str, Any] = {"logging_level": "error", "log_to_driver": True}
    if address:
        key = "ray_kwargs.ray_init.address" if settings.address else "RAY_ADDRESS"
        try:
            _knock(address)
            ray.init(address=address, **quiet)
        except OSError as error:  # ConnectionError, from Ray, is one
            raise ValueError(
                f"{key}={address}: cannot join a Ray cluster there: {error.__cause__ or error}; start it, correct the "
                f"address, or leave {key} out for a local cluster"
            ) from error
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray.init(address="local", num_cpus=settings.num_cpus, include_dashboard=False, **quiet)


def _knock(address: str) -> None:
    """Raises OSError if nothing listens at host:port, which Ray takes minutes to say."""
    host, _, port = address.rpartition(":")
    if port.isdigit() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def device_type(cfg: Config) -> DeviceType:
    """trainer.device, with `auto` meaning CUDA if the cluster has GPUs."""
    if cfg.trainer.device != "auto":
        return cfg.trainer.device
    return "cuda" if ray.cluster_resources().get("GPU", 0) > 0 else "cpu"


def reserve(cfg: Config) -> Cluster:
    """Reserves nnodes x n_gpus_per_node devices.

    Raises ValueError at once where the cluster does not have them, roles cannot share them, or PyTorch cannot connect
    them, and where they do not come free in trainer.startup_timeout_s.
    """
    check_gloo()
    kind = device_type(cfg)
    if kind == "cuda":
        check_shared_devices(cfg)
    resource = "GPU" if kind == "cuda" else "CPU"
    per_node, nnodes = cfg.trainer.n_gpus_per_node, cfg.trainer.nnodes
    _check_capacity(resource, per_node, nnodes)
    bundle = {"CPU": 1.0, "GPU": 1.0} if kind == "cuda" else {"CPU": 1.0}
    groups = tuple(placement_group([bundle] * per_node, strategy="STRICT_PACK") for _ in range(nnodes))
    _wait_for(groups, cfg.trainer.startup_timeout_s, resource)
    devices = [
        Device(group, number, node, local)
        for node, group in enumerate(groups)
        for number, local in enumerate(_local_indices(group, per_node, kind))
    ]
    cpus = int(min(n["Resources"].get("CPU", 1) for n in ray.nodes() if n["Alive"]))
    return Cluster(kind, tuple(devices), cpus, groups)


def start(actor: type, device: Device, *args: object, concurrency_groups: dict[str, int] | None = None) -> Any:
    """Starts an actor of a plain class beside a device's bundle. concurrency_groups: threads of each, by name."""
    strategy = PlacementGroupSchedulingStrategy(device.group, placement_group_bundle_index=device.bundle)
    options: dict[str, Any] = {"num_cpus": 0, "num_gpus": 0, "scheduling_strategy": strategy}
    if concurrency_groups:
        options["concurrency_groups"] = concurrency_groups  # Ray takes them here, and refuses them in .options()
    return ray.remote(**options)(actor).remote(*args)


def check_gloo() -> None:
    """Raises ValueError without gloo: training ranks on CPUs talk through it, and those on GPUs about the host."""
    if not (dist.is_available() and dist.is_gloo_available()):
        raise ValueError(
            f"trainer.device: PyTorch {torch.__version__} is built without gloo, through which training processes "
            "talk; install an ordinary build of PyTorch (bash scripts/install.sh)"
        )


def _check_capacity(resource: str, per_node: int, nnodes: int) -> None:
    counts = sorted((int(n["Resources"].get(resource, 0)) for n in ray.nodes() if n["Alive"]), reverse=True)
    enough = [c for c in counts if c >= per_node]
    if len(enough) >= nnodes:
        return
    raise ValueError(
        f"trainer.nnodes={nnodes} x trainer.n_gpus_per_node={per_node}: Ray has {len(counts)} node(s) with "
        f"{counts} {resource}s; {_remedy(resource, counts, nnodes)}"
    )


def _remedy(resource: str, counts: Sequence[int], nnodes: int) -> str:
    """What to set so that it fits. counts: devices of each node, descending."""
    if not counts:
        return "start Ray nodes first"
    if not any(counts) and resource == "GPU":
        return "set trainer.device=cpu, or start Ray where its nodes have GPUs"
    if len(counts) < nnodes:
        return f"set trainer.nnodes={len(counts)} or start more Ray nodes"
    if counts[nnodes - 1]:
        return f"set trainer.n_gpus_per_node={counts[nnodes - 1]}"
    return f"set trainer.nnodes={sum(count > 0 for count in counts)}"


def _wait_for(groups: Sequence[PlacementGroup], timeout_s: float, resource: str) -> None:
    pending = [g.ready() for g in groups]
    _, late = ray.wait(pending, num_returns=len(pending), timeout=min(timeout_s, 60.0))
    if late:
        free = int(ray.available_resources().get(resource, 0))
        for group in groups:
            remove_placement_group(group)
        raise ValueError(
            f"trainer.n_gpus_per_node: the cluster has the {resource}s asked for, but only {free} are free; "
            "another job holds them: end it, or ask for fewer devices"
        )


def _local_indices(group: PlacementGroup, count: int, kind: DeviceType) -> list[int]:
    """CUDA device numbers of the bundles, which only a process inside the bundle can tell."""
    if kind == "cpu":
        return [0] * count
    probe = ray.remote(num_cpus=0, num_gpus=1)(_visible_gpu)
    refs = [
        probe.options(
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=i)
        ).remote()
        for i in range(count)
    ]
    return [int(i) for i in ray.get(refs, timeout=120)]


def _visible_gpu() -> str:
    return str(ray.get_runtime_context().get_accelerator_ids()["GPU"][0])
