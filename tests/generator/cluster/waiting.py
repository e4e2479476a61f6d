"""Running the code under test beside the test, and waiting for what it does; never longer than a few seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

PATIENCE = 8.0


def until(happens: Callable[[], Any], what: str = "") -> Any:
    ends = time.monotonic() + PATIENCE
    while not (found := happens()):
        assert time.monotonic() < ends, f"waited {PATIENCE} s for {what or happens}"
        time.sleep(0.005)
    return found


def beside(work: Callable[..., Any], *arguments: Any, **options: Any) -> Future[Any]:
    pool = ThreadPoolExecutor(1)
    future = pool.submit(work, *arguments, **options)
    pool.shutdown(wait=False)
    return future
