"""Following a release: what ``status`` knows, told line by line as it changes, until the pipeline's end."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from genvalues.common.errors import Unavailable
from genvalues.ops.stages import StageStatus
from genvalues.ops.status import ReleaseStatus, Watcher, closing_lines, describe, failure_lines

INTERVAL = 5.0  # seconds between two looks
PATIENCE = 600.0  # seconds without an API server until following ends; the cluster goes on


class Follower:
    """Says what has changed since the last look."""

    def __init__(self, watcher: Watcher, say: Callable[[str], None]) -> None:
        self.watcher = watcher
        self.say = say
        self.status: ReleaseStatus | None = None
        self._told: dict[str, News] = {}
        self._away_since: float | None = None

    def look(self) -> ReleaseStatus | None:
        """One look; None while the API server is away. Raises Unavailable when it stays so, else as status does."""
        try:
            status = self.watcher.look()
        except Unavailable as away:
            now = time.monotonic()
            if self._away_since is None:
                self._away_since = now
                self.say(f"{away} Trying again.")
            if now - self._away_since > PATIENCE:
                raise
            return None
        if self._away_since is not None:
            self._away_since = None
            self.say("the API server answers again")
        self.tell(status)
        self.status = status
        return status

    def tell(self, status: ReleaseStatus) -> None:
        for stage in (*status.stages, status.runner):
            if stage is None or (stage.name not in self._told and stage.state == "waiting"):
                continue
            before, news = self._told.get(stage.name), worth_a_line(stage)
            self._told[stage.name] = news
            # That its workers have ended is told with its end, a moment later.
            if news != before and not (before and news == replace(before, nodes=())):
                self.say(describe(stage, time.time()))

    def to_the_end(self) -> ReleaseStatus:
        """Look until the pipeline is over."""
        while True:
            status = self.look()
            if status is not None and status.is_over:
                return status
            time.sleep(INTERVAL)


@dataclass(frozen=True)
class News:
    """What of a stage is told again when it differs; not how long it has taken so far."""

    state: str
    note: str
    restarts: int
    step: object
    nodes: tuple[str, ...]  # that it holds with their devices


def worth_a_line(stage: StageStatus) -> News:
    step = (stage.progress or {}).get("updated"), (stage.progress or {}).get("step")
    return News(stage.state, stage.note, stage.restarts, step, stage.nodes if stage.devices else ())


def closing(status: ReleaseStatus) -> list[str]:
    """The last lines after following: the outcome, and for a failure its reason and the log's tail last."""
    took = [stage for stage in status.stages if stage.started]
    head = f"{status.release}: {status.outcome}"
    if status.outcome == "done" and took:
        head += f", {sum(stage.state == 'done' for stage in status.stages)} stages run"
        skipped = sum(stage.state == "skipped" for stage in status.stages)
        head += f", {skipped} skipped (up to date)" if skipped else ""
    others = [line for line in closing_lines(status) if line not in failure_lines(status)]
    return [head, *others, *failure_lines(status)]
