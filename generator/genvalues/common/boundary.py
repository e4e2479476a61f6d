"""Where every error of a command ends: one line on stderr, and an exit status."""

from __future__ import annotations

from typing import TypeGuard

from genvalues.common.errors import EXIT_FAILED, Unavailable, UserError, VolumeError, internal_error, traceback_wanted
from genvalues.common.streams import say
from genvalues.common.system_errors import FULL, explain


def report(error: BaseException, program: str) -> int:
    """Print any error in one line, and return the exit status of the command.

    The traceback of an internal error precedes its line where ``traceback_wanted``.
    """
    explained = error if isinstance(error, (UserError, Unavailable, VolumeError)) else explain(error)
    if explained is not None:
        say(explained)
        return explained.status
    say(internal_error(error, program, with_traceback=traceback_wanted()))
    return EXIT_FAILED


def is_full_stdout(error: BaseException) -> TypeGuard[OSError]:
    """Whether the error is one of printing to a file on a full volume: it has no path."""
    if not isinstance(error, OSError) or error.errno not in FULL or error.filename is not None:
        return False
    import traceback

    innermost = traceback.extract_tb(error.__traceback__)[-1].name
    return innermost in ("main", "echo")  # which flushes stdout, and click's
