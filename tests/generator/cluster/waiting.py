"""Run the code under test in a thread, wait for its effects (a few seconds at most), and collect what it logs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

PATIENCE = 8.0
STARTED: list[Future[Any]] = []  # by the running test, which must have ended them: conftest.py


def until(happens: Callable[[], Any], what: str = "") -> Any:
    """Wait until ``happens`` returns something true, and return it."""
    ends = time.monotonic() + PATIENCE
    while not (found := happens()):
        assert time.monotonic() < ends, f"waited {PATIENCE} s for {what or happens}"
        time.sleep(0.005)
    return found


def beside(work: Callable[..., Any], *arguments: Any, **options: Any) -> Future[Any]:
    """Run ``work`` in a thread."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(work, *arguments, **options)
    pool.shutdown(wait=False)
    STARTED.append(future)
    return future


def log_lines() -> list[str]:
    """The messages that genvalues logs from now on; conftest.py removes the handler after the test."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("genvalues").addHandler(handler)
    return lines
