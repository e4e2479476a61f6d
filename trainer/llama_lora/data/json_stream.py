"""Parse JSON from untrusted files: a value at a time, with errors that say what is wrong and where."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from io import BufferedReader
from typing import Any

from genvalues.common.errors import UserError
from genvalues.common.json_files import DuplicateKey, unique_keys
from llama_lora.data.rows import MAX_ROW_BYTES, RowError

WHITESPACE = re.compile(r"[ \t\n\r]*")
LONGEST_WORD = 16  # more than a constant or an escape has characters: an error this near to the end may be a cut
FIRST_READ = 1 << 16  # characters
MOST_DEPTH = 100  # of a row; rows are passed between processes, and pickle and Jinja fail at some hundred levels
ROWS_KEY = "data"  # of an object that holds the rows


def _constant(name: str) -> float | None:
    """NaN, which is not JSON but which Python and pandas write, is a missing value."""
    return None if name == "NaN" else float(name)


_DECODER = json.JSONDecoder(parse_constant=_constant, object_pairs_hook=unique_keys)


def parse_line(text: str, place: str) -> Any:
    """The JSON value of a line. Raises RowError at ``place``."""
    value = _explained(
        lambda: _DECODER.decode(text), lambda at: f"{place}:{at + 1}", place, "Write one JSON object per line."
    )
    if text.count("[") + text.count("{") > MOST_DEPTH and _is_deep(value):
        raise _too_deep(place)
    return value


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MOST_DEPTH):
        containers = (each for each in level if isinstance(each, (dict, list)))
        level = [inner for each in containers for inner in (each.values() if isinstance(each, dict) else each)]
    return bool(level)


def _too_deep(place: str) -> RowError:
    return RowError("is nested too deeply", where=place, fix=f"Write rows of at most {MOST_DEPTH} levels.")


def _explained(parse: Callable[[], Any], position: Callable[[int], str], place: str, fix: str) -> Any:
    """Call ``parse``; errors of the decoder become RowErrors at ``position`` of the error, or at ``place``."""
    try:
        return parse()
    except json.JSONDecodeError as error:
        raise RowError(f"invalid JSON: {error.msg}", where=position(error.pos), fix=fix) from None
    except RecursionError:
        raise _too_deep(place) from None
    except DuplicateKey as error:
        raise RowError(str(error), where=place, fix="Remove or rename one.") from None
    except ValueError as error:  # an integer of more than sys.get_int_max_str_digits() digits
        raise RowError(
            f"has a number that is too long: {str(error).partition(';')[0]}",
            where=place,
            fix="Write it as text, in quotes.",
        ) from None


class JsonRows:
    """The elements of a JSON file that holds a list of rows, or an object with the list in its key ``data``.

    Reads as much of the file at a time as one element needs.
    """

    def __init__(self, file: BufferedReader, name: str) -> None:
        self._file = file
        self._name = name
        self._decode = codecs.getincrementaldecoder("utf-8-sig")()
        self._buffer = ""
        self._at = 0  # position in the buffer
        self._line, self._column = 1, 1  # of the buffer's first character
        self._ended = False

    def __iter__(self) -> Iterator[Any]:
        """Yield the elements. Raises UserError if the file is not valid JSON, or holds no such list."""
        first = self._peek()
        if first == "[":
            yield from self._list()
        elif first == "{" and self._reach_rows():
            yield from self._list()
            self._rest_of_object()
        else:
            if first != "{":
                self._value("")
            raise UserError(
                "not a JSON list",
                where=self._name,
                fix='Write [{...}, {...}] or {"data": [{...}, {...}]}. A file with one object per line must have the '
                "suffix .jsonl.",
            )
        if self._peek():
            raise self._error("Extra data")

    def _list(self) -> Iterator[Any]:
        self._expect("[")
        if self._peek() == "]":
            self._expect("]")
            return
        number = 0
        while True:
            number += 1
            yield self._value(f" row {number}")
            if self._peek() != ",":
                self._expect("]", "Expecting ',' delimiter")
                return
            self._expect(",")

    def _reach_rows(self) -> bool:
        """Read an object up to the list in its key ``data``; False if it has none."""
        self._expect("{")
        if self._peek() == "}":
            self._expect("}")
        else:
            while True:
                key = self._key()
                if key == ROWS_KEY and self._peek() == "[":
                    return True
                self._value("")
                if self._peek() != ",":
                    self._expect("}", "Expecting ',' delimiter")
                    break
                self._expect(",")
        if self._peek():
            raise self._error("Extra data")
        return False

    def _rest_of_object(self) -> None:
        while self._peek() == ",":
            self._expect(",")
            if self._key() == ROWS_KEY:
                raise UserError(
                    f'has a second key "{ROWS_KEY}"', where=self._place(self._at), fix="Write all rows in one list."
                )
            self._value("")
        self._expect("}", "Expecting ',' delimiter")

    def _key(self) -> str:
        if self._peek() != '"':
            raise self._error("Expecting property name enclosed in double quotes")
        key: str = self._value("")
        self._expect(":", "Expecting ':' delimiter")
        return key

    def _value(self, row: str) -> Any:
        """Decode the value at the position, reading more while it is incomplete."""
        self._peek()
        wanted = FIRST_READ
        while True:
            try:
                value, end = _DECODER.raw_decode(self._buffer, self._at)
                if end < len(self._buffer) or self._ended:  # a number may go on
                    self._check_length(end - self._at, row)
                    brackets = self._buffer.count("[", self._at, end) + self._buffer.count("{", self._at, end)
                    if brackets > MOST_DEPTH and _is_deep(value):
                        raise _too_deep(f"{self._name}{row}")
                    self._at = end
                    return value
            except json.JSONDecodeError as error:
                unterminated = error.msg.startswith("Unterminated string")
                if self._ended or (not unterminated and error.pos < len(self._buffer) - LONGEST_WORD):
                    break
            except (RecursionError, ValueError):
                break
            self._check_length(len(self._buffer) - self._at, row)
            self._read(wanted)
            wanted = min(2 * wanted, MAX_ROW_BYTES)
        return _explained(
            lambda: _DECODER.raw_decode(self._buffer, self._at),
            self._place,
            f"{self._name}{row}",
            "A file with one object per line must have the suffix .jsonl.",
        )

    def _check_length(self, length: int, row: str) -> None:
        if length > MAX_ROW_BYTES:
            raise UserError(
                f"has a value of more than {MAX_ROW_BYTES >> 20} MiB",
                where=f"{self._name}{row}" if row else self._place(self._at),
                fix="Split long texts into several rows.",
            )

    def _peek(self) -> str:
        """The next character that is not whitespace; empty at the end of the file."""
        while True:
            space = WHITESPACE.match(self._buffer, self._at)
            self._at = space.end() if space else self._at
            if self._at < len(self._buffer):
                return self._buffer[self._at]
            if self._ended:
                return ""
            self._read(FIRST_READ)

    def _expect(self, character: str, message: str = "") -> None:
        if self._peek() != character:
            raise self._error(message or f"Expecting '{character}'")
        self._at += 1

    def _read(self, size: int) -> None:
        """Replace what has been used of the buffer by more of the file."""
        used = self._buffer[: self._at]
        if lines := used.count("\n"):
            self._line += lines
            self._column = len(used) - used.rindex("\n")
        else:
            self._column += len(used)
        data = self._file.read(size)
        self._ended = not data
        self._buffer = self._buffer[self._at :] + self._decode.decode(data, final=not data)
        self._at = 0

    def _place(self, at: int) -> str:
        """file:line:column of a position in the buffer."""
        before = self._buffer[:at]
        if lines := before.count("\n"):
            return f"{self._name}:{self._line + lines}:{len(before) - before.rindex(chr(10))}"
        return f"{self._name}:{self._line}:{self._column + at}"

    def _error(self, message: str) -> UserError:
        return UserError(
            f"invalid JSON: {message}",
            where=self._place(self._at),
            fix="A file with one object per line must have the suffix .jsonl.",
        )
