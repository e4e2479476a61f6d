"""Writing files so that a process killed at any moment leaves nothing that looks finished.

Everything is written beside its place and renamed into it, after the data is on the disk.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PARTIAL = ".partial-"  # what an unfinished file or folder has in its name


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes, mode: int | None = None) -> None:
    """Write ``content`` to ``path`` whole or not at all; readable for whom the umask lets read, or with ``mode``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}{PARTIAL}", dir=path.parent)
    partial = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp's 0600 would hide the file from the other stages' users
        partial.chmod(0o666 & ~current_umask() if mode is None else mode)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_named(path: Path, content: bytes, mode: int | None = None) -> None:
    """``write_bytes`` to a place that a person named: a link and the mode of what is there stay. Raises OSError also
    for what ``place_of`` refuses.
    """
    place = place_of(path)
    if mode is None and place.exists():
        mode = stat.S_IMODE(place.stat().st_mode)
    write_bytes(place, content, mode)


def place_of(path: Path) -> Path:
    """The file that ``path``, as a person named it, is or will be. Raises OSError where its folder is not there (it may
    be mistyped: none is made) or takes no file, where it is a folder itself, and where the file may not be written to,
    though it could be replaced.
    """
    place = Path(os.path.realpath(path))
    for folder in (path.parent, place.parent):
        if not folder.is_dir():
            raise FileNotFoundError(errno.ENOENT, f"there is no folder {folder}")
    if place.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    if place.is_dir():
        raise IsADirectoryError(errno.EISDIR, "this is a folder")
    if not os.access(place.parent, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, f"you may not write to the folder {path.parent}")
    if place.exists():
        mode = stat.S_IMODE(place.stat().st_mode)
        if not mode & 0o222 or not os.access(place, os.W_OK):  # root has access whatever the mode says
            raise PermissionError(errno.EACCES, f"the file that is there is read-only (mode {mode:o})")
    return place


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder beside ``path`` to write into; it takes the place of ``path`` when the block ends well, else it is gone.

    What an earlier, killed attempt left beside ``path`` is removed first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f".{path.name}{PARTIAL}*"):
        shutil.rmtree(leftover)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}{PARTIAL}", dir=path.parent))
    partial.chmod(0o777 & ~current_umask())
    try:
        yield partial
        settle(partial)
        if path.exists():
            replaced = Path(tempfile.mkdtemp(prefix=f".{path.name}{PARTIAL}", dir=path.parent)) / path.name
            path.rename(replaced)
            partial.rename(path)
            shutil.rmtree(replaced.parent)
        else:
            partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync(path.parent)


def settle(folder: Path) -> None:
    """Before a folder gets its name: everything in it on the disk, and readable for the users the umask lets read.

    safetensors writes its files with mode 0600, whatever the umask.
    """
    for item in [*folder.rglob("*"), folder]:
        if item.is_file():
            item.chmod(stat.S_IMODE(item.stat().st_mode) | 0o666 & ~current_umask())
        sync(item)


def sync(path: Path) -> None:
    """Have the file's data, or the folder's entries, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's content, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def current_umask() -> int:
    """The process's umask (which can only be read by setting it)."""
    umask = os.umask(0o022)
    os.umask(umask)
    return umask
