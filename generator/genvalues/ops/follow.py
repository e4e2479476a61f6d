"""Follow a release: report each change of its stages until the pipeline ends."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from datetime import datetime, timezone

from genvalues.common.errors import Unavailable
from genvalues.ops.stages import StageStatus
from genvalues.ops.status import ReleaseStatus, ReleaseWatcher
from genvalues.ops.status_text import describe

log = logging.getLogger(__name__)

INTERVAL = 5.0  # seconds between two looks
PATIENCE = 600.0  # seconds without an API server until following ends; the cluster goes on


class ReleaseFollower:
    """Reports what has changed since the last look. ``status``: that of the last look; None if it failed."""

    def __init__(self, watcher: ReleaseWatcher) -> None:
        self.watcher = watcher
        self.status: ReleaseStatus | None = None
        self._reported: dict[str, tuple[object, ...]] = {}
        self._away_since: float | None = None

    def look(self) -> list[str]:
        """Look once and return a line for each change.

        An API server that does not answer is logged; raises Unavailable if it has not answered for PATIENCE seconds.
        Raises UserError as ``ReleaseWatcher.status`` does.
        """
        self.status = None
        try:
            status = self.watcher.status()
        except Unavailable as away:
            now = time.monotonic()
            if self._away_since is None:
                self._away_since = now
                log.warning("%s. Retrying.", str(away).rstrip("."))
            if now - self._away_since > PATIENCE:
                raise
            return []
        if self._away_since is not None:
            self._away_since = None
            log.info("The API server answers again.")
        self.status = status
        return self.changes(status)

    def changes(self, status: ReleaseStatus) -> list[str]:
        lines = []
        for stage in (*status.stages, *status.all_stages):
            if stage.name not in self._reported and stage.state == "waiting":
                continue
            before, after = self._reported.get(stage.name), reported(stage)
            self._reported[stage.name] = after
            # That its workers have ended is reported with its end, a moment later.
            if after != before and not (before and after == (*before[:-1], ())):
                lines.append(describe(stage, datetime.now(timezone.utc)))
        return lines

    def follow(self) -> Iterator[str]:
        """Yield each change until the pipeline is over. Raises as ``look`` does."""
        while True:
            yield from self.look()
            if self.status and self.status.is_over:
                return
            time.sleep(INTERVAL)


def reported(stage: StageStatus) -> tuple[object, ...]:
    """What is reported again when it differs, last the nodes whose devices the stage holds; not how long it has run."""
    progress = stage.progress or {}
    step = progress.get("updated"), progress.get("step")
    return stage.state, stage.note, stage.restarts, step, stage.nodes if stage.devices else ()
