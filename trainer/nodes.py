"""Which Ray nodes a run takes, and in which order: the driver's first, the others by address.

A node is known by Ray's id of it: several may share an address or a host name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray
from ray._private.state import available_resources_per_node


@dataclass(frozen=True, slots=True)
class RayNode:
    """A living node. label: the key of Ray's label whose value is the node's own id. total, free: devices; cpus: cores.

    holds_driver: whether this process runs on it.
    """

    node_id: str
    address: str
    label: str
    total: int
    free: int
    cpus: int
    holds_driver: bool


def living_nodes(resource: str) -> list[RayNode]:
    """The cluster's nodes with their devices (`resource`: "CPU" or "GPU"), in the order in which they are taken."""
    free, here = available_resources_per_node(), ray.get_runtime_context().get_node_id()
    nodes = [
        RayNode(
            node_id=node["NodeID"],
            address=node["NodeManagerAddress"],
            label=next((key for key, value in node["Labels"].items() if value == node["NodeID"]), "ray.io/node-id"),
            total=int(node["Resources"].get(resource, 0)),
            free=int(free.get(node["NodeID"], {}).get(resource, 0)),
            cpus=int(node["Resources"].get("CPU", 1)),
            holds_driver=node["NodeID"] == here,
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    return sorted(nodes, key=lambda node: (not node.holds_driver, _natural(node.address), node.node_id))


def choose_nodes(nodes: Sequence[RayNode], wanted: Mapping[int, int], *, per_node: int) -> dict[int, RayNode]:
    """A node of its own for each node number of the mappings; one whose devices are free, while there is one.

    nodes: in the order in which they are taken; wanted: node number -> devices of it that roles use.
    per_node: devices that each must have. There must be enough such nodes.
    """
    left = [node for node in nodes if node.total >= per_node]
    chosen: dict[int, RayNode] = {}
    for number, count in sorted(wanted.items()):
        chosen[number] = next((node for node in left if node.free >= count), left[0])
        left.remove(chosen[number])
    return chosen


def check_capacity(nodes: Sequence[RayNode], resource: str, *, per_node: int, nnodes: int, needed: int) -> None:
    """Raises ValueError unless so many nodes (`needed`) have `per_node` devices. nnodes: as in the configuration."""
    counts = sorted((node.total for node in nodes), reverse=True)
    if sum(count >= per_node for count in counts) < needed:
        raise ValueError(
            f"trainer.nnodes={nnodes} x trainer.n_gpus_per_node={per_node}: Ray has {len(counts)} node(s) with "
            f"{counts} {resource}s; {_remedy(resource, counts, needed)}"
        )


def _remedy(resource: str, counts: Sequence[int], needed: int) -> str:
    """What to set so that it fits. counts: devices of each node, descending."""
    if not counts:
        return "start Ray nodes first"
    if not any(counts) and resource == "GPU":
        return "set trainer.device=cpu, or start Ray where its nodes have GPUs"
    if len(counts) < needed:
        return f"set trainer.nnodes={len(counts)} or start more Ray nodes"
    if counts[needed - 1]:
        return f"set trainer.n_gpus_per_node={counts[needed - 1]}"
    return f"set trainer.nnodes={sum(count > 0 for count in counts)}"


def _natural(address: str) -> list[tuple[int, str]]:
    """Orders 10.0.0.9 before 10.0.0.10."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", address)]
