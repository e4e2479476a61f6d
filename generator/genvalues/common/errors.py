"""The one kind of error a user can cause, and the one place that prints it.

Raised deep in the code with what is wrong, where, and what to write instead; printed once, at the boundary of a
command, which then ends with status 2 (DESIGN: 0 done, 2 the user must change something, anything else is retried).
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

EXIT_USER_ERROR = 2
TRACEBACK = "GENVALUES_TRACEBACK"  # set to anything, the environment variable has the traceback of a defect shown
PACKAGE = Path(__file__).parents[1]


class UserError(Exception):
    """Something the user must change. ``where`` is a place in a file, a file, or a flag; ``fix`` says what to write."""

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what = what.rstrip(".")
        self.where = where
        self.fix = fix
        super().__init__(str(self))

    def __str__(self) -> str:
        message = f"{self.where}: {self.what}" if self.where else self.what
        return f"{message}. {self.fix}" if self.fix else message


class UserErrors(UserError):
    """Several mistakes, reported together: one line each."""

    def __init__(self, errors: Sequence[UserError]) -> None:
        self.errors = list(errors)
        super().__init__("\n".join(str(error) for error in errors))

    def __str__(self) -> str:
        return "\n".join(str(error) for error in self.errors)


@contextmanager
def write_errors_as_user_errors(
    where: str, fix: str = "Name a file in a folder that is there and that you may write to."
) -> Iterator[None]:
    """Around writing what the user has named: what the system says against it, or against its name, as a UserError."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"cannot be written: {reason}", where=where, fix=fix) from None


class Unavailable(Exception):
    """Something outside that may answer later: told in one line, and ended with status 1, so that it is tried again."""


Command = TypeVar("Command", bound=Callable[..., Any])


def user_errors_end_with_status_2(command: Command) -> Command:
    """Decorate a command: a UserError becomes its message on stderr and exit status 2, Unavailable status 1."""

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except UserError as error:
            print(error, file=sys.stderr)
            sys.exit(EXIT_USER_ERROR)
        except Unavailable as error:
            print(error, file=sys.stderr)
            sys.exit(1)

    return wrapper  # type: ignore[return-value]


def defect(error: Exception, *, with_traceback: bool) -> str:
    """An error that is ours, in a line: what, where in the code, and how to report it; after its traceback if wanted.

    Nothing that looks like a token is in it.
    """
    import traceback

    from genvalues.common.text import one_line, redacted

    frames = traceback.extract_tb(error.__traceback__)
    of_ours = [frame for frame in frames if PACKAGE in Path(frame.filename).parents] or list(frames)
    place = f" at {Path(of_ours[-1].filename).name}:{of_ours[-1].lineno}" if of_ours else ""
    said = one_line(redacted(str(error)), 120)
    what = f"{type(error).__name__}{place}{f' ({said})' if said else ''}"
    line = (
        f"genvalues: a defect of ours: {what}. Report it to whoever you have genvalues from, with what the same "
        f"command prints with {TRACEBACK}=1 before it."
    )
    if not with_traceback:
        return line
    return redacted("".join(traceback.format_exception(type(error), error, error.__traceback__))) + line


def traceback_wanted() -> bool:
    """Asked for, or in a pod of the chart, where the command cannot be given again."""
    return bool(os.environ.get(TRACEBACK)) or sys.argv[1:2] == ["cluster"]
