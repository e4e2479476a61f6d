"""Explain errors of the operating system: a full or read-only volume, a folder without rights, a lack of memory.

Libraries in C++ and Rust wrap such an error in exceptions of their own, which keep its number in their text.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from genvalues.common.errors import Unavailable, UserError, VolumeError

AGAIN = "then run it again: it continues where it stopped"
# What to do about errors that only a person or time can end.
VOLUME_FIXES = {
    errno.ENOSPC: f"Make room on the volume or enlarge it (storage.size), {AGAIN}.",
    errno.EDQUOT: f"Raise the quota of the user or make room, {AGAIN}.",
    errno.EFBIG: f"Raise the limit of the size of a file (ulimit -f), {AGAIN}.",
    errno.EROFS: "Mount the volume for writing. A file system that finds an error turns read-only by itself.",
    errno.EIO: "Check the volume, and the log of its node's kernel.",
    errno.ESTALE: "Mount the volume again: its server has been restarted or replaced.",
    errno.ENOTCONN: "Check the server of the volume.",
    errno.EMFILE: "Raise the limit of open files of a process (ulimit -n).",
    errno.ENFILE: "Raise the limit of open files of the node (fs.file-max).",
}
# What to do about errors that stay as they are until the user changes something.
USER_FIXES = {
    errno.EACCES: "Give user {user} the rights to read and write it (chown, chmod, or securityContext.runAsUser).",
    errno.EPERM: "Give user {user} the rights to read and write it (chown, chmod, or securityContext.runAsUser).",
    errno.ENOTDIR: "Remove the file that is in the place of a folder.",
    errno.EEXIST: "Remove the file that is in the place of a folder.",
    errno.EISDIR: "Remove the folder that is in the place of a file.",
    errno.ELOOP: "Remove the symbolic link.",
    errno.ENAMETOOLONG: "Choose a shorter name or path.",
    errno.ENODEV: "Name a file or folder on a volume that supports this operation.",
}
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}  # met only by writing
NUMBER = re.compile(r"(?:os error |\[errno )(\d+)", re.IGNORECASE)  # as Rust and as Python, and C++, write it
NO_MEMORY = re.compile(r"can't allocate memory|out of memory|std::bad_alloc", re.IGNORECASE)


def explain(
    error: BaseException, place: Path | None = None, needs: Callable[[], str] = lambda: ""
) -> UserError | Unavailable | VolumeError | None:
    """Explain an error of the operating system in one line; None for any other error.

    ``place`` is a path on the volume, named where the error has no path; ``needs`` describes the room that was needed.
    """
    for each in causes(error):
        number = number_of(each)
        if number is not None:
            path = path_of(each) or place
            found = _explained(number, path, needs)
            if found is not None:
                return found
    if any(isinstance(each, MemoryError) or NO_MEMORY.search(str(each)) for each in causes(error)):
        return Unavailable("out of memory. Raise resources.limits.memory of the stage, or free memory.")
    if isinstance(error, FileNotFoundError) and error.filename is None and not has_working_directory():
        return UserError("the working directory no longer exists", fix="cd to another folder.")
    if isinstance(error, OSError) and error.strerror:
        return Unavailable(f"{path_of(error) or place or 'a system call'}: {error.strerror}")
    return None


@contextmanager
def explained(place: Path, needs: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Within the block, errors that ``explain`` explains are raised as such."""
    try:
        yield
    except (UserError, Unavailable, VolumeError):
        raise
    except Exception as error:
        found = None if isinstance(error, BrokenPipeError) else explain(error, place, needs)
        if found is None:
            raise
        raise found from error


def has_working_directory() -> bool:
    try:
        Path.cwd()
    except FileNotFoundError:
        return False
    return True


def is_of_volume(error: OSError) -> bool:
    """Whether only a person or time can end the error: a full or read-only volume, for example."""
    return error.errno in VOLUME_FIXES


def _explained(number: int, path: Path | None, needs: Callable[[], str]) -> UserError | VolumeError | None:
    where = str(path or "a file")
    what = f"cannot be {'written' if number in FULL else 'read or written'}: {os.strerror(number)}"
    if number in USER_FIXES:
        return UserError(what, where=where, fix=USER_FIXES[number].format(user=os.getuid()))
    if number not in VOLUME_FIXES:
        return None
    facts = [needs(), room(path) if path else ""] if number in FULL - {errno.EROFS} else []
    said = "".join(f"{fact}. " for fact in facts if fact)
    return VolumeError(f"{where}: {what}. {said}{VOLUME_FIXES[number]}")


def number_of(error: BaseException) -> int | None:
    """The number of the operating system's error, or of the one that an exception of a library tells of."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = NUMBER.search(str(error))
    return int(found[1]) if found else None


def path_of(error: BaseException) -> Path | None:
    """The path that an OSError names; of a rename, the new one."""
    name = getattr(error, "filename2", None) or getattr(error, "filename", None)
    if isinstance(name, bytes):
        name = os.fsdecode(name)
    return Path(name) if isinstance(name, (str, os.PathLike)) else None


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that led to it, the first last; also those of other workers in torch's CheckpointException."""
    while error is not None:
        yield error
        failures = getattr(error, "failures", None)
        if isinstance(failures, dict):
            yield from (pair[0] for pair in failures.values() if isinstance(pair, tuple))
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def room(path: Path) -> str:
    """How much of a path's file system is free: bytes and, where it has a limit, files."""
    for folder in (path, *path.absolute().parents):
        try:
            found = os.statvfs(folder)
        except OSError:
            continue
        free, total = found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize
        files = f" and {found.f_favail:,} of {found.f_files:,} files (inodes)" if found.f_files else ""
        return f"{amount(free)} of {amount(total)}{files} are free there"
    return ""


def amount(size: float) -> str:
    """A number of bytes with three digits: 16.1 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
