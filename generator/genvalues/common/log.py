"""Messages of a command: ``logging`` to stderr. stdout is for data.

Modules write ``log = logging.getLogger(__name__)``. Info is for progress that a user follows, warning for what they
should act on, debug for details that -v shows. Errors are raised, not logged (genvalues.common.errors).
"""

from __future__ import annotations

import logging
import sys

PACKAGES = ("genvalues", "llama_lora")


class MessageFormatter(logging.Formatter):
    """Info and debug messages unchanged; warnings and above prefixed with their level."""

    def format(self, record: logging.LogRecord) -> str:
        message = super().format(record)
        return f"{record.levelname.lower()}: {message}" if record.levelno >= logging.WARNING else message


class StderrHandler(logging.StreamHandler):
    """Writes to the current ``sys.stderr``, which tests and progress bars replace."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(MessageFormatter())

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def configure(verbosity: int = 0) -> None:
    """Log to stderr: warnings only (below 0, -q), progress too (0), details too (above 0, -v)."""
    level = logging.WARNING if verbosity < 0 else logging.DEBUG if verbosity > 0 else logging.INFO
    for name in PACKAGES:
        logger = logging.getLogger(name)
        logger.handlers[:] = [StderrHandler()]
        logger.propagate = False
        logger.setLevel(level)
