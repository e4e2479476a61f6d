"""Find the columns of a row, and read their values as text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from genvalues.common.json_files import unique_keys
from genvalues.common.text import one_line
from genvalues.settings.datasets import COLUMN_ALIASES
from llama_lora.data.rows import MissingColumn, Row, RowError


class Dropped(Exception):
    """Raised for a row that cannot be trained on. The message is the reason, which the report counts."""


class Columns:
    """The columns of a dataset, by key. ``named``: those that the user named. A dot leads into a nested column.

    ``found`` has the named keys that some row had a column for.
    """

    def __init__(self, named: Mapping[str, str]) -> None:
        self.named = named
        self.found: set[str] = set()

    def name(self, row: Row, key: str) -> str | None:
        """The name of the row's column for ``key``, None if it has none."""
        if key in self.named:
            name = self.named[key]
            if _lookup(row.values, name) is _MISSING:
                return None
            self.found.add(key)
            return name
        return next((name for name in (key, *COLUMN_ALIASES.get(key, ())) if name in row.values), None)

    def value(self, row: Row, key: str, *, required: bool = True) -> Any:
        """The value for ``key``, None if it is null or NaN. Raises RowError if a required column is missing."""
        name = self.name(row, key)
        if name is None:
            if required:
                raise self.missing(row, key)
            return None
        value = _lookup(row.values, name)
        return None if is_null(value) else value

    def text(self, row: Row, key: str, *, required: bool = True) -> str:
        """The text for ``key``. Raises Dropped if it is required and empty, RowError if it is not text."""
        value = self.value(row, key, required=required)
        if isinstance(value, (list, tuple, dict)):
            kind = "an object" if isinstance(value, dict) else "a list"
            raise RowError(
                f"column {self.name(row, key)} contains {kind}, not text",
                where=row.place,
                fix=f"Name a column with text: dataset.columns.{key}. Lists of messages have format chat.",
            )
        text = value if isinstance(value, str) else as_text(value, f"column {self.name(row, key)}", row.place)
        if required and not text.strip():
            raise Dropped(f"empty {key}")
        return text

    def missing(self, row: Row, key: str) -> MissingColumn:
        """The error of a row without a column for ``key``."""
        names = (self.named[key],) if key in self.named else (key, *COLUMN_ALIASES.get(key, ()))
        return MissingColumn(
            f"has no column {' or '.join(names)}",
            where=row.place,
            fix=f"Set dataset.columns.{key} to one of: {listed(row.values)}.",
        )


def listed(names: Iterable[str]) -> str:
    """Names of columns for an error; not all if they are many or long."""
    return one_line(", ".join(islice(names, 50)), 300)


def is_null(value: Any) -> bool:
    """Whether a value is None, NaN, or the NaT of pandas and NumPy: those are unequal to themselves."""
    return value is None or (not isinstance(value, (str, list, tuple, dict)) and bool(value != value))


def as_text(value: Any, what: str, place: str) -> str:
    """A value as text, empty for null. Raises RowError for bytes that are not UTF-8."""
    if isinstance(value, str):
        return value
    if is_null(value):
        return ""
    if isinstance(value, (bytes, bytearray, memoryview)):
        try:
            return bytes(value).decode()
        except UnicodeDecodeError as error:
            raise RowError(
                f"{what} contains bytes that are not UTF-8 (byte {error.start})",
                where=place,
                fix="Convert the column to text, or leave it out of dataset.columns.",
            ) from None
    return str(value)


def as_json(value: Any, what: str, place: str) -> Any:
    """Parse a value that is JSON text; return any other value as it is. Raises RowError if the text is not JSON."""
    if isinstance(value, (bytes, bytearray)):
        value = as_text(value, what, place)
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise RowError(
            f"{what} is text that is not valid JSON: {error}", where=place, fix="Write a list, or a list as JSON text."
        ) from None


def without_nulls(value: Any) -> Any:
    """A copy without the null entries of its objects: Arrow stores one for every key that any other row has."""
    if isinstance(value, Mapping):
        return {key: without_nulls(each) for key, each in value.items() if not is_null(each)}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray)):
        return [without_nulls(each) for each in value]
    return value


_MISSING = object()


def _lookup(values: Mapping[str, Any], name: str) -> Any:
    """The value of a column, or of a nested one such as data.question. Missing: the object _MISSING."""
    if name in values:
        return values[name]
    column, dot, rest = name.partition(".")
    nested = values.get(column)
    return _lookup(nested, rest) if dot and isinstance(nested, Mapping) else _MISSING
