"""Joining a Ray cluster that is already there; and the same numbers however the work is split."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import NO_VALIDATION, Outcome, end_processes, run, started_by, wait_until

LOOK = """
import json, ray
ray.init(logging_level="error")
print(json.dumps({"total": ray.cluster_resources(), "free": ray.available_resources(),
                  "nodes": [node["Alive"] for node in ray.nodes()]}))
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """A Ray cluster of our own with two CPUs, guarded by a token: the environment in which a user joins it."""
    token = {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with socket.socket() as probe, tempfile.TemporaryDirectory(prefix="tray") as directory:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
        probe.close()
        command = f"start --head --block --num-cpus=2 --include-dashboard=false --temp-dir={directory}"
        arguments = [*command.split(), "--node-ip-address=127.0.0.1", f"--port={address.split(':')[1]}"]
        head = subprocess.Popen(
            [str(Path(sys.executable).with_name("ray")), *arguments, "--min-worker-port=0", "--max-worker-port=0"],
            env={**os.environ, **token, "RAY_AUTH_MODE": "token"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            wait_until(lambda: _listens(address), 60, "the cluster to start")
            yield {"RAY_ADDRESS": address, **token}
            assert head.poll() is None, "the cluster must outlive the runs that joined it"
        finally:
            head.send_signal(signal.SIGTERM)
            try:
                head.wait(20)
            finally:
                end_processes(started_by(head.pid, "no run"))


@pytest.fixture(scope="module")
def joined_run(runs: Path, cluster: dict[str, str]) -> Outcome:
    """Three steps of the main run on that cluster, with the work of an update split in quite another way."""
    outcome = run(
        runs / "joined",
        *NO_VALIDATION,
        "trainer.total_training_steps=3",
        "actor_rollout_ref.model.share_prompt=false",
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=64",
        environment=cluster,
    )
    assert outcome.status == 0, outcome.told
    return outcome


def test_the_cluster_is_used_and_stays_up(joined_run: Outcome, cluster: dict[str, str]) -> None:
    environment = {**os.environ, **cluster, "RAY_AUTH_MODE": "token"}
    looked = subprocess.run(
        [sys.executable, "-c", LOOK], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    state = json.loads(looked.stdout.splitlines()[-1])
    assert state["nodes"] == [True]
    assert state["total"]["CPU"] == 2
    assert state["free"]["CPU"] == 2, "the run gave its devices back"


def test_gradients_do_not_depend_on_the_split(joined_run: Outcome, main_run: Outcome) -> None:
    """Prompts computed once per response and not once per group, in many micro-batches and not one: same training."""
    for mine, theirs in zip(joined_run.steps(), main_run.steps(), strict=False):
        assert mine["reward/mean"] == theirs["reward/mean"], mine["step"]
        for name in ("actor/pg_loss", "actor/grad_norm", "advantage/std", "response_length/mean"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-5), (mine["step"], name)


def _listens(address: str) -> bool:
    host, port = address.split(":")
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
    except OSError:
        return False
    return True
