"""Files as users have them: formats, compression, damage, and rows that are hostile."""

from __future__ import annotations

import gzip
import json
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from genvalues.common.errors import UserError, UserErrors
from genvalues.settings.dataset_files import SPLIT_WORDS
from genvalues.settings.datasets import FORMATS
from llama_lora.data import arrow_rows, compression, file_formats, json_stream
from llama_lora.data.file_formats import EMPTY_CELLS, read_file
from llama_lora.data.rows import MAX_ROW_BYTES, BadRows, Row
from llama_lora.data.s3 import s3_parts

ROWS = [{"q": "How much is 1 + 1?", "a": "2"}, {"q": 'Größe, in "cm"?\nExactly.', "a": "10"}]


def parquet(path: Path, rows: list[dict[str, Any]] = ROWS) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def csv_text(delimiter: str) -> str:
    import csv
    import io

    file = io.StringIO()
    writer = csv.DictWriter(file, ["q", "a"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return file.getvalue()


TEXTS = {
    ".jsonl": "\n".join(map(json.dumps, ROWS)) + "\n\n",
    ".ndjson": "\r\n".join(map(json.dumps, ROWS)),
    ".json": json.dumps(ROWS, indent=1),
    ".csv": csv_text(","),
    ".tsv": csv_text("\t"),
}
DATA_OBJECT = json.dumps({"version": "1.1", "data": ROWS, "splits": {"train": 2}})


def zstandard(data: bytes) -> bytes:
    compressed: bytes = pyarrow.Codec("zstd").compress(data, asbytes=True)
    return compressed


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": lambda data: gzip.compress(data, 1),
    ".zst": zstandard,
}


def read(path: Path, bad_rows: BadRows | None = None, columns: tuple[str, ...] = ()) -> list[Row]:
    """The rows of a file. Raises UserErrors with those that cannot be read."""
    bad_rows = bad_rows or BadRows()
    rows = list(read_file(path, bad_rows, columns=columns))
    bad_rows.raise_errors()
    return rows


def refusal(path: Path, columns: tuple[str, ...] = ()) -> str:
    with pytest.raises(UserError) as error:
        read(path, columns=columns)
    return str(error.value)


@pytest.mark.parametrize("compressed", COMPRESS)
@pytest.mark.parametrize("suffix", TEXTS)
def test_every_file_format_gives_the_same_rows(tmp_path: Path, suffix: str, compressed: str) -> None:
    for name in (f"rows{suffix}{compressed}", f"ROWS{suffix}{compressed}".upper()):
        path = tmp_path / name
        path.write_bytes(COMPRESS[compressed](TEXTS[suffix].encode()))
        assert [row.values for row in read(path)] == ROWS


@pytest.mark.parametrize("magic", [b"\x50\x2a\x4d\x18", b"\x5f\x2a\x4d\x18"])
def test_a_zstandard_file_may_begin_with_a_frame_to_skip(tmp_path: Path, magic: bytes) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(magic + (3).to_bytes(4, "little") + b"abc" + zstandard(TEXTS[".jsonl"].encode()))
    assert [row.values for row in read(path)] == ROWS


def test_a_parquet_file_gives_the_same_rows(tmp_path: Path) -> None:
    parquet(tmp_path / "rows.PARQUET")
    assert [row.values for row in read(tmp_path / "rows.PARQUET")] == ROWS


def test_a_json_object_may_hold_the_rows_in_its_key_data(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(DATA_OBJECT)
    assert [row.values for row in read(tmp_path / "a.json")] == ROWS


@pytest.mark.parametrize("first_read", [1, 2, 3, 7, 100])
def test_json_is_read_a_value_at_a_time_however_the_file_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first_read: int
) -> None:
    rows = [{"a": 12.5e3, "b": [True, None, -1], "c": "\\u00e9\u20ac\\n"}, {"d": {}}, {"e": 123456}]
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"x": [1, {"data": 2}], "data": rows, "y": 12}))
    monkeypatch.setattr(json_stream, "FIRST_READ", first_read)
    assert [row.values for row in read(path)] == rows
    path.write_text("\ufeff" + json.dumps(rows, indent=2))
    assert [row.values for row in read(path)] == rows


