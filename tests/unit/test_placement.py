"""Placement that needs no cluster: capacity, threads, and which cluster is joined."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from trainer import nodes as ray_nodes
from trainer import placement
from trainer.config.errors import UserError
from trainer.config.load import load_config
from trainer.config.schema import Config
from trainer.nodes import RayNode, check_capacity, choose_nodes, living_nodes
from trainer.placement import Cluster, Device, connect, device_type

REQUIRED = ["data.train_files=train.jsonl", "actor_rollout_ref.model.path=org/model"]


def config(*overrides: str) -> Config:
    return load_config([*REQUIRED, *overrides])


def node(name: str, total: int, *, free: int | None = None, address: str = "10.0.0.1", driver: bool = False) -> RayNode:
    return RayNode(name, address, "ray.io/node-id", total, total if free is None else free, 8, driver)


@pytest.mark.parametrize(
    ("counts", "resource", "per_node", "needed"),
    [((2,), "CPU", 2, 1), ((8,), "GPU", 4, 1), ((8, 0, 8), "GPU", 8, 2), ((8,), "GPU", 8, 1)],
)
def test_a_cluster_that_has_enough(counts: tuple[int, ...], resource: str, per_node: int, needed: int) -> None:
    cluster = [node(f"n{i}", count) for i, count in enumerate(counts)]
    check_capacity(cluster, resource, per_node=per_node, nnodes=3, needed=needed)


@pytest.mark.parametrize(
    ("counts", "resource", "per_node", "nnodes", "remedy"),
    [
        ((2,), "CPU", 4, 1, "set trainer.n_gpus_per_node=2"),
        ((8,), "GPU", 8, 2, "set trainer.nnodes=1 or start more Ray nodes"),
        ((8, 4), "GPU", 8, 2, "set trainer.n_gpus_per_node=4"),
        ((0,), "GPU", 1, 1, "set trainer.device=cpu"),
        ((), "CPU", 1, 1, "start Ray nodes"),
    ],
)
def test_a_cluster_that_is_too_small_is_refused_at_once(
    counts: tuple[int, ...], resource: str, per_node: int, nnodes: int, remedy: str
) -> None:
    """The message names both keys and their values, what Ray has, and a setting that would work."""
    cluster = [node(f"n{i}", count) for i, count in enumerate(counts)]
    with pytest.raises(ValueError, match=f"trainer.nnodes={nnodes} x trainer.n_gpus_per_node={per_node}: ") as error:
        check_capacity(cluster, resource, per_node=per_node, nnodes=nnodes, needed=nnodes)
    assert f"{resource}s" in str(error.value)
    assert remedy in str(error.value)


def test_nodes_are_known_by_id_and_ordered_by_address_after_the_drivers(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but one share host name and address, as nodes on one machine do; a dead one does not count."""

    def told(name: str, address: str, *, alive: bool = True, **resources: float) -> dict[str, Any]:
        labels = {"ray.io/accelerator-type": "H200", "ray.io/node-id": name}
        return {"NodeID": name, "Alive": alive, "NodeManagerAddress": address, "Resources": resources, "Labels": labels}

    cluster = [
        told("ee", "10.0.0.10", CPU=4.0, GPU=8.0),
        told("cc", "10.0.0.9", CPU=4.0, GPU=8.0),
        told("bb", "10.0.0.9", CPU=4.0),
        told("dd", "10.0.0.9", CPU=9.0, GPU=2.0),
        told("aa", "10.0.0.1", alive=False),
    ]
    monkeypatch.setattr(ray_nodes.ray, "nodes", lambda: cluster)
    monkeypatch.setattr(ray_nodes.ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "dd"))
    monkeypatch.setattr(ray_nodes, "available_resources_per_node", lambda: {"cc": {"GPU": 3.0}, "dd": {"CPU": 1.0}})
    found = living_nodes("GPU")
    assert [each.node_id for each in found] == ["dd", "bb", "cc", "ee"]
    assert [(each.total, each.free, each.cpus) for each in found[:3]] == [(2, 0, 9), (0, 0, 4), (8, 3, 4)]
    assert {each.label for each in found} == {"ray.io/node-id"}


