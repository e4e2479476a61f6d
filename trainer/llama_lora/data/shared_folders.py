"""Workspace folders that runs share (models, datasets): complete, and made by one process at a time."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from genvalues.common import files


@contextmanager
def make_once(target: Path) -> Iterator[bool]:
    """Lock ``target`` and yield whether the block must make it.

    Another run that needs the folder waits for the lock and then finds it complete. NAME.contents.json beside the
    folder lists its files, so that a folder with missing files is made again.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f".{target.name}.lock").open("w") as lock:
        with suppress(OSError):  # a volume without locks (FSx mounted without flock): both runs may do the work
            fcntl.flock(lock, fcntl.LOCK_EX)
        missing = not has_all_files(target)
        yield missing
        if missing:
            files.write_json(_contents_file(target), _contents(target))


def has_all_files(target: Path) -> bool:
    """Whether every file listed in the contents file exists with its recorded size."""
    try:
        listed = json.loads(_contents_file(target).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    found = _contents(target)
    return bool(listed) and all(found.get(name) == size for name, size in listed.items())


def _contents(folder: Path) -> dict[str, int]:
    return {str(file.relative_to(folder)): file.stat().st_size for file in sorted(folder.rglob("*")) if file.is_file()}


def _contents_file(target: Path) -> Path:
    return target.with_name(f"{target.name}.contents.json")
