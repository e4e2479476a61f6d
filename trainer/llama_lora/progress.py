"""How far a stage has come: a bar on a terminal, otherwise a line in the log every few seconds."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TypeVar

from genvalues.common.progress_bar import ProgressBar, ProgressUpdate, is_relayed, relay

log = logging.getLogger(__name__)

Item = TypeVar("Item")

SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_UPDATES = 0.2  # of a bar
WINDOW = 50  # the last updates, over which the time left is estimated


class StageProgress:
    """Counts ``unit``s, such as rows or steps, up to ``total`` (None: unknown), starting at ``done``."""

    def __init__(self, unit: str, total: int | None = None, done: int = 0) -> None:
        self.unit = unit
        self.total = total
        self.done = done
        self._times: deque[tuple[float, int]] = deque([(time.monotonic(), done)], maxlen=WINDOW)
        self._last_update = 0.0
        self._last_line = time.monotonic()
        self._relays = is_relayed()
        self._bar = None if self._relays else bar_on_stderr()

    def __enter__(self) -> StageProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def seconds_left(self) -> float | None:
        """Estimated from the pace of the last updates; None while that, or the total, is unknown."""
        (first, done_then), (last, done) = self._times[0], self._times[-1]
        if self.total is None or done == done_then:
            return None
        return (self.total - done) * (last - first) / (done - done_then)

    def advance(self, count: int = 1, detail: str = "") -> None:
        """Count ``count`` units more."""
        self.update(self.done + count, detail)

    def update(self, done: int, detail: str = "", *, log_now: bool = False) -> None:
        """Set the count. ``detail`` follows it, such as a loss; ``log_now`` writes a line before the next is due."""
        self.done = done
        now = time.monotonic()
        self._times.append((now, done))
        due = log_now or now - self._last_line >= SECONDS_BETWEEN_LINES
        if due:
            self._last_line = now
        elif now - self._last_update < SECONDS_BETWEEN_UPDATES:
            return
        self._last_update = now
        update = ProgressUpdate(self.unit, done, self.total, self.seconds_left, detail, log=due)
        if self._relays:
            relay(update)
        elif self._bar:
            self._bar.show(update)
        elif due:
            log.info("%s", update)

    def close(self) -> None:
        """Remove the bar."""
        if self._relays:
            relay(ProgressUpdate(self.unit, self.done, self.total, finished=True))
        elif self._bar:
            self._bar.close()


def track(items: Iterable[Item], unit: str, total: int | None = None) -> Iterator[Item]:
    """Yield ``items`` and count each one when the caller asks for the next."""
    with StageProgress(unit, total) as progress:
        for item in items:
            yield item
            progress.advance()


def bar_on_stderr() -> ProgressBar | None:
    """A bar where stderr is a terminal."""
    return ProgressBar(on_stderr=True) if sys.stderr is not None and sys.stderr.isatty() else None
