"""The log of a stage, pod by pod; followed through restarts and pods that come later, until the stage ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from genvalues.cluster import api as kinds
from genvalues.cluster.api import Api
from genvalues.cluster.objects import (
    COMPONENT,
    GATE_SUFFIX,
    INSTANCE,
    created,
    is_over,
    is_worker,
    name_of,
    started_container,
)
from genvalues.cluster.podlog import PodLog
from genvalues.common.errors import Unavailable, UserError
from genvalues.common.text import one_line
from genvalues.ops.stages import Object, StageStatus
from genvalues.ops.status import ReleaseStatus, Watcher, told_in_a_line

INTERVAL = 2.0  # seconds between two looks at which pods there are
STAGE_SECONDS = 10.0  # and at whether the stage has ended
LAST_WORDS = 5.0  # seconds for the logs of what has ended to come through
RUNNER = "runner"


def logs(
    watcher: Watcher,
    stage: str | None,
    *,
    follow: bool,
    tail: int | None,
    write: Callable[[str], None],
    say: Callable[[str], None],
) -> str:
    """Write the log of a stage (None: the current one) line by line; its name. With ``follow``, until it ends."""
    status = watcher.look()
    name = chosen(status, stage)
    server = watcher.server
    reader = Reader(server, status, name, tail, follow, write)
    with told_in_a_line(server.namespace):
        if not reader.open_new() and not follow:
            raise UserError(f"stage {name} has no log", where=watcher.release, fix=why_no_log(status, name))
        if reader.of_gate and name != RUNNER:
            say(f"the pods of {name} are gone; this is its gate's log")
        if not follow:
            reader.finish()
            return name
        next_look = time.monotonic()
        while True:
            if time.monotonic() >= next_look:
                try:
                    status = watcher.look()
                except Unavailable as away:
                    say(f"{away} Trying again.")
                next_look = time.monotonic() + STAGE_SECONDS
            if has_ended(status, name):
                break
            time.sleep(INTERVAL)
            reader.open_new()
        reader.open_new()
        reader.finish()
    return name


def chosen(status: ReleaseStatus, wanted: str | None) -> str:
    names = [stage.name for stage in status.stages]
    known = [*names, *(name + GATE_SUFFIX for name in names), *([RUNNER] if status.runner else [])]
    if wanted is not None:
        if wanted not in known:
            fix = f"Stages: {', '.join([*names, *([RUNNER] if status.runner else [])])}."
            raise UserError(f'no stage "{one_line(wanted)}"', where=status.release, fix=fix)
        return wanted
    if status.current:
        return status.current.name
    if status.runner:
        return RUNNER
    raise UserError("no stage has begun", where=status.release, fix=f"Look: genvalues status {status.release}")


def of_stage(status: ReleaseStatus, name: str) -> StageStatus | None:
    name = name.removesuffix(GATE_SUFFIX)
    return next((one for one in (status.runner, *status.stages) if one and one.name == name), None)


def has_ended(status: ReleaseStatus, name: str) -> bool:
    """Nothing will be written any more: the stage is over, or the pipeline is and never came to it."""
    stage = of_stage(status, name)
    return stage is not None and (stage.is_over or status.is_over)


def why_no_log(status: ReleaseStatus, name: str) -> str:
    stage = of_stage(status, name)
    if stage is not None and stage.state == "waiting":
        return "It has not begun; -f waits for it."
    if stage is not None and stage.note:
        return f"It has not started: {stage.note}"
    return "Its pods are gone, and their logs with them."


class Reader:
    """Every pod of one stage, each read once by a thread of its own, in whole lines."""

    def __init__(
        self,
        server: Api,
        status: ReleaseStatus,
        stage: str,
        tail: int | None,
        follow: bool,
        write: Callable[[str], None],
    ) -> None:
        self.server = server
        self.release = status.release
        self.stage = stage
        self.tail = tail
        self.follow = follow
        self.write = write
        self.prefixed = False
        self.of_gate = False
        self._follows: dict[str, PodLog] = {}
        self._lock = threading.Lock()

    def open_new(self) -> bool:
        """Begin to read the pods that have come since; whether any is, or was, read."""
        pods = self.pods(self.stage)
        if not pods and not self._follows and not self.stage.endswith(GATE_SUFFIX):
            pods = self.pods(self.stage + GATE_SUFFIX)
            self.of_gate = bool(pods)
        elif pods and self.of_gate:
            self.of_gate = False
        self.prefixed = self.prefixed or len(pods) > 1 or any(is_worker(pod) for pod in pods)
        for pod in pods:
            uid = pod["metadata"]["uid"]
            if uid not in self._follows and (container := started_container(pod)):
                self._follows[uid] = self.begun(name_of(pod), container)
            if uid in self._follows and is_over(pod):
                self._follows[uid].over.set()
        living = {pod["metadata"]["uid"] for pod in pods}
        for uid, log in self._follows.items():
            if uid not in living:
                log.over.set()
        return bool(self._follows)

    def begun(self, pod: str, container: str) -> PodLog:
        def take(text: str) -> None:
            with self._lock:
                self.write(f"[{pod}] {text}" if self.prefixed else text)

        log = PodLog(self.server, pod, container, take, interval=INTERVAL, tail=self.tail)
        if not self.follow:
            log.over.set()
        log.start()
        return log

    def pods(self, component: str) -> Sequence[Object]:
        labels = f"{INSTANCE} in ({self.release},{self.release}-run),{COMPONENT}={component}"
        return sorted(self.server.list(kinds.PODS, labels=labels), key=lambda pod: (created(pod), name_of(pod)))

    def finish(self) -> None:
        """Read what there is to its end; of what was followed, for LAST_WORDS at most."""
        for log in self._follows.values():
            log.over.set()
        ends = time.monotonic() + LAST_WORDS
        for log in self._follows.values():
            log.join(max(0.0, ends - time.monotonic()) if self.follow else None)
        for log in self._follows.values():
            if log.refused:
                raise log.refused