def test_a_text_file_gives_one_row_per_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    path.write_text("\ufeffOne\n\nTwo\r\n", encoding="utf-8")
    assert [row.values for row in read(path)] == [{"text": "One"}, {"text": "Two"}]
    assert [row.place for row in read(path)] == [f"{path}:1", f"{path}:3"]


def test_a_csv_row_has_the_line_where_it_begins(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('q,a\n"1\n2",3\n\n4,5\n')
    assert [row.place for row in read(path)] == [f"{path}:2", f"{path}:5"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"q": 1}\n{"q": \n', "a.jsonl:2:7: invalid JSON: Expecting value"),
        ("a.jsonl", b"[1]\n", "a.jsonl:1: not a JSON object. Write {"),
        ("a.jsonl", b'{"q": 1}\ncaf\xe9\n', "a.jsonl:2: not valid UTF-8 (byte 3)"),
        ("a.jsonl", '{"q": 1}'.encode("utf-16"), "a.jsonl: is UTF-16, not UTF-8. Save it as UTF-8."),
        ("a.json", b'{"q": 1}', "a.json: not a JSON list. Write [{...}"),
        ("a.json", b'{"data": {"q": 1}}', "a.json: not a JSON list. Write [{...}"),
        ("a.json", b'{"data": [],\n "x": 1, "data": []}', 'a.json:2:17: has a second key "data"'),
        ("a.json", b"", "a.json:1:1: invalid JSON: Expecting value"),
        ("a.json", b'[{"q": 1},\n 2]', "a.json row 2: not a JSON object"),
        ("a.json", b'[{"q": 1},\n {"q": }]', "a.json:2:8: invalid JSON: Expecting value"),
        ("a.json", b'[{"q": 1}\n {"q": 2}]', "a.json:2:2: invalid JSON: Expecting ',' delimiter"),
        ("a.json", b'{"q": 1}\n{"q": 2}', "a.json:2:1: invalid JSON: Extra data"),
        ("a.json", b'[{"q": 1}', "a.json:1:10: invalid JSON: Expecting ',' delimiter"),
        ("a.json", b'[{"q": "\xe9"}]', "a.json: not valid UTF-8"),
        ("a.csv", b"q,a\n1,2,3\n", "a.csv:2: has more fields than the header. Quote fields"),
        ("a.csv", b'q,a\n1,"2" x\n', "a.csv:2: has wrong quotes: "),
        ("a.csv", b"q,a,q\n1,2,3\n", "a.csv:1: has two columns 'q'"),
        ("a.csv", b"q,a\r1,2\r", "a.csv:1: has a carriage return (\\r) outside of quotes"),
        ("a.tsv", b"q\ta\n1\t2\t3\n", "a.tsv:2: has more fields than the header. Quote fields that contain tabs"),
        ("a.txt", b"caf\xe9\n", "a.txt:1: not valid UTF-8 (byte 3)"),
        ("a.parquet", b"not parquet", "a.parquet: not a valid Parquet file"),
        ("a.jsonl.gz", gzip.compress(b'{"q": 1}\n' * 9, mtime=0)[:-9], "a.jsonl.gz: cannot be decompressed: "),
        ("a.jsonl.zst", zstandard(b'{"q": 1}\n' * 9)[:-5], "a.jsonl.zst: cannot be decompressed: "),
    ],
)
def test_an_unreadable_file_is_an_error_with_its_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert message in refusal(tmp_path / name)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32-le"])
@pytest.mark.parametrize("suffix", [*TEXTS, ".txt", ".csv.gz"])
def test_utf_16_is_refused_with_and_without_a_byte_order_mark(tmp_path: Path, suffix: str, encoding: str) -> None:
    content = TEXTS.get(suffix, "q,a\nWhy?,Because.\n").encode(encoding)
    (tmp_path / f"a{suffix}").write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    for skip in (False, True):
        with pytest.raises(UserError, match="is UTF-16, not UTF-8"):
            read(tmp_path / f"a{suffix}", BadRows(skip=skip))


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".jsonl"])
def test_a_line_with_a_nul_byte_is_a_bad_row(tmp_path: Path, suffix: str) -> None:
    """UTF-16 in another script is valid UTF-8, apart from its spaces and line breaks."""
    path = tmp_path / f"a{suffix}"
    path.write_bytes("नमस्ते\nनमस्ते दुनिया\n".encode("utf-16-le"))
    assert f"{path}:2: contains a NUL byte: UTF-16, or no text. Save it as UTF-8 text." in refusal(path)
    path.write_bytes(b'{"text": "a"}\n{"text": "\0"}\n{"text": "b"}\n')
    if suffix != ".csv":
        assert [row.place for row in read(path, BadRows(skip=True))] == [f"{path}:1", f"{path}:3"]


