"""Read the rows of one file: .jsonl .ndjson .json .csv .tsv .parquet .txt, also compressed.

Files are read here rather than with `datasets`, so that errors have the file and the line.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Collection, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

from genvalues.common.errors import UserError
from genvalues.common.text import one_line
from genvalues.settings.datasets import file_format
from llama_lora.data.arrow_rows import read_parquet
from llama_lora.data.compression import open_decompressed
from llama_lora.data.json_stream import JsonRows, parse_line
from llama_lora.data.rows import MAX_ROW_BYTES, BadRows, Row, RowError, too_long_row

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
UTF_16 = (b"\xff\xfe", b"\xfe\xff")  # its byte order marks
NUL = b"\0"
# What Python, NumPy and pandas write to a CSV file for a missing value; pandas reads the words as such.
EMPTY_CELLS = {"nan", "NaN", "NaT", "None"}
MOST_EMPTY_LINES = 1_000_000  # and ten for each line with content. A small compressed file can have billions.


def read_file(path: Path, bad_rows: BadRows, *, name: str = "", columns: Collection[str] = ()) -> Iterator[Row]:
    """Yield the rows of a file in the format of its suffix. ``name``: what places show instead of the path.

    Rows that cannot be read are added to ``bad_rows``. Raises UserError if the file itself cannot be read.
    ``columns``: see arrow_rows.rows_of.
    """
    name = name or str(path)
    kind = file_format(path.name)
    try:
        if kind == "parquet":
            yield from read_parquet(path, name, bad_rows, columns)
            return
        with open_decompressed(path, name) as file:
            first = file.peek(2)[:2]
            if first in UTF_16 or NUL in first:  # without a byte order mark, one of two bytes of a Latin letter is NUL
                raise UserError("is UTF-16, not UTF-8", where=name, fix="Save it as UTF-8.")
            if kind == "jsonl":
                yield from _read_jsonl(file, name, bad_rows)
            elif kind == "json":
                yield from _read_json(file, name, bad_rows)
            elif kind in ("csv", "tsv"):
                yield from _read_csv(file, name, bad_rows, "," if kind == "csv" else "\t")
            else:
                yield from _read_text(file, name, bad_rows)
    except UnicodeDecodeError as error:
        raise UserError(f"not valid UTF-8 (byte {error.start})", where=name, fix="Save it as UTF-8.") from None
    except OSError as error:
        raise UserError(
            f"cannot be read: {error.strerror or error}", where=name, fix="Check its permissions and the volume."
        ) from None


class _Lines:
    """The lines of a file with their line breaks; ``number`` is that of the last one.

    Raises RowError for a line that is longer than MAX_ROW_BYTES, not UTF-8, or contains a NUL byte; the next call
    returns the line after it.
    Raises UserError if nearly all of many lines are empty.
    """

    def __init__(self, file: BufferedReader, name: str) -> None:
        self.number = 0
        self._empty = 0
        self._file = file
        self._name = name

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._file.readline(MAX_ROW_BYTES + 1)
        if not line:
            raise StopIteration
        self.number += 1
        if self.number == 1:
            line = line.removeprefix(BYTE_ORDER_MARK)
        if len(line) > MAX_ROW_BYTES:
            while not line.endswith(b"\n") and (line := self._file.readline(MAX_ROW_BYTES)):
                pass
            raise too_long_row(self.place)
        if line.isspace():
            self._empty += 1
            if self._empty > MOST_EMPTY_LINES + 10 * (self.number - self._empty):
                what = f"has {self._empty:,} empty lines in its first {self.number:,}"
                raise UserError(what, where=self._name, fix="Remove them.")
        if NUL in line:  # UTF-16 of another script is valid UTF-8 up to its first space
            raise RowError("contains a NUL byte: UTF-16, or no text", where=self.place, fix="Save it as UTF-8 text.")
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise RowError(f"not valid UTF-8 (byte {error.start})", where=self.place, fix="Save it as UTF-8.") from None

    @property
    def place(self) -> str:
        return f"{self._name}:{self.number}"

    def readable(self, bad_rows: BadRows) -> Iterator[str]:
        """Yield the lines; those that cannot be read are added to ``bad_rows``."""
        while True:
            try:
                yield next(self)
            except StopIteration:
                return
            except RowError as error:
                bad_rows.add(error)


def _read_jsonl(file: BufferedReader, name: str, bad_rows: BadRows) -> Iterator[Row]:
    lines = _Lines(file, name)
    for line in lines.readable(bad_rows):
        if line.strip():
            try:
                yield _row(parse_line(line.rstrip("\r\n"), lines.place), lines.place)
            except RowError as error:
                bad_rows.add(error)


def _read_json(file: BufferedReader, name: str, bad_rows: BadRows) -> Iterator[Row]:
    for number, value in enumerate(JsonRows(file, name), start=1):
        try:
            row = _row(value, f"{name} row {number}")
        except RowError as error:
            bad_rows.add(error)
        else:
            yield row


def _row(value: Any, place: str) -> Row:
    if not isinstance(value, dict):
        raise RowError("not a JSON object", where=place, fix='Write {"COLUMN": VALUE, ...}.')
    return Row(place, value)


def _read_csv(file: BufferedReader, name: str, bad_rows: BadRows, delimiter: str) -> Iterator[Row]:
    """Quotes are strict: text after a closing quote, or a quote that is never closed, is an error."""
    csv.field_size_limit(MAX_ROW_BYTES)  # the default of 128 KiB is less than one long document
    lines = _Lines(file, name)
    records = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        first = lines.number + 1
        try:
            cells = next(records)
        except StopIteration:
            return
        except csv.Error as error:
            spans = lines.number > first  # the lines between may be rows that an unclosed quote has swallowed
            quote = f"a quote that opens here is not closed correctly up to line {lines.number}: " if spans else ""
            what = f"{quote or 'has wrong quotes: '}{error}"
            fix = 'Write "..." around a field with quotes or line breaks, and "" for a quote in it.'
            if not spans and "new-line character" in str(error):
                what = "has a carriage return (\\r) outside of quotes, without a line feed (\\n) after it"
                fix = f"End lines with \\n or \\r\\n. {fix}"
            mistake = RowError(what, where=f"{name}:{first}", fix=fix)
            if spans or header is None:
                raise mistake from None
            bad_rows.add(mistake)
            continue
        except RowError as error:  # of a line
            if lines.number > first or header is None:
                raise
            bad_rows.add(error)
            continue
        if not cells:  # an empty line
            continue
        if header is None:
            header = cells
            if twice := sorted(column for column, count in Counter(header).items() if count > 1):
                raise UserError(f"has two columns {one_line(twice[0])!r}", where=f"{name}:{first}", fix="Rename one.")
            continue
        if len(cells) > len(header):
            bad_rows.add(
                RowError(
                    "has more fields than the header",
                    where=f"{name}:{first}",
                    fix=f"Quote fields that contain {'commas' if delimiter == ',' else 'tabs'}.",
                )
            )
            continue
        values = [None if cell in EMPTY_CELLS else cell for cell in cells]
        values += [None] * (len(header) - len(cells))
        yield Row(f"{name}:{first}", dict(zip(header, values, strict=True)))


def _read_text(file: BufferedReader, name: str, bad_rows: BadRows) -> Iterator[Row]:
    lines = _Lines(file, name)
    for line in lines.readable(bad_rows):
        if line.strip():
            yield Row(lines.place, {"text": line.rstrip("\r\n")})
