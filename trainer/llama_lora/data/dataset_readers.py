"""Read the rows of a dataset: a file (.jsonl .json .csv .parquet .txt), an S3 object, or a Hub dataset.

Files are read here rather than with `datasets`, so that errors have the file and the line.
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
from genvalues.settings.datasets import is_file
from llama_lora.config import Dataset
from llama_lora.data.hub_errors import translate_hub_errors
from llama_lora.data.resolve import Source
from llama_lora.data.s3 import is_s3, s3_client, s3_parts, translate_s3_errors


class Row(NamedTuple):
    """A row as stored in the source, and its place: file:line, or dataset and row number (from 1)."""

    place: str
    values: dict[str, Any]


def read_rows(dataset: Dataset, source: Source) -> Iterator[Row]:
    """Yield every row in the source's order. Raises UserError with file and line if one cannot be read."""
    if is_file(dataset.source):
        yield from read_file(Path(dataset.source))
    elif is_s3(dataset.source):
        yield from _read_s3(dataset.source, source.revision)
    else:
        yield from _read_hub(dataset, source.revision)


def read_file(path: Path) -> Iterator[Row]:
    """Yield the rows of one file, in the format of its suffix. Raises UserError with file and line."""
    readers = {
        ".jsonl": _read_jsonl,
        ".json": _read_json,
        ".csv": _read_csv,
        ".parquet": _read_parquet,
        ".txt": _read_text,
    }
    try:
        yield from readers[path.suffix](path)
    except UnicodeDecodeError as error:
        raise UserError(f"not valid UTF-8 (byte {error.start})", where=str(path), fix="Save it as UTF-8.") from None
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(path)) from None


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{path}:{number}"
            try:
                value = json.loads(line.rstrip("\n"))
            except json.JSONDecodeError as error:
                raise UserError(
                    f"invalid JSON: {error.msg}", where=f"{place}:{error.colno}", fix="Write one JSON object per line."
                ) from None
            yield _row(value, place)


def _read_json(path: Path) -> Iterator[Row]:
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(
            f"invalid JSON: {error.msg}",
            where=f"{path}:{error.lineno}:{error.colno}",
            fix="A file with one object per line must have the suffix .jsonl.",
        ) from None
    if not isinstance(values, list):
        raise UserError(
            "not a JSON list",
            where=str(path),
            fix="Write [{...}, {...}], or one object per line in a file with the suffix .jsonl.",
        )
    for number, value in enumerate(values, start=1):
        yield _row(value, f"{path} row {number}")


def _row(value: Any, place: str) -> Row:
    if not isinstance(value, dict):
        raise UserError("not a JSON object", where=place, fix='Write {"COLUMN": VALUE, ...}.')
    return Row(place, value)


def _read_csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(1 << 30)  # the default of 128 KiB is less than one long document
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        for values in reader:
            place = f"{path}:{reader.line_num}"
            if None in values:
                raise UserError("has more fields than the header", where=place, fix="Quote fields that contain commas.")
            yield Row(place, dict(values))


def _read_parquet(path: Path) -> Iterator[Row]:
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
        raise UserError(f"not a valid Parquet file: {error}", where=str(path)) from None


def _read_text(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield Row(f"{path}:{number}", {"text": line.rstrip("\n")})


def _read_s3(uri: str, etag: str) -> Iterator[Row]:
    """Read the pinned version of an object. S3 refuses to send another version."""
    bucket, key = s3_parts(uri)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / Path(key).name
        with translate_s3_errors(uri), path.open("wb") as file:
            shutil.copyfileobj(s3_client().get_object(Bucket=bucket, Key=key, IfMatch=etag)["Body"], file)
        for row in read_file(path):
            yield Row(row.place.replace(str(path), uri), row.values)


def _read_hub(dataset: Dataset, commit: str) -> Iterator[Row]:
    from datasets import exceptions, get_dataset_config_names, get_dataset_split_names, load_dataset

    name = dataset.source
    try:
        with translate_hub_errors("dataset.source", name, dataset=True):
            config = _choose("config", name, dataset.config, get_dataset_config_names(name, revision=commit))
            splits = get_dataset_split_names(name, config, revision=commit)
            split = _choose("split", name, dataset.split or "train", splits)
            rows = load_dataset(name, config, split=split, revision=commit)
    except (exceptions.DatasetNotFoundError, exceptions.DataFilesNotFoundError) as error:
        raise UserError(
            f"{name} cannot be read: {error}",
            where="dataset.source",
            fix=f"See https://huggingface.co/datasets/{name}: it may be gated or have no data files.",
        ) from None
    for number, values in enumerate(rows, start=1):
        yield Row(f"{name} {split} row {number}", values)


def _choose(key: str, name: str, wanted: str, available: Sequence[str]) -> str:
    """Return the wanted config or split; if none is set, "default" or the only one. Raises UserError otherwise."""
    if not wanted and ("default" in available or len(available) == 1):
        return "default" if "default" in available else available[0]
    if wanted not in available:
        wrong = f"has no {key} {wanted!r}" if wanted else f"has several {key}s"
        raise UserError(f"{name} {wrong}", where=f"dataset.{key}", fix=f"Set one of: {', '.join(available)}.")
    return wanted
