"""Where every error of a command ends: one line on stderr, and an exit status."""

from __future__ import annotations

from genvalues.common.errors import EXIT_FAILED, Unavailable, UserError, VolumeError, internal_error, traceback_wanted
from genvalues.common.streams import say
from genvalues.common.system_errors import explain


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
