"""Checkpoints are complete or not there: failing writers, full disks, kills, damage, pruning, other models."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer import checkpoint
from trainer.checkpoint import Checkpoint, CheckpointError

ROOT = Path(__file__).resolve().parents[2]
MODEL: dict[str, Any] = {"architectures": ["Qwen2ForCausalLM"], "hidden_size": 192}
Writer = Callable[[Path], None]


def fill(text: str = "weights") -> Writer:
    """A writer of two files, one in a directory of its own."""

    def write(directory: Path) -> None:
        (directory / "model.bin").write_text(text)
        (directory / "deep").mkdir()
        (directory / "deep" / "optimizer.bin").write_text(text * 3)

    return write


def write(root: Path, step: int, *, writer: Writer | None = None, keep: int | None = None) -> Path:
    writers = {"actor": writer or fill(), "critic": fill("values")}
    return checkpoint.write(root, step, state={"step": step}, fingerprint=MODEL, writers=writers, keep=keep)


def latest(root: Path) -> Checkpoint | None:
    return checkpoint.choose(root, "auto", None, MODEL)


def latest_step(root: Path) -> int | None:
    chosen = latest(root)
    return None if chosen is None else chosen.step


def contents(root: Path) -> dict[str, bytes]:
    """Every file below, hidden ones too."""
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_what_is_written_can_be_read(tmp_path: Path) -> None:
    path = write(tmp_path / "checkpoints", 40)
    assert path.name == "step_000040"
    assert latest(tmp_path / "checkpoints") == Checkpoint(path, 40, {"step": 40}, MODEL)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["files"] == {
        "actor/deep/optimizer.bin": 21,
        "actor/model.bin": 7,
        "critic/deep/optimizer.bin": 18,
        "critic/model.bin": 6,
    }


def test_without_checkpoints_a_run_starts_anew(tmp_path: Path) -> None:
    assert latest(tmp_path / "nowhere") is None
    write(tmp_path, 1)
    assert checkpoint.choose(tmp_path, "disable", None, MODEL) is None


def test_the_newest_is_chosen(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        write(tmp_path, step)
    assert latest_step(tmp_path) == 100


def test_a_path_can_be_chosen(tmp_path: Path) -> None:
    path = write(tmp_path, 3)
    write(tmp_path, 4)
    chosen = checkpoint.choose(tmp_path, "resume_path", str(path), MODEL)
    assert chosen is not None
    assert chosen.step == 3
    with pytest.raises(ValueError, match=r"trainer\.resume_from_path=.*no complete checkpoint there"):
        checkpoint.choose(tmp_path, "resume_path", str(tmp_path), MODEL)


def test_a_writer_that_raises_leaves_everything_as_it_was(tmp_path: Path) -> None:
    def fail(directory: Path) -> None:
        fill()(directory)
        raise RuntimeError("rank 1 is gone")

    root = tmp_path / "checkpoints"
    path = write(root, 1)
    before = contents(root)
    with pytest.raises(CheckpointError, match="checkpoint of step 2 could not be written") as error:
        write(root, 2, writer=fail)
    message = str(error.value)
    assert "rank 1 is gone" in message
    assert f"the last good one is {path}" in message
    assert "trainer.default_local_dir" in message
    assert contents(root) == before
    assert latest_step(root) == 1


def test_the_first_one_failing_says_that_there_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="there is none before it"):
        write(tmp_path / "file" / "checkpoints", 1)


def test_writing_a_step_again_replaces_it(tmp_path: Path) -> None:
    write(tmp_path, 5)
    write(tmp_path, 5, writer=fill("newer"))
    assert (tmp_path / "step_000005" / "actor" / "model.bin").read_text() == "newer"
    assert latest_step(tmp_path) == 5


SMALL_DISK = """
import resource, sys
from pathlib import Path
from trainer import checkpoint

root, part = Path(sys.argv[1]), sys.argv[2]
def fill(directory):
    (directory / "model.bin").write_bytes(b"x" * (1 << 16 if part == "writer" else 100))
state = {"text": "y" * (1 << 16 if part == "manifest" else 100)}
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 15, 1 << 15))
try:
    checkpoint.write(root, 2, state=state, fingerprint={}, writers={"actor": fill}, keep=1)
