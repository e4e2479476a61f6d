"""Read the rows of a run's dataset: of files, folders, globs, S3 objects and prefixes, and Hub datasets."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath

from genvalues.common.errors import UserError
from genvalues.settings.dataset_files import SPLIT_WORDS, by_split, exists_here, files_of, is_saved
from genvalues.settings.datasets import SplitPart, is_glob, is_prefix, on_s3, split_parts
from llama_lora.config import Dataset
from llama_lora.data.file_formats import read_file
from llama_lora.data.hub_datasets import parquet_export, read_hub, saved_splits
from llama_lora.data.hub_errors import PARQUET_REVISION
from llama_lora.data.parts import Part, held_out_part, training_parts
from llama_lora.data.resolve import ResolvedSources, Source
from llama_lora.data.rows import BadRows, Row
from llama_lora.data.s3 import s3_client, s3_parts
from llama_lora.data.s3_errors import translate_s3_errors
from llama_lora.data.splits import Split, rows_of_parts

__all__ = ["BadRows", "Row", "read_held_out", "read_part", "read_rows"]


def read_rows(dataset: Dataset, sources: ResolvedSources, bad_rows: BadRows) -> Iterator[Row]:
    """Yield every row of dataset.source, then those of dataset.additional by name.

    Rows that cannot be read are recorded in ``bad_rows``, whose errors the caller raises.
    """
    rows = (row for part in training_parts(dataset) for row in read_part(part, sources.of(part), bad_rows))
    yield from _until_bad(rows, bad_rows)


def read_held_out(dataset: Dataset, sources: ResolvedSources, bad_rows: BadRows) -> Iterator[Row]:
    """Yield every row of dataset.eval; none if it is not set. ``bad_rows``: see ``read_rows``."""
    part = held_out_part(dataset)
    if part and sources.held_out:
        yield from _until_bad(read_part(part, sources.held_out, bad_rows), bad_rows)


def _until_bad(rows: Iterator[Row], bad_rows: BadRows) -> Iterator[Row]:
    """Yield the rows up to the first that cannot be read; then only look for more of those.

    So the rest is not tokenized in vain. Skipped bad rows stop nothing.
    """
    failed = False
    while True:
        before = bad_rows.number
        row = next(rows, None)
        failed = failed or (bad_rows.number > before and not bad_rows.skip)
        if row is None:
            break
        if not failed:
            yield row


def read_part(part: Part, source: Source, bad_rows: BadRows) -> Iterator[Row]:
    """Yield the rows of one source, in its order."""
    if exists_here(part.source):
        splits = _local_splits(part)
    elif on_s3(part.source):
        splits = _s3_splits(part, source)
    elif part.revision == PARQUET_REVISION:
        splits = parquet_export(part, source.revision)
    else:
        splits = None
    if splits is None:
        rows = read_hub(part, source.revision, bad_rows)
    else:
        wanted = [_as_called(each, splits) for each in split_parts(part.split) or [SplitPart("train")]]
        rows = rows_of_parts(splits, wanted, part.key, part.source, bad_rows)
    for row in rows:
        yield row._replace(source=part.name) if part.name else row


def _as_called(part: SplitPart, splits: Mapping[str, Split]) -> SplitPart:
    """The part of a split with the name that the source has for it: of a folder's dev files validation."""
    usual = SPLIT_WORDS.get(part.name, part.name)
    return part._replace(name=usual) if part.name not in splits and usual in splits else part


def _local_splits(part: Part) -> dict[str, Split]:
    folder = Path(part.source).expanduser()
    if folder.is_dir() and is_saved(folder):
        return saved_splits(part, folder)
    found = files_of(part.source)
    if not found:  # deleted since it was pinned
        raise UserError(f"{part.source} not found", where=f"{part.key}.source", fix="Restore it, or name other data.")
    splits = by_split(found) if folder.is_dir() else {"train": found}

    def read(split: str, bad_rows: BadRows) -> Iterator[Row]:
        for file in splits[split]:
            yield from read_file(file.path, bad_rows, columns=part.read_columns)

    return {split: partial(read, split) for split in splits}


def _s3_splits(part: Part, source: Source) -> dict[str, Split]:
    """The splits of an S3 object, prefix or glob, in the pinned version. S3 refuses to send another version."""
    bucket, key = s3_parts(part.source, f"{part.key}.source")
    objects = source.objects if is_prefix(key) else {key: source.revision}
    named = [(name.removeprefix(key), name) for name in objects]
    splits = by_split(named) if is_prefix(key) and not is_glob(key) else {"train": named}

    def read(split: str, bad_rows: BadRows) -> Iterator[Row]:
        for _, name in splits[split]:
            uri = f"s3://{bucket}/{name}"
            with _downloaded(bucket, name, objects[name], uri, f"{part.key}.source") as path:
                yield from read_file(path, bad_rows, name=uri, columns=part.read_columns)

    return {split: partial(read, split) for split in splits}


@contextmanager
def _downloaded(bucket: str, key: str, etag: str, uri: str, where: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / PurePosixPath(key).name
        with translate_s3_errors(uri, where), path.open("wb") as file:
            shutil.copyfileobj(s3_client().get_object(Bucket=bucket, Key=key, IfMatch=etag)["Body"], file)
        yield path
