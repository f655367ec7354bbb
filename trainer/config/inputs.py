"""Checks of what the configuration points to: the model directory, the data files, the reward function.

All of it happens on the driver, before any actor starts. Only `check_reward_function` runs code of the user's.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Sequence
from pathlib import Path

from trainer.config.errors import UserError, show
from workers.reward.function import RewardSpec, load_reward_function

DATA_SUFFIXES = (".parquet", ".jsonl", ".json", ".ndjson")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
)
WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")

_MODEL = "actor_rollout_ref.model.path"
_TOKENIZER = "actor_rollout_ref.model.tokenizer_path"


def check_model_path(path: str, tokenizer_path: str, *, key: str = _MODEL, tokenizer_key: str = _TOKENIZER) -> None:
    """Raise ValueError unless `path` is a hub name or holds a Hugging Face checkpoint with a tokenizer.

    A hub name (`gpt2`, `org/name`) is left alone; whatever exists or looks like a local path must be a directory with
    config.json and weights, and with the tokenizer's files unless `tokenizer_path` names another place.
    """
    directory = _local_directory(path, key)
    if directory is not None:
        _check_model_config(directory, key)
        if not any(found for pattern in WEIGHT_PATTERNS for found in directory.glob(pattern)):
            raise UserError(f"{key}={path}: holds no weights ({' or '.join(WEIGHT_PATTERNS)}); save the model there")
    place = _local_directory(tokenizer_path, tokenizer_key)
    if place is not None and not any((place / name).is_file() for name in TOKENIZER_FILES):
        where = key if tokenizer_path == path else tokenizer_key
        raise UserError(
            f"{where}={tokenizer_path}: holds no tokenizer ({', '.join(TOKENIZER_FILES[:3])}, ...); save the tokenizer "
            f"there, or name its directory in {tokenizer_key}"
        )


def find_data_files(files: Sequence[str], key: str) -> tuple[Path, ...]:
    """Return the files that paths and globs expand to, sorted within each glob.

    Raises ValueError for a path that does not exist, a glob without a match, a directory, or an unknown format.
    """
    found: list[Path] = []
    for name in files:
        matches = [name] if Path(name).exists() else sorted(glob.glob(name, recursive=True))
        if not matches:
            wrong = "no file matches" if glob.has_magic(name) else "no such file"
            raise UserError(f"{key}={name}: {wrong} (looked from {Path.cwd()}); give a path, a glob or a list of them")
        found.extend(_check_data_file(Path(match), key) for match in matches)
    return tuple(found)


def check_reward_function(path: str | None, name: str) -> None:
    """Raise ValueError unless the function `name` can be imported from `path`, a file or a module; None is fine.

    It is imported for real, as the reward processes will: an import error must show here and not in a worker.
    """
    load_reward_function(RewardSpec(path, name))


def _local_directory(path: str, key: str) -> Path | None:
    """Return the directory of a local path, None for a hub name."""
    place = Path(path).expanduser()
    if place.is_dir():
        return place
    if place.exists():
        raise UserError(f"{key}={path}: is a file; give the directory of a Hugging Face checkpoint")
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise UserError(
            f"{key}={path}: no such directory (looked from {Path.cwd()}); give the directory of a Hugging Face "
            "checkpoint, or a hub name such as Qwen/Qwen2.5-0.5B"
        )
    return None


def _check_model_config(directory: Path, key: str) -> None:
    file = directory / "config.json"
    if not file.is_file():
        raise UserError(f"{key}={directory}: holds no config.json; give the directory of a Hugging Face checkpoint")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{key}={directory}: config.json is not valid JSON ({error}); save the model again") from error
    if not isinstance(content, dict) or "model_type" not in content:
        raise UserError(f"{key}={directory}: config.json names no model_type; save the model again")


def _check_data_file(file: Path, key: str) -> Path:
    if file.is_dir():
        raise UserError(f"{key}={file}: is a directory; name the files in it, e.g. {file}/*.parquet")
    if file.suffix not in DATA_SUFFIXES:
        raise UserError(f"{key}={file}: unknown format {show(file.suffix or None)}; give {', '.join(DATA_SUFFIXES)}")
    return file
