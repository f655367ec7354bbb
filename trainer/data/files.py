"""Read data sets: parquet and JSON lines, from a path, a glob or a list of them, to a list of dictionaries."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

Row = dict[str, Any]

_READABLE = ".parquet, .jsonl, .json or .ndjson"


def load_rows(files: str | Sequence[str], max_samples: int, *, key: str = "data.train_files") -> list[Row]:
    """The rows of all files in the order given (a glob's matches in alphabetical order).

    max_samples: keep only so many, the first ones; -1: all.
    key: the configuration key that names the files, for messages.

    Raises ValueError for a file that does not exist or cannot be read as its suffix says, and where there is no row.
    """
    if max_samples == 0 or max_samples < -1:
        name = key.replace("_files", "_max_samples")
        raise ValueError(f"{name}={max_samples}: it must be a positive number of rows, or -1 for all")
    paths = [path for pattern in _patterns(files, key) for path in _expand(pattern, key)]
    rows = (row for path in paths for row in _read(path, key))
    kept = list(rows if max_samples == -1 else islice(rows, max_samples))
    if not kept:
        raise ValueError(f"{key}={_shown(files)} is an empty data set: the files hold no rows")
    return kept


def _patterns(files: str | Sequence[str], key: str) -> list[str]:
    patterns = [files] if isinstance(files, str) else list(files)
    if not patterns:
        raise ValueError(f"{key} is an empty list; name at least one {_READABLE} file")
    return patterns


def _expand(pattern: str, key: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.is_dir():
        raise ValueError(f"{key}={pattern} is a directory; name its files, e.g. {pattern.rstrip('/')}/*.parquet")
    if path.exists():
        return [path]
    matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
    if not matches:
        what = "matches no file" if glob.has_magic(pattern) else "does not exist"
        raise ValueError(f"{key}={pattern} {what} (looked for {path.absolute()})")
    return matches


def _read(path: Path, key: str) -> Iterator[Row]:
    if path.suffix == ".parquet":
        return _read_parquet(path, key)
    if path.suffix in (".jsonl", ".json", ".ndjson"):
        return _read_json(path, key)
    raise ValueError(f"{key}={path}: cannot tell the format from the name; files must end in {_READABLE}")


def _read_parquet(path: Path, key: str) -> Iterator[Row]:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except pa.ArrowException as error:
        raise ValueError(f"{key}={path} is not a readable parquet file: {error}") from error


def _read_json(path: Path, key: str) -> Iterator[Row]:
    with path.open(encoding="utf-8") as file:
        start = file.read(1)
        file.seek(0)
        numbered = enumerate(_parse(file.read(), path, key), 1) if start == "[" else _parse_lines(file, path, key)
        for number, row in numbered:
            if not isinstance(row, dict):
                raise ValueError(
                    f"{key}={path}: row {number} is {type(row).__name__}, not an object with named columns"
                )
            yield row


def _parse_lines(lines: Iterator[str], path: Path, key: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield number, _parse(line.strip(), path, key, number)


def _parse(text: str, path: Path, key: str, line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{key}={path}, line {line + error.lineno - 1}: not valid JSON: {error.msg}") from error


def _shown(files: str | Sequence[str]) -> str:
    return files if isinstance(files, str) else "[" + ", ".join(files) + "]"
