"""Rows of a dataset, and those that cannot be read."""

from __future__ import annotations

from typing import Any, NamedTuple

from genvalues.common.errors import UserError, UserErrors
from genvalues.common.text import number_of

MAX_ROW_BYTES = 16 << 20  # a longer row is a bad row; docs/data.md states it
MOST_REPORTED = 20  # bad rows that one error lists, and that BadRows keeps


class Row(NamedTuple):
    """A row as stored in its source, and its place: file:line, or file or dataset and row number (from 1).

    ``source`` is its name in dataset.additional; empty for the rows of dataset.source and dataset.eval. Values that
    are missing (null, NaN, NaT) are None. A value of type bytes is not valid UTF-8.
    """

    place: str
    values: dict[str, Any]
    source: str = ""


class RowError(UserError):
    """One row cannot be read or rendered; those after it can."""


class MissingColumn(RowError):
    """A row lacks a column. If all rows do, the settings are wrong rather than the rows."""


def too_long_row(place: str) -> RowError:
    return RowError(f"is longer than {MAX_ROW_BYTES >> 20} MiB", where=place, fix="Split long texts into several rows.")


class BadRows:
    """The rows that cannot be read or rendered (dataset.onBadRow): counted if ``skip``, else reported up to 20 at once.

    ``first`` has the errors of the first 20.
    """

    def __init__(self, *, skip: bool = False) -> None:
        self.skip = skip
        self.number = 0
        self.first: list[UserError] = []

    @property
    def ends_run(self) -> bool:
        """Whether there is one, and bad rows are not skipped."""
        return self.number > 0 and not self.skip

    def add(self, error: UserError) -> None:
        """Record a bad row. Raises UserErrors at the 20th, unless bad rows are skipped."""
        self.number += 1
        if len(self.first) < MOST_REPORTED:
            self.first.append(error)
        if self.number == MOST_REPORTED:
            self.raise_errors()

    def raise_errors(self) -> None:
        """Raise UserErrors with every recorded row, if there is one and bad rows are not skipped."""
        if not self.ends_run:
            return
        more = " or more" if self.number == MOST_REPORTED else ""
        summary = UserError(
            f"{number_of(self.number, 'row')}{more} cannot be read",
            where="dataset.onBadRow",
            fix="Correct the data, or set it to skip, which drops and counts such rows.",
        )
        raise UserErrors([*self.first, summary])