@pytest.mark.parametrize("row", ['{"q": "first", "a": "x", "q": "second"}', '{"a": [{"q": 1, "q": 1}]}'])
def test_an_object_with_a_key_twice_is_a_bad_row(tmp_path: Path, row: str) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"q": 1}}\n{row}\n{{"q": 3}}\n')
    assert f"{tmp_path / 'a.jsonl'}:2: has the key 'q' twice. Remove or rename one." in refusal(tmp_path / "a.jsonl")
    assert [row.values for row in read(tmp_path / "a.jsonl", BadRows(skip=True))] == [{"q": 1}, {"q": 3}]
    (tmp_path / "a.json").write_text(f'[{{"q": 1}},\n{row}]')
    assert f"{tmp_path / 'a.json'} row 2: has the key 'q' twice" in refusal(tmp_path / "a.json")


def test_a_syntax_error_is_told_where_it_is_in_a_large_json_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not as a value that is too long, which a broken value looks like while the file goes on."""
    monkeypatch.setattr(json_stream, "MAX_ROW_BYTES", 1000)
    path = tmp_path / "a.json"
    path.write_text('[{"q": 1},\n{"q" 2},\n' + '{"q": 3},\n' * 1000 + "{}]")
    assert f"{path}:2:6: invalid JSON: Expecting ':' delimiter" in refusal(path)


@pytest.mark.parametrize("ending", ["", '98,"x"\n99,y\n'])
def test_an_unclosed_quote_is_told_with_the_line_where_it_opens(tmp_path: Path, ending: str) -> None:
    """It swallows the rows up to the next quote, or to the end of the file; no policy for bad rows may hide that."""
    path = tmp_path / "a.csv"
    path.write_text('q,a\n1,b\n2,c\n3,"d\n' + "".join(f"{n},e\n" for n in range(4, 98)) + ending)
    for skip in (False, True):
        with pytest.raises(UserError, match="a quote that opens here is not closed correctly") as error:
            read(path, BadRows(skip=skip))
        assert error.value.where == f"{path}:4"


def test_missing_values_are_none_never_the_word_nan(tmp_path: Path) -> None:
    def values(name: str) -> list[Any]:
        return [row.values["a"] for row in read(tmp_path / name)]

    (tmp_path / "a.jsonl").write_text('{"a": NaN}\n{"a": null}\n{"a": "nan"}\n{"a": ""}\n{"a": [{"b": NaN}]}\n')
    assert values("a.jsonl") == [None, None, "nan", "", [{"b": None}]]
    (tmp_path / "a.json").write_text('[{"a": NaN}, {"a": "None"}]')
    assert values("a.json") == [None, "None"]
    (tmp_path / "a.csv").write_text("n,a\n1,nan\n2,NaN\n3,NaT\n4,None\n5,\n6,banana\n7\n")
    assert values("a.csv") == [None, None, None, None, "", "banana", None]
    columns = {
        "a": pyarrow.array([1.5, float("nan"), None]),
        "time": pyarrow.array([0, None, None], pyarrow.timestamp("us")),
        "messages": pyarrow.array([[{"weight": float("nan"), "content": b"x"}], [], None]),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    assert values("a.parquet") == [1.5, None, None]
    rows = [row.values for row in read(tmp_path / "a.parquet")]
    assert rows[1]["time"] is None and rows[0]["messages"] == [{"weight": None, "content": "x"}]


def test_bytes_are_decoded_as_utf_8_or_refused_with_the_column(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    categories = pyarrow.array([b"x", b"y"]).dictionary_encode()
    table = {
        "text": pyarrow.array(["é".encode(), b"b"]),
        "image": pyarrow.array([b"\xff", b"\xfe"]),
        "kind": categories,
    }
    pyarrow.parquet.write_table(pyarrow.table(table), path)
    assert [row.values["text"] for row in read(path, columns=("text",))] == ["é", "b"]
    assert [row.values["kind"] for row in read(path)] == ["x", "y"]
    assert f"{path} row 1: column image contains bytes that are not UTF-8" in refusal(path, columns=("text", "image"))


def test_a_value_that_python_cannot_represent_is_refused_only_in_a_column_that_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    days = pyarrow.array([2932897, 1], pyarrow.int32()).cast(pyarrow.date32())  # the first is in the year 10000
    not_utf_8 = pyarrow.Array.from_buffers(
        pyarrow.string(), 2, [None, pyarrow.array([0, 1, 2], pyarrow.int32()).buffers()[1], pyarrow.py_buffer(b"\xffb")]
    )
    for column, reason in [
        (days, "date value out of range"),
        (pyarrow.array([1 << 62, 1]).cast(pyarrow.timestamp("us")), "date value out of range"),
        (pyarrow.StructArray.from_arrays([days], ["day"]), "date value out of range"),
        (pyarrow.array([1, 1]).cast(pyarrow.timestamp("us", tz="Mars/Olympus")), "unknown time zone Mars/Olympus"),
        (not_utf_8, "not valid UTF-8 (byte 0)"),
    ]:
        pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"], "other": column}), path)
        rows = read(path, columns=("text",))
        assert [row.values["text"] for row in rows] == ["a", "b"] and rows[0].values["other"] is None
        assert f"{path} row 1: column other cannot be read: {reason}" in refusal(path, columns=("text", "other"))


def test_two_columns_of_one_name_in_parquet_are_refused(tmp_path: Path) -> None:
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert "a.parquet: has two columns 'text'" in refusal(tmp_path / "a.parquet")


def test_an_empty_row_group_has_no_rows(tmp_path: Path) -> None:
    path, filled = tmp_path / "a.parquet", pyarrow.table({"text": ["a"]})
    with pyarrow.parquet.ParquetWriter(path, filled.schema) as writer:
        writer.write_table(filled.slice(0, 0))
        writer.write_table(filled)
    assert [row.values for row in read(path)] == [{"text": "a"}]


def test_a_csv_header_takes_linear_time(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(",".join(f"column_{number}" for number in range(30_000)) + "\n1\n")
    began = time.process_time()
    assert len(read(path)) == 1
    assert time.process_time() - began < 2


def test_up_to_20_bad_rows_are_told_at_once_or_all_are_skipped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"q": 1}\nx\n[]\n\xff\n{"q": 2}\n')
    with pytest.raises(UserErrors) as error:
        read(path)
    assert [each.where for each in error.value.errors] == [f"{path}:2:1", f"{path}:3", f"{path}:4", "dataset.onBadRow"]
    assert error.value.errors[-1].what == "3 rows cannot be read"
    skipped = BadRows(skip=True)
    assert [row.values for row in read(path, skipped)] == [{"q": 1}, {"q": 2}]
    assert skipped.number == len(skipped.first) == 3
    path.write_bytes(b"x\n" * 1000)
    with pytest.raises(UserErrors) as error:
        read(path)
    assert len(error.value.errors) == 21 and error.value.errors[-1].what == "20 rows or more cannot be read"


LIMIT = 4 << 20  # instead of MAX_ROW_BYTES, a quarter of the work
LONG, DEEP = b"x" * (6 * LIMIT), 500_000
HOSTILE: dict[str, Callable[[], bytes]] = {  # files whose second of three rows is hostile
    "a line.jsonl": lambda: b'{"a": 1}\n{"a": "%s"}\n{"a": 3}\n' % LONG,
    "a line without an end.jsonl": lambda: b'{"a": 1}\n{"a": "%s' % LONG,
    "a line.csv": lambda: b"a,b\n1,2\n3,%s\n4,5\n" % LONG,
    "a line.txt": lambda: b"1\n%s\n3\n" % LONG,
    "a value.json": lambda: b'[{"a": 1},{"a": "%s"},{"a": 3}]' % LONG,
    "nested.jsonl": lambda: b'{"a": 1}\n{"a": %s%s}\n{"a": 3}\n' % (b"[" * DEEP, b"]" * DEEP),
    "nested.json": lambda: b'[{"a": 1},{"a": %s%s}]' % (b'{"a":' * DEEP, b"}" * DEEP),
    "levels.jsonl": lambda: b'{"a": 1}\n{"a": %s%s}\n{"a": 3}\n' % (b"[" * 100, b"]" * 100),
    "levels.json": lambda: b'[{"a": 1},{"a": %s%s}]' % (b"[" * 100, b"]" * 100),
    "digits.jsonl": lambda: b'{"a": 1}\n{"a": %s}\n{"a": 3}\n' % (b"1" * 5000),
    "digits.json": lambda: b'[{"a": 1},{"a": %s}]' % (b"1" * 5000),
}


@pytest.mark.parametrize(
    ("name", "place", "what"),
    [
        ("a line.jsonl", ":2", "is longer than 4 MiB"),
        ("a line without an end.jsonl", ":2", "is longer than 4 MiB"),
        ("a line.csv", ":3", "is longer than 4 MiB"),
        ("a line.txt", ":2", "is longer than 4 MiB"),
        ("a value.json", " row 2", "has a value of more than 4 MiB"),
        ("nested.jsonl", ":2", "is nested too deeply"),
        ("nested.json", " row 2", "is nested too deeply"),
        ("levels.jsonl", ":2", "is nested too deeply"),
        ("levels.json", " row 2", "is nested too deeply"),
        ("digits.jsonl", ":2", "has a number that is too long"),
        ("digits.json", " row 2", "has a number that is too long"),
    ],
)
@pytest.mark.parametrize("compressed", ["", ".gz"])
def test_a_hostile_row_is_told_with_its_place_in_bounded_memory(
    tmp_path: Path, name: str, place: str, what: str, compressed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("rows", "file_formats", "json_stream"):
        monkeypatch.setattr(f"llama_lora.data.{module}.MAX_ROW_BYTES", LIMIT)
    path = tmp_path / f"{name}{compressed}"
    path.write_bytes(COMPRESS[compressed](HOSTILE[name]()))
    bad_rows = BadRows(skip=True)
    tracemalloc.start()
    try:
        read(path, bad_rows)
        told = bad_rows.first
    except UserError as error:
        told = [error]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [(error.where, error.what.startswith(what)) for error in told] == [(f"{path}{place}", True)]
    assert peak < 7 * LIMIT


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_brackets_beside_each_other_or_in_text_are_no_levels(tmp_path: Path, suffix: str) -> None:
    row = {"tools": [{"a": [n]} for n in range(500)], "text": "[{" * 1000}
    (tmp_path / f"a{suffix}").write_text(json.dumps([row] if suffix == ".json" else row))
    assert [each.values for each in read(tmp_path / f"a{suffix}")] == [row]


def test_a_file_that_expands_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compression, "MOST_FREE_BYTES", 1 << 18)
    for suffix, compress in ((".gz", gzip.compress), (".zst", zstandard)):
        path = tmp_path / f"lines.jsonl{suffix}"
        path.write_bytes(compress(b"\n" * (1 << 20)))
        for skip in (False, True):
            with pytest.raises(UserError, match="decompresses to more than 500 times its size") as error:
                read(path, BadRows(skip=skip))
            assert error.value.where == str(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".txt"])
def test_a_file_of_nothing_but_empty_lines_is_not_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setattr(file_formats, "MOST_EMPTY_LINES", 100)
    path = tmp_path / f"lines{suffix}.gz"
    path.write_bytes(gzip.compress(b"text\n" * (suffix != ".jsonl") + b" \r\n\n" * 10_000))
    for skip in (False, True):
        with pytest.raises(UserError, match=r"has 1\d1 empty lines in its first 1\d\d\.") as error:
            read(path, BadRows(skip=skip))
        assert error.value.where == str(path) and error.value.fix
    path.write_bytes(gzip.compress((b'{"text": 1}\n' + b"\n" * 10) * 1000))
    read(path, BadRows(skip=True))


def test_a_small_parquet_file_does_not_expand_in_memory(tmp_path: Path) -> None:
    path, large = tmp_path / "a.parquet", "x" * (64 << 20)

    def peak(rows: list[str]) -> tuple[int, BadRows, int]:
        pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(rows)}), path, compression="zstd")
        assert path.stat().st_size < 1 << 20
        bad_rows, pool = BadRows(skip=True), pyarrow.default_memory_pool()
        monitored = pyarrow.proxy_memory_pool(pool)
        pyarrow.set_memory_pool(monitored)
        try:
            number = sum(1 for _ in read_file(path, bad_rows))
        finally:
            pyarrow.set_memory_pool(pool)
        return number, bad_rows, monitored.max_memory()

    number, bad_rows, memory = peak([large])
    assert (number, bad_rows.first[0].where) == (0, f"{path} row 1") and memory < 1 << 20
    number, bad_rows, memory = peak(["a", large, *"cdefgh"])
    assert (number, [error.where for error in bad_rows.first]) == (7, [f"{path} row 2"]) and memory < 4 * len(large)
    number, bad_rows, memory = peak(["y" * (1 << 20)] * 200)  # each row within the limit, 200 MB together
    assert (number, bad_rows.number) == (200, 0) and memory < 4 * arrow_rows.BATCH_BYTES


def test_a_reader_does_not_hold_the_file(tmp_path: Path) -> None:
    """Sixteen times the rows take the same memory."""

    def peak(suffix: str, number: int) -> int:
        path = tmp_path / f"rows{suffix}"
        rows = [{"q": f"question {n} " * 20, "a": "answer " * 20} for n in range(number)]
        if suffix == ".json":
            path.write_text(json.dumps(rows))
        elif suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            path.write_text("q,a\n" + "".join(f"{row['q']},{row['a']}\n" for row in rows))
        del rows
        tracemalloc.start()
        for _ in read_file(path, BadRows()):
            pass
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    for suffix in (".jsonl", ".json", ".csv"):
        assert peak(suffix, 16_000) < 1.2 * peak(suffix, 1_000), suffix


def test_the_page_states_the_limits() -> None:
    page = (Path(__file__).parents[2] / "docs/data.md").read_text(encoding="utf-8")
    assert f"at most {MAX_ROW_BYTES >> 20} MiB" in page and f"at most {json_stream.MOST_DEPTH} levels" in page
    assert f"{compression.MOST_FREE_BYTES >> 20} MiB" in page and f"{compression.MOST_EXPANSION} times" in page
    assert all(f"`{suffix}`" in page for suffix in FORMATS)
    assert all(f"`{word}`" in page for word in (*SPLIT_WORDS, *EMPTY_CELLS))


@pytest.mark.parametrize("uri", ["s3://bucket", "s3://bucket/", "s3://bucket/rows.xml", "s3:///rows.jsonl"])
def test_an_s3_uri_must_name_data(uri: str) -> None:
    with pytest.raises(UserError, match="not the URI of data in S3"):
        s3_parts(uri)
    assert s3_parts("s3://bucket/a/rows.jsonl") == ("bucket", "a/rows.jsonl")
    assert s3_parts("s3://bucket/a/*.JSONL.gz") == ("bucket", "a/*.JSONL.gz")
    assert s3_parts("s3://bucket/a/") == ("bucket", "a/")
