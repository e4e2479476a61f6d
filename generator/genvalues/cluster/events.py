"""Kubernetes Events about the stages: StageStarted, StageFinished and StageFailed, for `kubectl describe job`.

The commands that call the API anyway write them, about their own Job and, in the runner, about the Jobs of the stages
that call no API. Events are for people: whatever goes wrong with one is ignored, and takes seconds at most.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TypeVar

from genvalues.cluster import kinds
from genvalues.cluster.api import TRANSPORT_ERRORS, Api
from genvalues.cluster.failures import StageFailed
from genvalues.cluster.kinds import ApiError, Object
from genvalues.cluster.objects import (
    INSTANCE,
    annotations_of,
    component_of,
    condition,
    is_finished,
    name_of,
    owners_of,
    terminations,
)
from genvalues.common.errors import UserError
from genvalues.common.text import one_line, redacted

log = logging.getLogger(__name__)

STARTED, FINISHED, FAILED = "StageStarted", "StageFinished", "StageFailed"
NEEDS_CLUSTER = "llama-lora/needs-cluster"  # annotation of stages whose own command calls the API
JOB_UID = "LLAMA_LORA_JOB_UID"  # the chart sets it from a label that the Job controller gives its pods
MESSAGE_LENGTH = 1000  # the API server accepts 1,024 bytes
PATIENCE_SECONDS = 3.0
REPORTER = "llama-lora"


@dataclass
class Ending:
    """What the event at the end of a stage says."""

    message: str = "done"


class EventWriter:
    """Writes events into the namespace of ``api``. The first one that fails is logged, in one line."""

    def __init__(self, api: Api, command: str) -> None:
        self._api = api.with_patience(PATIENCE_SECONDS)
        self._command = command
        self._failure_logged = False

    def write(self, reason: str, job: str, uid: str, message: str) -> None:
        """Write an event about a Job. Never raises."""
        try:
            self._api.create(kinds.EVENTS, event(self._api.namespace, self._command, reason, job, uid, message))
        except (ApiError, *TRANSPORT_ERRORS) as error:
            if not self._failure_logged:
                self._failure_logged = True
                log.info("no events: %s", one_line(str(error), 200))


def event(namespace: str, command: str, reason: str, job: str, uid: str, message: str) -> Object:
    """An Event (core/v1) about a Job. `kubectl describe job` finds it by name and uid."""
    now = datetime.now(timezone.utc)
    moment = now.isoformat(timespec="seconds").replace("+00:00", "Z")
    return {
        "apiVersion": "v1",
        "kind": "Event",
        # As client-go names events: the object and the time.
        "metadata": {"name": f"{job}.{time.time_ns():x}", "namespace": namespace},
        "involvedObject": {"apiVersion": "batch/v1", "kind": "Job", "name": job, "namespace": namespace, "uid": uid},
        "reason": reason,
        "message": first_line(message),
        "type": "Warning" if reason == FAILED else "Normal",
        "source": {"component": f"{REPORTER}-{command}"},
        "reportingComponent": f"{REPORTER}/{command}",
        "reportingInstance": os.environ.get("HOSTNAME", command)[:128],
        "firstTimestamp": moment,
        "lastTimestamp": moment,
        "count": 1,
    }


def first_line(message: str) -> str:
    """The first line of a message, without tokens."""
    lines = [line for line in redacted(message).splitlines() if line.strip()]
    return (
        one_line(lines[0] if lines else "no message", MESSAGE_LENGTH).encode()[:MESSAGE_LENGTH].decode(errors="ignore")
    )


@contextmanager
def stage_events(api: Api, command: str, job: str) -> Iterator[Ending]:
    """Write an event about this pod's own Job when the block begins, and when it ends or fails for good."""
    writer, uid = EventWriter(api, command), os.environ.get(JOB_UID, "")
    writer.write(STARTED, job, uid, f"{command} started")
    ending = Ending()
    try:
        yield ending
    except (UserError, StageFailed) as error:
        writer.write(FAILED, job, uid, str(error))
        raise
    writer.write(FINISHED, job, uid, ending.message)


class StageJobs:
    """What has happened to the Jobs of a release's stages since the last look."""

    def __init__(self, seen: list[Object]) -> None:
        self._reported: dict[str, str] = {uid_of(job): FINISHED for job in seen if is_finished(job)}

    def changes(self, jobs: list[Object]) -> Iterator[tuple[str, Object]]:
        """Yield each reason that has not been told yet, with its Job."""
        for job in jobs:
            if annotations_of(job).get(NEEDS_CLUSTER) or not component_of(job):
                continue  # writes its own
            uid, told = uid_of(job), self._reported.get(uid_of(job))
            if told in (FINISHED, FAILED) or not job.get("status", {}).get("startTime"):
                continue
            if told is None:
                self._reported[uid] = STARTED
                yield STARTED, job
            if is_finished(job):
                reason = FAILED if condition(job, "Failed") else FINISHED
                self._reported[uid] = reason
                yield reason, job


def uid_of(item: Object) -> str:
    return str(item["metadata"].get("uid", ""))


@contextmanager
def events_of_release(api: Api, release: str, interval: float = 5.0) -> Iterator[None]:
    """While the block runs, write events about the stages of a release that call no API, from a thread."""
    writer, hasty = EventWriter(api, "runner"), api.with_patience(PATIENCE_SECONDS)
    over = threading.Event()

    def list_jobs() -> list[Object]:
        return hasty.list(kinds.JOBS, labels=f"{INSTANCE}={release}")

    def look(jobs: StageJobs) -> None:
        for reason, job in jobs.changes(list_jobs()):
            writer.write(reason, name_of(job), uid_of(job), describe(reason, job, hasty))

    def follow(jobs: StageJobs) -> None:
        last = False
        while not last:
            last = over.wait(interval)
            ignoring_errors(lambda: look(jobs))

    seen = ignoring_errors(list_jobs)
    thread = threading.Thread(target=follow, args=[StageJobs(seen or [])], daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(4 * PATIENCE_SECONDS)


Result = TypeVar("Result")


def ignoring_errors(work: Callable[[], Result]) -> Result | None:
    """Call ``work``; None if the API server does not answer or refuses."""
    try:
        return work()
    except (ApiError, *TRANSPORT_ERRORS):
        return None


def describe(reason: str, job: Object, api: Api) -> str:
    """What the event says: the last words of the stage's pod, or what the Job controller says."""
    stage = component_of(job)
    if reason == STARTED:
        return f"{stage} started"
    words = last_words(api, name_of(job))
    failed = condition(job, "Failed")
    return words or (f"{stage} failed: {failed.get('message', '')}" if failed else f"{stage} done")


def last_words(api: Api, job: str) -> str:
    """The last line that a Job's latest pod has left: its termination message, or the end of its log if it failed."""
    pods = [pod for pod in api.list(kinds.PODS, labels=f"job-name={job}") if job in owners_of(pod)]
    ended = [over for pod in pods for over in terminations(pod)]
    latest = max(ended, key=lambda over: str(over.get("finishedAt") or ""), default=None)
    lines = [line for line in str((latest or {}).get("message") or "").splitlines() if line.strip()]
    return lines[-1] if lines else ""
