"""Read the rows of a dataset: a file (.jsonl .json .csv .parquet .txt), an S3 object, or a hub dataset.

Files are read by this module rather than by `datasets`, so that a mistake is reported with its file and line.
"""

from __future__ import annotations

import csv
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from genvalues.common.errors import UserError
from llama_lora import hub
from llama_lora.config import Dataset
from llama_lora.resolve import Source, is_file, is_s3, s3_client, s3_parts, s3_told


class Row(NamedTuple):
    """A row as the source has it, and where: file:line or dataset and number, from 1."""

    place: str
    values: dict[str, Any]


def read_rows(dataset: Dataset, source: Source) -> Iterator[Row]:
    """Every row, in the source's order. Raises UserError with file and line for what can't be read."""
    if is_file(dataset.source):
        yield from read_file(Path(dataset.source))
    elif is_s3(dataset.source):
        yield from _read_s3(dataset.source, source.revision)
    else:
        yield from _read_hub(dataset, source.revision)


def read_file(path: Path) -> Iterator[Row]:
    """The rows of one file, by its ending. Raises UserError with file and line for what can't be read."""
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet, ".txt": _text}
    try:
        yield from readers[path.suffix](path)
    except UnicodeDecodeError as error:
        raise UserError(f"is not UTF-8 (byte {error.start})", where=str(path), fix="Save it as UTF-8.") from None
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(path)) from None


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _object(line.rstrip("\n"), f"{path}:{number}")


def _object(text: str, place: str) -> Row:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"is not JSON: {error.msg}", where=f"{place}:{error.colno}", fix="Write one JSON object a line."
        ) from None
    return _row(value, place)


def _row(value: Any, place: str) -> Row:
    if not isinstance(value, dict):
        raise UserError("is no JSON object", where=place, fix='Write {"COLUMN": VALUE, ...}.')
    return Row(place, value)


def _json(path: Path) -> Iterator[Row]:
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(
            f"is not JSON: {error.msg}",
            where=f"{path}:{error.lineno}:{error.colno}",
            fix="One object a line needs the ending .jsonl.",
        ) from None
    if not isinstance(values, list):
        raise UserError(
            "holds no list", where=str(path), fix="Write [{...}, {...}], or one object a line with the ending .jsonl."
        )
    for number, value in enumerate(values, start=1):
        yield _row(value, f"{path} row {number}")


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(1 << 30)  # the default, 128 KiB a field, is less than one long document
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        for values in reader:
            place = f"{path}:{reader.line_num}"
            if None in values:
                raise UserError("has more fields than the header", where=place, fix="Quote fields that hold commas.")
            yield Row(place, dict(values))


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"{path} row {number}", values)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"is not Parquet: {error}", where=str(path)) from None


def _text(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield Row(f"{path}:{number}", {"text": line.rstrip("\n")})


def _read_s3(uri: str, etag: str) -> Iterator[Row]:
    """The object as it was when it was pinned; S3 refuses another one of the same name."""
    bucket, key = s3_parts(uri)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / Path(key).name
        with s3_told(uri), path.open("wb") as file:
            shutil.copyfileobj(s3_client().get_object(Bucket=bucket, Key=key, IfMatch=etag)["Body"], file)
        for row in read_file(path):
            yield Row(row.place.replace(str(path), uri), row.values)


def _read_hub(dataset: Dataset, commit: str) -> Iterator[Row]:
    from datasets import exceptions, get_dataset_config_names, get_dataset_split_names, load_dataset

    name = dataset.source
    try:
        with hub.translate_errors("dataset.source", name, dataset=True):
            config = _one_of("config", name, dataset.config, get_dataset_config_names(name, revision=commit))
            splits = get_dataset_split_names(name, config, revision=commit)
            split = _one_of("split", name, dataset.split or "train", splits)
            rows = load_dataset(name, config, split=split, revision=commit)
    except (exceptions.DatasetNotFoundError, exceptions.DataFilesNotFoundError) as error:
        raise UserError(
            f"{name} cannot be read: {error}",
            where="dataset.source",
            fix=f"See https://huggingface.co/datasets/{name}: it may be gated, or hold no data files.",
        ) from None
    for number, values in enumerate(rows, start=1):
        yield Row(f"{name} {split} row {number}", values)


def _one_of(key: str, name: str, wanted: str, there: Sequence[str]) -> str:
    """The wanted config or split, or the only or default one where none is wanted."""
    if not wanted and ("default" in there or len(there) == 1):
        return "default" if "default" in there else there[0]
    if wanted not in there:
        wrong = f"has no {key} {wanted!r}" if wanted else f"has several {key}s"
        raise UserError(f"{name} {wrong}", where=f"dataset.{key}", fix=f"Write one of: {', '.join(there)}.")
    return wanted
