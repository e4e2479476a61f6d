"""Errors that a user can fix, errors that go away on their own, and internal errors; each is printed in one place.

A UserError is raised where the problem is found, with what is wrong, where, and what to write instead. The command
prints it and ends with status 2. Status 1 means that running the command again may succeed, status 75 that it may
succeed after a pause. ``genvalues`` and ``llama-lora`` print unexpected errors in one line, too.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from genvalues.common.streams import say
from genvalues.common.text import one_line, redacted

MOST_CHARACTERS = 1000  # of a line of a message
EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_VOLUME = 75  # EX_TEMPFAIL of sysexits.h
EXIT_INTERRUPTED = 130
TRACEBACK = "GENVALUES_TRACEBACK"  # environment variable: if set, an internal error prints its traceback
POD = "KUBERNETES_SERVICE_HOST"  # environment variable that Kubernetes sets in every container
PACKAGES = ("genvalues", "llama_lora")


class UserError(Exception):
    """Something the user must change: ``what`` is wrong, ``where`` (a file, a place in one, an option), the ``fix``."""

    status = EXIT_USER_ERROR

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what = _short(what).rstrip(".")
        self.where = one_line(where, MOST_CHARACTERS)  # the name of a file may have line breaks
        self.fix = fix
        super().__init__(str(self))

    def __str__(self) -> str:
        message = f"{self.where}: {self.what}" if self.where else self.what
        end = "" if message.endswith("\n") else ". "  # a message of several lines ends with one
        return f"{message}{end}{self.fix}" if self.fix else message


def _short(text: str) -> str:
    """The text with lines of at most MOST_CHARACTERS: a name in a damaged file can have millions."""
    if len(text) <= MOST_CHARACTERS:
        return text
    lines = text.split("\n")
    return "\n".join(line if len(line) <= MOST_CHARACTERS else f"{line[: MOST_CHARACTERS - 3]}..." for line in lines)


class UserErrors(UserError):
    """Several errors reported together, one line each."""

    def __init__(self, errors: Sequence[UserError]) -> None:
        self.errors = list(errors)
        super().__init__("\n".join(str(error) for error in errors))

    def __str__(self) -> str:
        return "\n".join(str(error) for error in self.errors)


@contextmanager
def write_errors_as_user_errors(
    where: str, fix: str = "Name a file in an existing folder that you may write to."
) -> Iterator[None]:
    """Turn an OSError or ValueError raised while writing what the user named into a UserError at ``where``."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"cannot be written: {one_line(str(reason), MOST_CHARACTERS)}", where=where, fix=fix) from None


class Unavailable(Exception):
    """A service does not respond now but may later. Printed in one line; the command ends with status 1."""

    status = EXIT_FAILED


class VolumeError(Exception):
    """A volume is full, read-only or fails. Only a person or time can help, so a retry makes sense after a pause."""

    status = EXIT_VOLUME


Command = TypeVar("Command", bound=Callable[..., Any])


def user_errors_end_with_status_2(command: Command) -> Command:
    """Decorate a command: UserError prints its message and exits with status 2, Unavailable with status 1."""

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except (UserError, Unavailable) as error:
            say(error)
            sys.exit(error.status)

    return wrapper  # type: ignore[return-value]


def internal_error(error: BaseException, program: str, *, with_traceback: bool) -> str:
    """Describe an unexpected error in one line: its type, where in the code, and how to report it.

    ``with_traceback`` puts the traceback before it. Tokens are redacted.
    """
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    own_frames = [frame for frame in frames if set(PACKAGES) & set(Path(frame.filename).parts)] or list(frames)
    place = f" at {Path(own_frames[-1].filename).name}:{own_frames[-1].lineno}" if own_frames else ""
    message = one_line(redacted(str(error)), 120)
    what = f"{type(error).__name__}{place}{f' ({message})' if message else ''}"
    line = (
        f"{program}: internal error: {what}. Please report it, with the output of the same command run with "
        f"{TRACEBACK}=1."
    )
    if not with_traceback:
        return line
    return redacted("".join(traceback.format_exception(type(error), error, error.__traceback__))) + line


def traceback_wanted() -> bool:
    """Whether to print tracebacks: on request, and in the chart's pods, where the command cannot be repeated."""
    command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    return bool(os.environ.get(TRACEBACK)) or command == "cluster" or in_pod()


def in_pod() -> bool:
    """Whether this is a pod of the chart. ``genvalues local`` in a pod, such as a notebook's, is not."""
    return POD in os.environ
