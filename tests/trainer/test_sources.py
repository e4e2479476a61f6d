from __future__ import annotations

import json
from pathlib import Path

import pytest

from genvalues.common.errors import UserError
from llama_lora.data.file_formats import read_file
from llama_lora.data.rows import BadRows, Row
from llama_lora.data.s3 import s3_parts

ROWS = [{"q": "How much is 1 + 1?", "a": "2"}, {"q": 'Größe, in "cm"?\nExactly.', "a": "10"}]


def parquet(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


def csv_file(path: Path) -> None:
    import csv

    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["q", "a"])
        writer.writeheader()
        writer.writerows(ROWS)


WRITERS = {
    ".jsonl": lambda path: path.write_text("\n".join(map(json.dumps, ROWS)) + "\n\n", encoding="utf-8"),
    ".json": lambda path: path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8"),
    ".csv": csv_file,
    ".parquet": parquet,
}


def read(path: Path, bad_rows: BadRows | None = None) -> list[Row]:
    """The rows of a file. Raises UserErrors with those that cannot be read."""
    bad_rows = bad_rows or BadRows()
    rows = list(read_file(path, bad_rows))
    bad_rows.raise_errors()
    return rows


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_file_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    WRITERS[suffix](path)
    assert [row.values for row in read(path)] == ROWS


def test_a_text_file_gives_one_row_per_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    path.write_text("\ufeffOne\n\nTwo\n", encoding="utf-8")
    assert [row.values for row in read(path)] == [{"text": "One"}, {"text": "Two"}]
    assert [row.place for row in read(path)] == [f"{path}:1", f"{path}:3"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"q": 1}\n{"q": \n', "a.jsonl:2:7: invalid JSON: Expecting value"),
        ("a.jsonl", b"[1]\n", "a.jsonl:1: not a JSON object. Write {"),
        ("a.json", b'{"q": 1}', "a.json: not a JSON list. Write [{...}"),
        ("a.json", b'[{"q": 1},\n 2]', "a.json row 2: not a JSON object"),
        ("a.json", b'{"q": 1}\n{"q": 2}', "a.json:2:1: invalid JSON: Extra data"),
        ("a.csv", b"q,a\n1,2,3\n", "a.csv:2: has more fields than the header. Quote fields"),
        ("a.txt", b"caf\xe9\n", "a.txt:1: not valid UTF-8 (byte 3)"),
        ("a.parquet", b"not parquet", "a.parquet: not a valid Parquet file"),
    ],
)
def test_an_unreadable_file_is_an_error_with_its_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        read(tmp_path / name)
    assert message in str(error.value)


@pytest.mark.parametrize("uri", ["s3://bucket", "s3://bucket/rows.xml", "s3:///rows.jsonl"])
def test_an_s3_uri_must_name_a_data_file(uri: str) -> None:
    with pytest.raises(UserError, match="not the URI of data in S3"):
        s3_parts(uri)
    assert s3_parts("s3://bucket/a/rows.jsonl") == ("bucket", "a/rows.jsonl")
