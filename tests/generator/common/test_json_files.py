"""JSON files of unknown origin: each way in which reading fails is one exception with its own words."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from genvalues.common.json_files import InvalidJson, JsonNotFound, read_json, read_object

CONTENTS = {
    "empty": (b"  \n", "is empty"),
    "cut off": (b'{"a": [1, 2', "cut off"),
    "another format": (b"\x00\x01\x02", "line 1, column 1"),
    "not UTF-8": (b'{"a": "\xff"}', "not UTF-8 \\(byte 7\\)"),
    "deep": (b"[" * 1_000_000, "nested too deeply"),
    "a number of 10,000 digits": (b'{"a": ' + b"9" * 10_000 + b"}", "not valid JSON"),
    "a number that no float holds": (b'{"a": ' + b"9" * 400 + b"}", "400 digits"),
    "an infinite number": (b'{"a": 1e999}', "1e999 is too large"),
    "NaN": (b'{"a": NaN}', "NaN"),
    "a list": (b"[1]", "contains a list"),
    "null": (b"null", "contains null"),
    "a string": (b'"a"', "contains a string"),
}


@pytest.mark.parametrize("content, words", CONTENTS.values(), ids=CONTENTS)
def test_each_kind_of_damage_has_its_words(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "record.json"
    file.write_bytes(content)
    with pytest.raises(InvalidJson, match=words):
        read_object(file)


def test_only_regular_files_of_a_limited_size_are_read(tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    file.write_text('{"a": 1}')
    (tmp_path / "link.json").symlink_to(file)
    os.mkfifo(tmp_path / "fifo.json")
    assert read_json(file) == {"a": 1}
    with pytest.raises(JsonNotFound, match="not found"):
        read_json(tmp_path / "other.json")
    with pytest.raises(InvalidJson, match="symbolic link"):
        read_json(tmp_path / "link.json")
    for other in (tmp_path / "fifo.json", tmp_path):
        with pytest.raises(InvalidJson, match="not a regular file"):
            read_json(other)
    with pytest.raises(InvalidJson, match="has 8 bytes, the most is 7"):
        read_json(file, most_bytes=7)
