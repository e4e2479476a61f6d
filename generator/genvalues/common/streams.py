"""stdin, stdout and stderr as the caller of a command left them: closed, or on a device that is full."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from typing import Any


def open_closed_streams() -> None:
    """Open /dev/null in place of each stream that the caller has closed (``>&-``), so that a command can use it.

    Each takes its own number, the lowest that is free. Otherwise the next file that is opened would take it, and
    messages of libraries in C would be written into that file.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None or (mode == "w" and not is_open_for_writing(stream)):
            null = open(os.devnull, mode)  # noqa: PTH123, SIM115 - until the process ends
            os.set_inheritable(null.fileno(), True)  # for worker processes
            setattr(sys, name, null)


def is_open_for_writing(stream: Any) -> bool:
    """False if the descriptor is open for reading only: started with stderr closed, a shell opens its script there."""
    try:
        os.write(stream.fileno(), b"")
    except OSError as error:  # without a number if the stream has no descriptor, as in tests
        return error.errno != errno.EBADF
    return True


def say(message: object) -> None:
    """Print a message to stderr. If that fails, the exit status is all that can be told."""
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr)
