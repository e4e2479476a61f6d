"""What a command says while it works: ``logging`` to stderr. stdout is for data.

Modules write ``log = logging.getLogger(__name__)`` and log: info is what a user follows, warning what they should act
on, debug the details that -v shows. Errors are not logged: they are raised (genvalues.common.errors).
"""

from __future__ import annotations

import logging
import sys

PACKAGES = ("genvalues", "llama_lora")


class Formatter(logging.Formatter):
    """Info and debug as they are; warnings and above with their level before them."""

    def format(self, record: logging.LogRecord) -> str:
        message = super().format(record)
        return f"{record.levelname.lower()}: {message}" if record.levelno >= logging.WARNING else message


class Stderr(logging.StreamHandler):
    """Whatever ``sys.stderr`` is when a record is written: tests and progress bars replace it."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(Formatter())

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def configure(verbosity: int = 0) -> None:
    """Log to stderr: warnings only (-q, below 0), what a user follows (0), details too (-v, above 0)."""
    level = logging.WARNING if verbosity < 0 else logging.DEBUG if verbosity > 0 else logging.INFO
    for name in PACKAGES:
        logger = logging.getLogger(name)
        logger.handlers[:] = [Stderr()]
        logger.propagate = False
        logger.setLevel(level)
