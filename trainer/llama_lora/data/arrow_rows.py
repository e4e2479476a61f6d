"""Rows of Arrow and Parquet data as Python values."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from genvalues.common.errors import UserError
from genvalues.common.text import one_line
from llama_lora.data.rows import MAX_ROW_BYTES, BadRows, Row, RowError, too_long_row

BATCH_BYTES = 32 << 20
MOST_ROWS = 1000  # of a batch


def read_parquet(path: Path, name: str, bad_rows: BadRows, columns: Collection[str]) -> Iterator[Row]:
    """Yield the rows of a Parquet file. See ``rows_of`` for ``columns``.

    A few bytes of Parquet can expand to gigabytes, so a batch has only as many rows as surely fit into memory: the
    largest value of a column is at most as large as the column of its row group.
    """
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        # Opened here, because pyarrow takes no path that is not UTF-8.
        with path.open("rb") as opened, pyarrow.parquet.ParquetFile(opened) as file:
            if twice := [column for column, count in Counter(file.schema_arrow.names).items() if count > 1]:
                raise UserError(f"has two columns {one_line(twice[0])!r}", where=name, fix="Rename one.")
            for index in range(file.metadata.num_row_groups):
                group = file.metadata.row_group(index)
                if group.num_rows == 0:  # its size is that of the file's own data
                    continue
                if group.total_byte_size > group.num_rows * MAX_ROW_BYTES:
                    if group.num_rows > 1:
                        raise UserError(
                            f"has rows of more than {MAX_ROW_BYTES >> 20} MiB",
                            where=f"{name} rows {number + 1} to {number + group.num_rows}",
                            fix="Split long texts into several rows.",
                        )
                    number += 1
                    bad_rows.add(too_long_row(f"{name} row {number}"))
                    continue
                size = max(1, min(MOST_ROWS, BATCH_BYTES // max(1, group.total_byte_size)))
                for batch in file.iter_batches(size, row_groups=[index]):
                    yield from rows_of(batch, name, number, bad_rows, columns)
                    number += batch.num_rows
    except RecursionError:
        raise UserError(
            "has columns that are nested too deeply", where=name, fix="Write rows of a few levels."
        ) from None
    except pyarrow.ArrowException as error:
        raise UserError(
            f"not a valid Parquet file: {one_line(str(error), 200)}",
            where=name,
            fix="The file is damaged or incomplete, or has the wrong suffix.",
        ) from None


def rows_of(batch: Any, name: str, before: int, bad_rows: BadRows, columns: Collection[str]) -> Iterator[Row]:
    """Yield the rows of a record batch whose first row has the number ``before + 1``.

    NaN becomes None, and bytes are decoded as UTF-8. Bytes in ``columns`` that are not UTF-8 make a bad row; others are
    kept as bytes. So does a value in ``columns`` that Python cannot represent, such as a date after the year 9999;
    others are None.
    """
    cleaners = {field.name: clean for field in batch.schema if (clean := _cleaner(field.type))}
    large = batch.nbytes > MAX_ROW_BYTES
    number = before
    for part in (_row_of(batch, index) for index in range(batch.num_rows)) if large else [batch]:
        too_long = large and part.nbytes > MAX_ROW_BYTES
        for values in [{}] if too_long else _values(part):
            number += 1
            place = f"{name} row {number}"
            if too_long:
                bad_rows.add(too_long_row(place))
                continue
            unreadable = {column: value for column, value in values.items() if isinstance(value, _Unreadable)}
            if wanted := [column for column in unreadable if column in columns]:
                bad_rows.add(
                    RowError(
                        f"column {wanted[0]} cannot be read: {unreadable[wanted[0]].reason}",
                        where=place,
                        fix="Name another column in dataset.columns, or store text.",
                    )
                )
                continue
            values.update(dict.fromkeys(unreadable))
            for column, clean in cleaners.items():
                values[column] = clean(values[column])
            undecoded = [column for column in cleaners.keys() & set(columns) if _has_bytes(values[column])]
            if undecoded:
                bad_rows.add(
                    RowError(
                        f"column {undecoded[0]} contains bytes that are not UTF-8",
                        where=place,
                        fix="Name another column in dataset.columns, or store text.",
                    )
                )
            else:
                yield Row(place, values)


class _Unreadable(NamedTuple):
    """A value that Python cannot represent, and why."""

    reason: str


def _values(part: Any) -> list[dict[str, Any]]:
    """The rows of a record batch as Python values."""
    try:
        rows: list[dict[str, Any]] = part.to_pylist()
        return rows
    except (ArithmeticError, LookupError, ValueError):  # of one value; by value, this takes several times as long
        columns = [[_value(scalar) for scalar in column] for column in part.columns]
        return [dict(zip(part.schema.names, row, strict=True)) for row in zip(*columns, strict=True)]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return _Unreadable(f"not valid UTF-8 (byte {error.start})")
    except (ArithmeticError, LookupError, ValueError) as error:  # a time out of Python's range, an unknown time zone
        if "zoneinfo" in str(error):  # pyarrow tells to install it, whatever the time zone
            return _Unreadable(f"unknown time zone {one_line(str(scalar.type.tz))}")
        return _Unreadable(one_line(str(error) or type(error).__name__, 200))


def _row_of(batch: Any, index: int) -> Any:
    """One row of a batch, without the dictionaries of its columns, which hold the values of other rows, too."""
    import pyarrow

    row = batch.slice(index, 1)
    columns = [column.dictionary_decode() if hasattr(column, "dictionary_decode") else column for column in row.columns]
    return pyarrow.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _cleaner(kind: Any) -> Callable[[Any], Any] | None:
    """The function that replaces NaN and bytes in values of an Arrow type; None if it can have neither."""
    from pyarrow import types

    if types.is_floating(kind):
        return lambda value: None if value is not None and math.isnan(value) else value
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
        return _decoded
    if types.is_dictionary(kind):
        return _cleaner(kind.value_type)
    if types.is_nested(kind):
        inner = [kind.field(index).type for index in range(kind.num_fields)]
        return _cleaned if any(_cleaner(each) for each in inner) else None
    return None


def _decoded(value: bytes | None) -> str | bytes | None:
    try:
        return value if value is None else value.decode("utf-8")
    except UnicodeDecodeError:
        return value


def _cleaned(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _cleaned(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_cleaned(inner) for inner in value]
    if isinstance(value, float) and math.isnan(value):
        return None
    return _decoded(value) if isinstance(value, bytes) else value


def _has_bytes(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_has_bytes, value.values()))
    return any(map(_has_bytes, value)) if isinstance(value, list) else isinstance(value, bytes)
