"""Folders of the workspace that runs share (models, datasets): made once, by one process at a time, and whole."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from genvalues.common import files


@contextmanager
def making(target: Path) -> Iterator[bool]:
    """Hold ``target`` while its block makes it; yields whether it has to be made.

    Another run that wants it waits, and then finds it made. What is in a whole folder is listed beside it, in
    NAME.contents.json, so that a folder somebody has taken files from is made again.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f".{target.name}.lock").open("w") as lock:
        with suppress(OSError):  # a volume without locks (FSx mounted without flock): two runs at once may work twice
            fcntl.flock(lock, fcntl.LOCK_EX)
        missing = not is_whole(target)
        yield missing
        if missing:
            files.write_json(_contents_file(target), _contents(target))


def is_whole(target: Path) -> bool:
    """Whether every file that was made is there, with its size."""
    try:
        made = json.loads(_contents_file(target).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    there = _contents(target)
    return bool(made) and all(there.get(name) == size for name, size in made.items())


def _contents(folder: Path) -> dict[str, int]:
    return {str(file.relative_to(folder)): file.stat().st_size for file in sorted(folder.rglob("*")) if file.is_file()}


def _contents_file(target: Path) -> Path:
    return target.with_name(f"{target.name}.contents.json")
