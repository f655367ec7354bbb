"""Placement that needs no cluster: capacity, threads, and which cluster is joined."""

from __future__ import annotations

from typing import Any

import pytest

from trainer import placement
from trainer.config.errors import UserError
from trainer.config.load import load_config
from trainer.config.schema import Config
from trainer.placement import Cluster, connect, device_type

REQUIRED = ["data.train_files=train.jsonl", "actor_rollout_ref.model.path=org/model"]


def config(*overrides: str) -> Config:
    return load_config([*REQUIRED, *overrides])


def nodes(*counts: dict[str, float], dead: int = 0) -> list[dict[str, Any]]:
    """What ray.nodes() says: one entry per node, dead ones too."""
    alive = [{"Alive": True, "Resources": resources} for resources in counts]
    return alive + [{"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}] * dead


@pytest.mark.parametrize(
    ("cluster", "resource", "per_node", "nnodes"),
    [
        (nodes({"CPU": 2.0}), "CPU", 2, 1),
        (nodes({"CPU": 8.0, "GPU": 8.0}), "GPU", 4, 1),
        (nodes({"CPU": 8.0, "GPU": 8.0}, {"CPU": 8.0}, {"CPU": 8.0, "GPU": 8.0}), "GPU", 8, 2),
    ],
)
def test_a_cluster_that_has_enough(
    cluster: list[dict[str, Any]], resource: str, per_node: int, nnodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement.ray, "nodes", lambda: cluster)
    placement._check_capacity(resource, per_node, nnodes)


@pytest.mark.parametrize(
    ("cluster", "resource", "per_node", "nnodes", "remedy"),
    [
        (nodes({"CPU": 2.0}), "CPU", 4, 1, "set trainer.n_gpus_per_node=2"),
        (nodes({"GPU": 8.0}, dead=1), "GPU", 8, 2, "set trainer.nnodes=1 or start more Ray nodes"),
        (nodes({"GPU": 8.0}, {"GPU": 4.0}), "GPU", 8, 2, "set trainer.n_gpus_per_node=4"),
        (nodes({"CPU": 2.0}), "GPU", 1, 1, "set trainer.device=cpu"),
        (nodes(dead=1), "CPU", 1, 1, "start Ray nodes"),
    ],
)
def test_a_cluster_that_is_too_small_is_refused_at_once(
    cluster: list[dict[str, Any]],
    resource: str,
    per_node: int,
    nnodes: int,
    remedy: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The message names both keys and their values, what Ray has, and a setting that would work."""
    monkeypatch.setattr(placement.ray, "nodes", lambda: cluster)
    with pytest.raises(ValueError, match=f"trainer.nnodes={nnodes} x trainer.n_gpus_per_node={per_node}: ") as error:
        placement._check_capacity(resource, per_node, nnodes)
    assert f"{resource}s" in str(error.value)
    assert remedy in str(error.value)


def test_cores_are_shared_evenly() -> None:
    assert [Cluster("cpu", (), 8, (None,)).threads(ranks) for ranks in (1, 2, 3, 8, 9)] == [8, 4, 2, 1, 1]  # type: ignore[arg-type]
    assert Cluster("cpu", (), 8, (None, None)).threads(4) == 4  # type: ignore[arg-type]


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
    [("0-3", "0-3", False), ("0-3", "4-7", False), ("0-3", "2-5", True), ("0-7", "0", True), ("null", "0-3", True)],
)
def test_training_roles_share_all_of_their_gpus_or_none(
    role: str, actor: str, other: str, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups of unequal devices are processes of their own, which cannot evict what another of them holds."""
    settings = [f"actor_rollout_ref.actor.device_mapping={actor}", f"{role}.device_mapping={other}"]
    settings += ["actor_rollout_ref.actor.use_kl_loss=true"] if role.endswith("ref") else ["critic.enable=true"]
    monkeypatch.setattr(placement.ray, "nodes", lambda: nodes({"CPU": 1.0, "GPU": 0.0}))
    for device in ("cuda", "cpu"):
        cfg = config(*settings, f"trainer.device={device}", "trainer.n_gpus_per_node=8")
        with pytest.raises(UserError if refused and device == "cuda" else ValueError) as error:
            placement.reserve(cfg)
        is_overlap = f"{role}.device_mapping=[" in str(error.value)
        assert is_overlap == (refused and device == "cuda")
        assert not is_overlap or "set both the same" in str(error.value)
