"""The one kind of error a user can cause, and the one place that prints it.

Raised deep in the code with what is wrong, where, and what to write instead; printed once, at the boundary of a
command, which then ends with status 2 (DESIGN: 0 done, 2 the user must change something, anything else is retried).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

EXIT_USER_ERROR = 2


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
