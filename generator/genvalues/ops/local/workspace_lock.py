"""One run at a time in a workspace: two would write the same files."""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from genvalues.common.errors import UserError

log = logging.getLogger(__name__)

# For the stages of a killed run to notice that it is gone, and end: a training has 120 s to save a checkpoint.
STOP_SECONDS = 130.0


@contextmanager
def locked(workspace: Path) -> Iterator[int]:
    """Hold the lock of a workspace; yield its file descriptor, which the stages keep open until the last one ends.

    Raises UserError where another run holds it, or the workspace cannot be written.
    """
    path = workspace / ".local" / "lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        file = open(os.open(path, flags, 0o666), "a+")  # noqa: PTH123, SIM115
    except OSError as error:
        fix = "Name a folder that you may write to, or a new one."
        raise UserError(f"cannot be used: {error.strerror}", where=f"--workspace {workspace}", fix=fix) from None
    with file:
        deadline = time.monotonic() + STOP_SECONDS
        told = False
        while not acquired(file):
            file.seek(0)
            holder = file.read().strip()
            # The stages of a killed run may still write, until they notice and end.
            if process_exists(holder) or time.monotonic() > deadline:
                raise UserError(
                    f"another `genvalues local` (process {holder or '?'}) is running in this workspace",
                    where=f"--workspace {workspace}",
                    fix="Wait until it ends, stop it, or use another folder.",
                )
            if not told:
                log.info("waiting for the stages of a run that was killed in this workspace to end")
                told = True
            time.sleep(0.1)
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield file.fileno()


def acquired(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def process_exists(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:  # of another user
        return True
    return True
