"""Roles onto devices: a Ray cluster, and one placement group with a bundle for each device that a role uses.

A device is a GPU, or a worker slot of one CPU where there is none. Devices are numbered globally, node by node. Actors
of several roles on one device share it in time; each takes its device by number, so Ray's bundles only reserve it, on
the node that the number says.
"""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ray
import torch
import torch.distributed as dist
from ray.util import placement_group_table
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from trainer.config.mapping import check_shared_devices, used_devices
from trainer.config.schema import Config
from trainer.nodes import RayNode, check_capacity, choose_nodes, living_nodes

DeviceType = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True)
class Device:
    """One device: its bundle, the number of its node, and its own there (a CUDA device index; 0 on CPU).

    bundle None: no role uses it, and it is not reserved.
    """

    group: PlacementGroup
    bundle: int | None
    node: int
    local_index: int


@dataclass(frozen=True, slots=True)
class Cluster:
    """All devices that the configuration names, in global order. cpus_per_node: cores of the node with the fewest."""

    device_type: DeviceType
    devices: tuple[Device, ...]
    cpus_per_node: int
    groups: tuple[PlacementGroup, ...]

    def threads(self, ranks: Sequence[int]) -> int:
        """CPU threads each training process on these devices may use: the cores of a node, shared evenly."""
        busiest = max(Counter(self.devices[rank].node for rank in ranks).values())
        return max(1, self.cpus_per_node // busiest)

    def release(self) -> None:
        """Gives the devices back."""
        for group in self.groups:
            remove_placement_group(group)


def _last_line(error: Exception) -> str:
    """What happened, where Ray's message is a traceback."""
    lines = str(error.__cause__ or error).strip().splitlines()
    return lines[-1].rstrip(".") if lines else type(error).__name__


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
                f"{key}={address}: cannot join a Ray cluster there: {_last_line(error)}; start it, correct the "
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
    """Reserves the devices that roles use, of nnodes x n_gpus_per_node.

    Raises ValueError at once where the cluster does not have them, roles cannot share them, or PyTorch cannot connect
    them, and where they do not come free in trainer.startup_timeout_s.
    """
    check_gloo()
    kind = device_type(cfg)
    if kind == "cuda":
        check_shared_devices(cfg)
    resource = "GPU" if kind == "cuda" else "CPU"
    per_node, used = cfg.trainer.n_gpus_per_node, used_devices(cfg)
    wanted = Counter(rank // per_node for rank in used)
    nodes = living_nodes(resource)
    check_capacity(nodes, resource, per_node=per_node, nnodes=cfg.trainer.nnodes, needed=len(wanted))
    chosen = choose_nodes(nodes, wanted, per_node=per_node)
    group = _reserve(kind, [chosen[rank // per_node] for rank in used], cfg.trainer.startup_timeout_s, resource)
    indices = _local_indices(group, [rank // per_node for rank in used], kind)
    devices = [Device(group, None, rank // per_node, 0) for rank in range(cfg.num_devices)]
    for bundle, (rank, index) in enumerate(zip(used, indices, strict=True)):
        devices[rank] = Device(group, bundle, rank // per_node, index)
    return Cluster(kind, tuple(devices), min(node.cpus for node in chosen.values()), (group,))


def start(actor: type, device: Device, *args: object, concurrency_groups: dict[str, int] | None = None) -> Any:
    """Starts an actor of a plain class beside a device's bundle. concurrency_groups: threads of each, by name."""
    assert device.bundle is not None, "no role uses this device"
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


def _reserve(kind: DeviceType, places: Sequence[RayNode], timeout_s: float, resource: str) -> PlacementGroup:
    """A bundle on each of these nodes, all or none. Raises ValueError if they do not come free in time."""
    bundle = {"CPU": 1.0, "GPU": 1.0} if kind == "cuda" else {"CPU": 1.0}
    selectors = [{node.label: node.node_id} for node in places]
    group: PlacementGroup = placement_group([bundle] * len(places), strategy="PACK", bundle_label_selector=selectors)
    if not ray.wait([group.ready()], timeout=min(timeout_s, 60.0))[0]:
        remove_placement_group(group)
        free = sum(node.free for node in living_nodes(resource) if node.node_id in {place.node_id for place in places})
        raise ValueError(
            f"trainer.n_gpus_per_node: the cluster has the {resource}s asked for, but only {free} are free; "
            "another job holds them: end it, or ask for fewer devices"
        )
    placed: Mapping[int, str] = placement_group_table(group)["bundles_to_node_id"]
    assert [placed[number] for number in range(len(places))] == [node.node_id for node in places], placed
    return group


def _local_indices(group: PlacementGroup, nodes: Sequence[int], kind: DeviceType) -> list[int]:
    """CUDA device numbers for the bundles, ascending on each node. nodes: number of each bundle's.

    Only a process inside a bundle can tell which GPU it got.
    """
    if kind == "cpu":
        return [0] * len(nodes)
    probe = ray.remote(num_cpus=0, num_gpus=1)(_visible_gpu)
    refs = [
        probe.options(
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=i)
        ).remote()
        for i in range(len(nodes))
    ]
    found = sorted(zip(nodes, map(int, ray.get(refs, timeout=120)), strict=True))
    return [number for _, number in found]


def _visible_gpu() -> str:
    return str(ray.get_runtime_context().get_accelerator_ids()["GPU"][0])
