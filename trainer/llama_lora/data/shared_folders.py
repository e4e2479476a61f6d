"""Workspace folders that runs share (models, datasets): complete, as written, and made by one process at a time."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from genvalues.common import files
from genvalues.common.json_files import (
    Count,
    FileRecord,
    InvalidJson,
    JsonNotFound,
    PathInside,
    as_record,
    read_object,
)
from genvalues.common.locks import lock_beside, locked
from llama_lora.config import Verify
from llama_lora.digests import Digests, differences, files_in, other_size, unlisted

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Contents:
    """The content of NAME.contents.json. Release 0.1 listed sizes only."""

    files: dict[PathInside, FileRecord | Count]


@contextmanager
def make_once(target: Path, verify: Verify = "cached") -> Iterator[bool]:
    """Lock ``target`` and yield whether the block must make it.

    Another run that needs the folder waits for the lock and then finds it complete. NAME.contents.json beside the
    folder lists its files with their SHA-256, so that a folder with missing or damaged files is made again.
    """
    with locked(lock_beside(target), "llama-lora tokenize of another run"):
        files.remove_leftovers(_contents_file(target))
        missing = not is_whole(target, verify)
        yield missing
        if missing or not recorded(target):
            contents = record_of_folder(target, Digests(verify))
            files.write_json(_contents_file(target), {name: asdict(record) for name, record in contents.items()})


def recorded(target: Path) -> dict[Path, FileRecord]:
    """The files of a folder with their SHA-256, as they were when it was made; empty if there is no such record."""
    return {target / name: record for name, record in _contents(target).items() if isinstance(record, FileRecord)}


def is_whole(target: Path, verify: Verify) -> bool:
    """Whether every file of the folder is there as it was made. A difference of content is logged."""
    contents = _contents(target)
    for name, record in contents.items():
        size = record.bytes if isinstance(record, FileRecord) else record
        if other_size(target / name, size):
            return False
    if contents and (others := unlisted(target, {target / name for name in contents})):
        log.warning(f"{others[0]} is not among the files that tokenize wrote: {target} is made again")
        return False
    if verify != "off":
        for file, difference in differences(recorded(target), Digests(verify)).items():
            log.warning(f"{file} {difference}: {target} is made again")
            return False
    return bool(contents)


def record_of_folder(folder: Path, digests: Digests) -> dict[str, FileRecord]:
    """Every file of a folder by its name in it."""
    records = {}
    for file, digest in digests.of(files_in(folder)).items():
        if isinstance(digest, OSError):
            raise digest
        records[file.relative_to(folder).as_posix()] = FileRecord(file.stat().st_size, digest)
    return records


def _contents(target: Path) -> dict[str, FileRecord | int]:
    """The files that the contents file lists; empty if it does not exist or is not valid."""
    try:
        listed = read_object(_contents_file(target))
        return as_record({"files": listed}, Contents).files
    except JsonNotFound:
        return {}
    except InvalidJson as error:
        log.warning(f"{_contents_file(target)} {error}: {target} is made again")
        return {}


def _contents_file(target: Path) -> Path:
    return target.with_name(f"{target.name}.contents.json")
