"""Locks between processes: held by one at a time, and free as soon as its holder ends, also if it is killed (flock).

On a volume without flock nothing is locked; where flock is local to a node (NFS without locks, Lustre mounted with
localflock), only processes of one node exclude each other. FSx for Lustre is mounted with flock by its CSI driver.
"""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path

from genvalues.common.errors import UserError
from genvalues.common.text import one_line

log = logging.getLogger(__name__)

POLL_INTERVAL = 0.2  # seconds
TOLD_AGAIN = 60.0  # seconds between two log lines about the same wait
HOLDER_BYTES = 256


@contextmanager
def locked(file: Path, holder: str, most_seconds: float | None = None, *, remove: bool = False) -> Iterator[None]:
    """Hold the lock ``file`` during the block. The log says for whom it waits.

    ``holder`` describes this process in the messages of others, such as "llama-lora merge". ``remove``: delete the file
    after the block. Raises UserError if the lock is not free after ``most_seconds`` (None: wait without a limit), or if
    the file is not a regular one; OSError if it cannot be created.
    """
    began = time.monotonic()
    while True:
        descriptor = open_lock(file)
        try:
            wait_for(descriptor, file, began, most_seconds)
            if not is_at(descriptor, file):  # the holder that it waited for has removed it
                continue
            write_holder(descriptor, holder)
            try:
                yield
            finally:
                with suppress(OSError):
                    os.ftruncate(descriptor, 0)  # there is no holder any more
                    if remove:
                        file.unlink()
            return
        finally:
            os.close(descriptor)


def lock_beside(path: Path) -> Path:
    """The lock file of a file or folder: beside it, because a folder may be replaced."""
    return path.with_name(f".{path.name}.lock")


def open_lock(file: Path) -> int:
    """Open a lock file, and create it if it does not exist. Raises UserError if it is a link or no regular file.

    Raises OSError if the volume does not let it be created.
    """
    flags = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # not inherited by programs; opening a FIFO does not wait
    fix = "Delete it and run this again."
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.is_symlink():
        raise UserError("the lock file is a symbolic link", where=str(file), fix=fix)
    try:
        descriptor = os.open(file, flags | os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:
        if not file.exists():
            raise
        descriptor = os.open(file, flags | os.O_RDONLY)  # of another user: flock does not require write access
    except IsADirectoryError:
        raise UserError("the lock file is a folder", where=str(file), fix=fix) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError("the lock file is not a regular file", where=str(file), fix=fix)
    return descriptor


def is_at(descriptor: int, file: Path) -> bool:
    """Whether the open file is the one that has this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), file.lstat())
    except OSError:
        return False


def wait_for(descriptor: int, file: Path, began: float, most_seconds: float | None) -> None:
    """Wait until this process holds the lock. Raises UserError ``most_seconds`` after ``began``."""
    tell_at = began
    while not acquired(descriptor):
        now = time.monotonic()
        holder = read_holder(descriptor)
        if most_seconds is not None and now - began >= most_seconds:
            raise UserError(
                f"still locked after {most_seconds:.0f} s by {holder}",
                where=str(file),
                fix="Wait until that ends, or stop it, and run this again.",
            )
        if now >= tell_at:
            log.info(f"waiting for {holder}, which holds {file}")
            tell_at = now + TOLD_AGAIN
        time.sleep(POLL_INTERVAL)


def acquired(descriptor: int) -> bool:
    """Whether this process now holds the lock. True on a volume without locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        log.debug(f"this volume has no locks: {error.strerror}")
    return True


def write_holder(descriptor: int, holder: str) -> None:
    """Write who holds the lock into its file, for the messages of others. Without write access nothing is written."""
    since = datetime.now(timezone.utc).isoformat(timespec="seconds")
    text = f"{holder} (process {os.getpid()} on {socket.gethostname()}, since {since})"
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode()[:HOLDER_BYTES], 0)


def read_holder(descriptor: int) -> str:
    """Who holds the lock, as far as its file tells."""
    try:
        text = os.pread(descriptor, HOLDER_BYTES, 0).decode("utf-8", "replace")
    except OSError:
        text = ""
    return one_line(text, width=HOLDER_BYTES) or "another process"
