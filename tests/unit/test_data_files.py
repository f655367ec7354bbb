"""Reading parquet and JSON lines."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trainer.data.files import load_rows

ROWS = [{"prompt": f"{i}+1=", "answer": str(i + 1), "extra_info": {"index": i}} for i in range(5)]


def write(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".json", ".ndjson"])
def test_reads_every_format(tmp_path: Path, suffix: str) -> None:
    assert load_rows(str(write(tmp_path / f"a{suffix}", ROWS)), -1) == ROWS


def test_a_json_array_and_blank_lines_are_read_too(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=1))
    (tmp_path / "b.jsonl").write_text("\n".join(["", json.dumps(ROWS[0]), "", json.dumps(ROWS[1]), ""]))
    assert load_rows([str(tmp_path / "a.json"), str(tmp_path / "b.jsonl")], -1) == ROWS + ROWS[:2]


def test_globs_are_sorted_and_lists_keep_their_order(tmp_path: Path) -> None:
    for name, row in (("b.parquet", ROWS[1]), ("a.parquet", ROWS[0]), ("c.jsonl", ROWS[2])):
        write(tmp_path / name, [row])
    assert load_rows(str(tmp_path / "*.parquet"), -1) == ROWS[:2]
    assert load_rows((str(tmp_path / "c.jsonl"), str(tmp_path / "*.parquet")), -1) == [ROWS[2], *ROWS[:2]]


def test_max_samples_keeps_the_first_rows_over_all_files(tmp_path: Path) -> None:
    files = [str(write(tmp_path / "a.parquet", ROWS[:2])), str(write(tmp_path / "b.jsonl", ROWS[2:]))]
    assert load_rows(files, 3) == ROWS[:3]
    assert load_rows(files, 100) == ROWS
    with pytest.raises(ValueError, match=r"data\.val_max_samples=0"):
        load_rows(files, 0, key="data.val_files")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("missing.parquet", None, r"data\.val_files=.*missing\.parquet does not exist"),
        ("*.jsonl", None, "matches no file"),
        ("a.csv", "x", r"cannot tell the format.*\.parquet, \.jsonl"),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": \n', r"a\.jsonl, line 2: not valid JSON"),
        ("a.jsonl", "", "is an empty data set"),
        ("a.jsonl", '"text"\n', "row 1 is str, not an object"),
        ("a.parquet", "no parquet", "not a readable parquet file"),
        ("", None, r"is a directory; name its files, e\.g\. .*/\*\.parquet"),
    ],
)
def test_bad_files_are_errors_that_name_them(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_rows(str(tmp_path / name), -1, key="data.val_files")


def test_no_files_at_all() -> None:
    with pytest.raises(ValueError, match=r"data\.train_files is an empty list"):
        load_rows([], -1)
