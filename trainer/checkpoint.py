"""Checkpoints: one directory, one manifest, complete or not there at all.

    checkpoints/step_000040/
        manifest.json    format, step, train state, model fingerprint, every file with its size; written last
        actor/ critic/   sharded model and optimizer state, loadable under any number of ranks
        hf_model/        a Hugging Face copy, if actor.checkpoint.save_contents has hf_model

A checkpoint is written under a hidden name and renamed when everything is on disk, so a directory named step_* is
complete however the program ended. Resuming takes the newest one whose files are all there.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMAT = 1
MANIFEST = "manifest.json"
_ONCE = {"actor_rollout_ref.actor.strategy": "fsdp", "critic.strategy": "fsdp"}
"""What checkpoints were made with that do not say so."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the ones before it are untouched."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint on disk. state: what `TrainState.state_dict` gave."""

    path: Path
    step: int
    state: dict[str, Any]
    fingerprint: dict[str, Any]


def write(
    root: Path,
    step: int,
    *,
    state: dict[str, Any],
    fingerprint: dict[str, Any],
    writers: Mapping[str, Callable[[Path], None]],
    keep: int | None,
) -> Path:
    """Writes checkpoint `step` below `root`; each writer fills one subdirectory. Removes all but the newest `keep`.

    Raises CheckpointError when the disk is full or a writer fails; nothing half-written stays, older ones are kept.
    """
    final = root / f"step_{step:06d}"
    partial = root / f".partial_step_{step:06d}"
    try:
        for unfinished in root.glob(".partial_step_*"):  # what a kill left, of whichever step
            shutil.rmtree(unfinished, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, fill in writers.items():
            (partial / name).mkdir()
            fill(partial / name)
        _write_manifest(partial, step, state, fingerprint)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(partial, final)
        _sync(root)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(_explain(root, step, error)) from error
    _prune(root, keep)
    return final


def complete(root: Path) -> list[Checkpoint]:
    """Checkpoints below `root` whose files are all there, oldest first."""
    found = [read(p) for p in sorted(root.glob("step_*")) if (p / MANIFEST).is_file()]
    return [c for c in found if c is not None]


def read(path: Path) -> Checkpoint | None:
    """The checkpoint in a directory, or None if its manifest or a file of it is missing, damaged or of another size."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        known = manifest["format"] == FORMAT
        intact = known and all((path / name).stat().st_size == size for name, size in manifest["files"].items())
        return Checkpoint(path, manifest["step"], manifest["state"], manifest["fingerprint"]) if intact else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def choose(
    root: Path, resume_mode: str, resume_from_path: str | None, fingerprint: dict[str, Any]
) -> Checkpoint | None:
    """The checkpoint to resume from, or None to start anew.

    Raises ValueError for a path that is no complete checkpoint, and for a checkpoint of another model.
    """
    if resume_mode == "disable":
        return None
    if resume_mode == "resume_path":
        chosen = read(Path(str(resume_from_path)))
        if chosen is None:
            raise ValueError(
                f"trainer.resume_from_path={resume_from_path}: no complete checkpoint there "
                f"(a directory with {MANIFEST} and every file it lists); choose another or set trainer.resume_mode=auto"
            )
    else:
        available = complete(root)
        chosen = available[-1] if available else None
    if chosen is not None:
        _check_fingerprint(chosen, fingerprint)
    return chosen


def _check_fingerprint(checkpoint: Checkpoint, fingerprint: dict[str, Any]) -> None:
    then = {key: made for key, made in _ONCE.items() if key in fingerprint} | checkpoint.fingerprint
    different = [
        f"{key}: checkpoint {then.get(key)!r}, now {fingerprint.get(key)!r}"
        for key in sorted(then.keys() | fingerprint.keys())
        if then.get(key) != fingerprint.get(key)
    ]
    if different:
        raise ValueError(
            f"{checkpoint.path} is a checkpoint of another model or engine ({'; '.join(different)}); use what it was "
            "made with (actor_rollout_ref.model.path, strategy), another trainer.default_local_dir, or "
            "trainer.resume_mode=disable"
        )


def _write_manifest(directory: Path, step: int, state: dict[str, Any], fingerprint: dict[str, Any]) -> None:
    files = {str(p.relative_to(directory)): p.stat().st_size for p in sorted(directory.rglob("*")) if p.is_file()}
    manifest = {"format": FORMAT, "step": step, "state": state, "fingerprint": fingerprint, "files": files}
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in (*directory.rglob("*"), directory):
        _sync(path)


def _sync(path: Path) -> None:
    """Waits until a file, or a directory's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prune(root: Path, keep: int | None) -> None:
    if keep is not None:
        for old in complete(root)[: -keep or None]:
            shutil.rmtree(old.path, ignore_errors=True)


def _explain(root: Path, step: int, error: Exception) -> str:
    available = complete(root)
    last = f"the last good one is {available[-1].path}" if available else "there is none before it"
    free = shutil.disk_usage(root if root.exists() else Path("/")).free
    return (
        f"checkpoint of step {step} could not be written below {root} ({free / 1e9:.1f} GB free): {error}; {last}. "
        "Free space, or set trainer.default_local_dir elsewhere or trainer.max_actor_ckpt_to_keep, and run the same "
        "command to resume"
    )
