"""The log of a stage, pod by pod; followed through restarts and new pods until the stage ends."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from genvalues.cluster import kinds
from genvalues.cluster.objects import (
    COMPONENT,
    GATE_SUFFIX,
    RUNNER,
    created,
    is_over,
    name_of,
    started_container,
    uid_of,
)
from genvalues.cluster.podlog import PodLog
from genvalues.cluster.workloads import is_worker
from genvalues.common.errors import Unavailable, UserError
from genvalues.common.text import one_line
from genvalues.ops.stages import Object, StageStatus
from genvalues.ops.status import ReleaseStatus, ReleaseWatcher, api_errors_as_user_errors

log = logging.getLogger(__name__)

INTERVAL = 2.0  # seconds between two looks for new pods
STAGE_SECONDS = 10.0  # seconds between two looks whether the stage has ended
CLOSING_SECONDS = 5.0  # to read the remaining lines after the stage has ended


def write_log(
    watcher: ReleaseWatcher, stage: str | None, *, follow: bool, tail: int | None, write: Callable[[str], None]
) -> str:
    """Write the log of a stage (None: the current one) line by line, with ``follow`` until the stage ends.

    Returns the stage's name. ``tail``: only the last lines of each pod. Raises UserError if the stage does not exist or
    has no log, and as ``ReleaseWatcher.status`` does.
    """
    status = watcher.status()
    name = choose_stage(status, stage)
    reader = LogReader(watcher, name, tail, follow, write)
    with api_errors_as_user_errors(watcher.server.namespace):
        if not reader.open_new() and not follow:
            raise UserError(f"stage {name} has no log", where=watcher.release, fix=why_no_log(status, name))
        if reader.of_gate and name != RUNNER:
            log.info("The pods of %s no longer exist; this is the log of its gate.", name)
        if follow:
            read_until_end(reader, status, name)
        reader.finish()
    return name


def read_until_end(reader: LogReader, status: ReleaseStatus, stage: str) -> None:
    looked = time.monotonic()
    while not has_ended(status, stage):
        time.sleep(INTERVAL)
        reader.open_new()
        if time.monotonic() - looked >= STAGE_SECONDS:
            try:
                status = reader.watcher.status()
            except Unavailable as away:
                log.warning("%s. Retrying.", str(away).rstrip("."))
            looked = time.monotonic()
    reader.open_new()


def choose_stage(status: ReleaseStatus, wanted: str | None) -> str:
    """The stage whose log is shown: ``wanted``, else the current one, else the runner."""
    stages = [*(stage.name for stage in status.stages), *([RUNNER] if status.runner else [])]
    if wanted is not None:
        if wanted.removesuffix(GATE_SUFFIX) not in stages:
            fix = f"Stages: {', '.join(stages)}."
            raise UserError(f'stage "{one_line(wanted)}" not found', where=status.release, fix=fix)
        return wanted
    if status.current:
        return status.current.name
    if status.runner:
        return RUNNER
    raise UserError("no stage has started", where=status.release, fix=f"Try: genvalues status {status.release}")


def find_stage(status: ReleaseStatus, name: str) -> StageStatus | None:
    return next((stage for stage in status.all_stages if stage.name == name.removesuffix(GATE_SUFFIX)), None)


def has_ended(status: ReleaseStatus, name: str) -> bool:
    """Whether no more lines will come: the stage has ended, or the pipeline has without running it."""
    stage = find_stage(status, name)
    return stage is not None and (stage.is_over or status.is_over)


def why_no_log(status: ReleaseStatus, name: str) -> str:
    stage = find_stage(status, name)
    if stage is not None and stage.state == "waiting":
        return "It has not started; -f waits for it."
    if stage is not None and stage.note:
        return f"It has not started: {stage.note}"
    return "Its pods no longer exist."


@dataclass
class LogReader:
    """Reads every pod of one stage once, each in its own thread, and writes whole lines."""

    watcher: ReleaseWatcher
    stage: str
    tail: int | None
    follow: bool
    write: Callable[[str], None]
    prefixed: bool = False
    of_gate: bool = False
    _logs: dict[str, PodLog] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def open_new(self) -> bool:
        """Start to read new pods; return whether any pod is, or was, read."""
        pods = self.pods(self.stage)
        if not pods and not self._logs and not self.stage.endswith(GATE_SUFFIX):
            pods = self.pods(self.stage + GATE_SUFFIX)
            self.of_gate = bool(pods)
        elif pods:
            self.of_gate = False
        self.prefixed = self.prefixed or len(pods) > 1 or any(map(is_worker, pods))
        for pod in pods:
            uid = uid_of(pod)
            if uid not in self._logs and (container := started_container(pod)):
                self._logs[uid] = self.start(name_of(pod), container)
        running = {uid_of(pod) for pod in pods if not is_over(pod)}
        for uid, pod_log in self._logs.items():
            if uid not in running:
                pod_log.over.set()
        return bool(self._logs)

    def start(self, pod: str, container: str) -> PodLog:
        def take(text: str) -> None:
            with self._lock:
                self.write(f"[{pod}] {text}" if self.prefixed else text)

        pod_log = PodLog(self.watcher.server, pod, container, take, interval=INTERVAL, tail=self.tail)
        if not self.follow:
            pod_log.over.set()
        pod_log.start()
        return pod_log

    def pods(self, component: str) -> Sequence[Object]:
        labels = f"{self.watcher.selector},{COMPONENT}={component}"
        return sorted(self.watcher.server.list(kinds.PODS, labels=labels), key=lambda pod: (created(pod), name_of(pod)))

    def finish(self) -> None:
        """Read the remaining lines; after following, for at most CLOSING_SECONDS."""
        for pod_log in self._logs.values():
            pod_log.over.set()
        ends = time.monotonic() + CLOSING_SECONDS
        for pod_log in self._logs.values():
            pod_log.join(max(0.0, ends - time.monotonic()) if self.follow else None)
        for pod_log in self._logs.values():
            if pod_log.refused:
                raise pod_log.refused