except checkpoint.CheckpointError as error:
    print(error)
    raise SystemExit(3)
"""


@pytest.mark.parametrize("part", ["writer", "manifest"])
def test_a_disk_that_takes_no_more_keeps_the_last_good_one(part: str, tmp_path: Path) -> None:
    """A limit on file sizes stands for a full disk: both make the write itself fail half way."""
    write(tmp_path, 1)
    before = contents(tmp_path)
    result = subprocess.run(
        [sys.executable, "-c", SMALL_DISK, str(tmp_path), part], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 3, result.stderr
    assert "File too large" in result.stdout
    assert "trainer.default_local_dir" in result.stdout
    assert "step_000001" in result.stdout
    assert contents(tmp_path) == before
    assert latest_step(tmp_path) == 1


KILLED = """
import sys, time
from pathlib import Path
from trainer import checkpoint

def fill(directory):
    (directory / "model.bin").write_text("half")
    print("half", flush=True)
    time.sleep(60)
checkpoint.write(Path(sys.argv[1]), 2, state={}, fingerprint={}, writers={"actor": fill}, keep=None)
"""


def test_a_kill_in_the_middle_of_a_write(tmp_path: Path) -> None:
    write(tmp_path, 1)
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        process.send_signal(signal.SIGKILL)
    assert latest_step(tmp_path) == 1
    write(tmp_path, 3)
    assert latest_step(tmp_path) == 3
    assert sorted(os.listdir(tmp_path)) == ["step_000001", "step_000003"], "what the kill left is gone"


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize("name", ["actor/model.bin", "critic/deep/optimizer.bin", "manifest.json"])
@pytest.mark.parametrize("damage", [Path.unlink, cut], ids=["missing", "cut"])
def test_a_damaged_checkpoint_is_passed_over(damage: Callable[[Path], None], name: str, tmp_path: Path) -> None:
    write(tmp_path, 1)
    damaged = write(tmp_path, 2)
    damage(damaged / name)
    assert latest_step(tmp_path) == 1
    assert checkpoint.read(damaged) is None


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", '{"files": {}}', '{"files": {}, "format": 99}'])
def test_a_manifest_that_is_none_is_passed_over(text: str, tmp_path: Path) -> None:
    write(tmp_path, 1)
    (write(tmp_path, 2) / "manifest.json").write_text(text)
    assert latest_step(tmp_path) == 1


def test_pruning_keeps_the_newest(tmp_path: Path) -> None:
    for step in range(1, 6):
        write(tmp_path, step, keep=2)
    assert [c.step for c in checkpoint.complete(tmp_path)] == [4, 5]
    assert sorted(os.listdir(tmp_path)) == ["step_000004", "step_000005"]


def test_pruning_happens_after_the_new_one_is_there(tmp_path: Path) -> None:
    def fail(_: Path) -> None:
        raise OSError("No space left on device")

    write(tmp_path, 1, keep=1)
    with pytest.raises(CheckpointError, match="No space left on device"):
        write(tmp_path, 2, writer=fail, keep=1)
    assert latest_step(tmp_path) == 1


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 1)
    with pytest.raises(ValueError, match="checkpoint of another model") as error:
        checkpoint.choose(tmp_path, "auto", None, MODEL | {"hidden_size": 256, "vocab_size": 128})
    message = str(error.value)
    assert "hidden_size: checkpoint 192, now 256" in message
    assert "vocab_size: checkpoint None, now 128" in message
    assert "architectures" not in message
    assert "actor_rollout_ref.model.path" in message
    assert "trainer.resume_mode=disable" in message


def test_a_checkpoint_of_another_engine_is_refused(tmp_path: Path) -> None:
    """Those written before there was a choice are FSDP's."""
    write(tmp_path, 1)
    assert checkpoint.choose(tmp_path, "auto", None, MODEL | {"actor_rollout_ref.actor.strategy": "fsdp"}) is not None
    with pytest.raises(ValueError, match=r"another model or engine .*strategy: checkpoint 'fsdp', now 'megatron'"):
        checkpoint.choose(tmp_path, "auto", None, MODEL | {"actor_rollout_ref.actor.strategy": "megatron"})
