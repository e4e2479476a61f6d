"""Atomic writes of files and folders: a process killed at any moment leaves nothing that looks complete.

Everything is written under a temporary name in the same folder, synced to disk, and then renamed.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any, TextIO

PIECE = 1 << 18  # bytes read at once
OPENED = re.compile(r"/dev/stdin|(/dev/fd|/proc/self/fd)/[0-9]+")  # files that this process was started with
PARTIAL = ".partial-"  # part of the temporary name of an incomplete file or folder


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes, mode: int | None = None) -> None:
    """Write ``content`` to ``path`` atomically, with ``mode`` or the permissions that the umask gives."""
    try:
        _write_bytes(path, content, mode)
    except FileNotFoundError:  # another process took the temporary file for a leftover
        _write_bytes(path, content, mode)


def _write_bytes(path: Path, content: bytes, mode: int | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}{PARTIAL}", dir=path.parent)
    partial = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp's 0600 would make the file unreadable for the users of other stages
        partial.chmod(0o666 & ~current_umask() if mode is None else mode)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_named(path: Path, content: bytes, mode: int | None = None) -> None:
    """Write ``content`` to a path that a user named: follow a symbolic link and keep the mode of an existing file.

    Raises OSError, also for what ``place_of`` refuses.
    """
    place = place_of(path)
    if mode is None and place.exists():
        mode = stat.S_IMODE(place.stat().st_mode)
    write_bytes(place, content, mode)


def place_of(path: Path) -> Path:
    """Resolve a path that a user named to the file to write.

    Raises OSError where its folder does not exist (it may be a typo, so it is not created) or is not writable, where
    the path is a folder, and where the existing file is read-only, although a rename could replace it.
    """
    place = Path(os.path.realpath(path))
    for folder in (path.parent, place.parent):
        if not folder.is_dir():
            raise FileNotFoundError(errno.ENOENT, f"no such folder: {folder}")
    if place.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    if place.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a directory")
    if not os.access(place.parent, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, f"the folder {path.parent} is not writable")
    if place.exists():
        mode = stat.S_IMODE(place.stat().st_mode)
        if not mode & 0o222 or not os.access(place, os.W_OK):  # root has access whatever the mode says
            raise PermissionError(errno.EACCES, f"the existing file is read-only (mode {mode:o})")
    return place


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically. Surrogates, which UTF-8 cannot encode, become escapes of JSON."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces ``path`` when the block succeeds and is removed when it fails.

    Leftovers of earlier, killed attempts are removed first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
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


def remove_leftovers(path: Path) -> None:
    """Delete what killed processes have left of their writes to ``path``. A write that loses its file is repeated."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}{PARTIAL}*"):
        with suppress(FileNotFoundError):
            remove(leftover)


def remove(path: Path) -> None:
    """Delete a folder with its content, or a file or link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def settle(folder: Path) -> None:
    """Sync everything in a folder to disk, with the permissions that the umask gives.

    safetensors writes its files with mode 0600, whatever the umask.
    """
    for item in [*folder.rglob("*"), folder]:
        if item.is_file():
            item.chmod(stat.S_IMODE(item.stat().st_mode) | 0o666 & ~current_umask())
        sync(item)


def sync(path: Path) -> None:
    """Sync a file's data, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Return the hex SHA-256 of a file."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(PIECE))  # one buffer is much faster than an object for each piece
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()


def current_umask() -> int:
    """Return the process's umask, which can only be read by setting it."""
    umask = os.umask(0o022)
    os.umask(umask)
    return umask


class NotARegularFile(OSError):
    """A folder, FIFO, socket or device in the place of a file."""


def refuse_fifo(path: Path) -> None:
    """Raise NotARegularFile for a FIFO, which waits for a writer when opened, but not for a shell's <(command)."""
    if stat.S_ISFIFO(path.stat().st_mode) and not OPENED.fullmatch(str(path)):
        raise NotARegularFile(errno.EINVAL, "not a regular file")


def open_regular(path: Path) -> BufferedReader:
    """Open a file to read that may be anything: a symbolic link, a FIFO or a device is an OSError, and never waits."""
    return os.fdopen(_open_regular(path, os.O_RDONLY), "rb")


def open_to_append(path: Path, *, empty: bool = False) -> TextIO:
    """Open a text file of ours to write at its end, or ``empty``. A symbolic link in its place is an OSError."""
    descriptor = _open_regular(path, os.O_WRONLY | os.O_CREAT | (0 if empty else os.O_APPEND))
    file = os.fdopen(descriptor, "w" if empty else "a", encoding="utf-8")
    if empty:
        file.truncate(0)
    return file


def _open_regular(path: Path, flags: int) -> int:
    # O_NONBLOCK: opening a FIFO would wait for its other end
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise NotARegularFile(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise NotARegularFile(errno.EINVAL, "not a regular file")