def test_each_node_of_the_mapping_is_a_node_of_its_own() -> None:
    """In order, but past those whose devices are taken; one that only has too few is never taken."""
    here, small, busy, free = (
        node("here", 8, driver=True),
        node("small", 4),
        node("busy", 8, free=1),
        node("free", 8),
    )
    cluster = [here, small, busy, free]

    def names(wanted: dict[int, int], nodes: list[RayNode] = cluster) -> dict[int, str]:
        return {number: each.node_id for number, each in choose_nodes(nodes, wanted, per_node=8).items()}

    assert names({0: 8}) == {0: "here"}
    assert names({1: 4, 0: 8}) == {0: "here", 1: "free"}
    assert names({0: 1, 3: 1}) == {0: "here", 3: "busy"}, "unused nodes of the mapping take none"
    assert names({0: 8, 1: 8, 2: 8}) == {0: "here", 1: "free", 2: "busy"}, "waits where there is no other"
    assert names({0: 2}, [busy]) == {0: "busy"}


def test_cores_are_shared_evenly() -> None:
    def threads(ranks: range | list[int], cores: int = 8, per_node: int = 9) -> int:
        devices = tuple(Device(cast(Any, None), i, i // per_node, i % per_node) for i in range(18))
        return Cluster("cpu", devices, cores, ()).threads(ranks)

    assert [threads(range(ranks)) for ranks in (1, 2, 3, 8, 9)] == [8, 4, 2, 1, 1]
    assert threads([0, 1, 9, 10]) == 4, "two on each node"
    assert threads([0, 9, 10]) == 4, "as many as on the node with the most"


@pytest.mark.parametrize(
    ("setting", "variable", "joined"),
    [
        ("10.0.0.1:6379", "auto", "10.0.0.1:6379"),
        (None, "10.0.0.2:6379", "10.0.0.2:6379"),
        (None, None, "local"),
    ],
)
def test_which_cluster_is_joined(
    setting: str | None, variable: str | None, joined: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The configuration first, then RAY_ADDRESS, else a local one."""
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(placement.ray, "init", lambda **arguments: asked.append(arguments))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if variable is not None:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    overrides = [f"ray_kwargs.ray_init.address={setting}"] if setting else []
    connect(config(*overrides, "ray_kwargs.ray_init.num_cpus=3"))
    assert asked[0]["address"] == joined
    assert ("num_cpus" in asked[0]) is (joined == "local"), "a cluster that exists brings its own"


@pytest.mark.parametrize(
    ("setting", "gpus", "expected"), [("auto", 0, "cpu"), ("auto", 2, "cuda"), ("cpu", 2, "cpu"), ("cuda", 0, "cuda")]
)
def test_devices_are_gpus_where_there_are_some(
    setting: str, gpus: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement.ray, "cluster_resources", lambda: {"CPU": 4.0} | ({"GPU": gpus} if gpus else {}))
    assert device_type(config(f"trainer.device={setting}")) == expected


def test_without_gloo_nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    placement.check_gloo()
    monkeypatch.setattr(placement.dist, "is_gloo_available", lambda: False)
    with pytest.raises(ValueError, match=r"PyTorch .* is built without gloo, .* install an ordinary build"):
        placement.check_gloo()


@pytest.mark.parametrize("role", ["actor_rollout_ref.ref", "critic"])
@pytest.mark.parametrize(
    ("actor", "other", "refused"),
    [
        ("0-3", "0-3", False),
        ("0-3", "4-7", False),
        ("0-3", "2-5", True),
        ("0-3", "[3,2,1,0]", True),
        ("0-7", "0", True),
        ("null", "0-3", True),
    ],
)
def test_training_roles_share_all_of_their_gpus_or_none(
    role: str, actor: str, other: str, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups of unequal devices are processes of their own, which cannot evict what another of them holds."""
    settings = [f"actor_rollout_ref.actor.device_mapping={actor}", f"{role}.device_mapping={other}"]
    settings += ["actor_rollout_ref.actor.use_kl_loss=true"] if role.endswith("ref") else ["critic.enable=true"]
    monkeypatch.setattr(placement, "living_nodes", lambda resource: [node("n0", int(resource == "CPU"))])
    for device in ("cuda", "cpu"):
        cfg = config(*settings, f"trainer.device={device}", "trainer.n_gpus_per_node=8")
        with pytest.raises(UserError if refused and device == "cuda" else ValueError) as error:
            placement.reserve(cfg)
        is_overlap = "neither could make room for the other" in str(error.value)
        assert is_overlap == (refused and device == "cuda")
        assert is_overlap == (" as well" in str(error.value))


def test_of_rays_traceback_the_last_line_is_told() -> None:
    error = ConnectionError("no")
    error.__cause__ = RuntimeError("Failed: Traceback (most recent call last):\n  File x\nRpcError: status 404.\n")
    assert placement._last_line(error) == "RpcError: status 404"
    assert placement._last_line(OSError("nobody there")) == "nobody there"
    assert placement._last_line(TimeoutError()) == "TimeoutError"
