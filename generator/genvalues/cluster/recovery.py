"""Take over a release whose Helm client was killed. Used by ``genvalues install`` and, for RELEASE-run, by the runner.

A client that is killed by SIGKILL leaves the release pending, and every later Helm command fails with "another
operation is in progress". No hooks run here: those of a rollback or an uninstall would stop the training, which the
gate of the next install follows.
"""

from __future__ import annotations

import logging
import time

from genvalues.cluster import kinds
from genvalues.cluster.api import Api
from genvalues.cluster.cleanup import QUIET_LOOKS, fail_job
from genvalues.cluster.helm_records import marked_failed
from genvalues.cluster.kinds import Kind, Object
from genvalues.cluster.objects import (
    GATE_SUFFIX,
    INSTANCE,
    RUNNER,
    STAGE,
    annotations_of,
    component_of,
    is_finished,
    labels_of,
    name_of,
)
from genvalues.common.errors import UserError

log = logging.getLogger(__name__)

PENDING = "status in (pending-install,pending-upgrade,pending-rollback)"


class OperationInProgress(UserError):
    """The release is pending because a Helm client is working on it."""

    def __init__(self, release: str) -> None:
        fix = "Wait until it has finished or stop it, then run the command again"
        super().__init__(f"another Helm client is working on release {release}", fix=fix)


def pending(api: Api, release: str, kind: Kind = kinds.SECRETS) -> list[Object]:
    """The release's records with a pending status, which block every Helm command. ``kind``: where Helm keeps them."""
    return api.list(kind, labels=f"owner=helm,name={release},{PENDING}")


def take_over(api: Api, release: str, interval: float, kind: Kind = kinds.SECRETS) -> None:
    """Return when no stage of the release runs and no revision of it is pending.

    A running stage is waited for, because Helm would delete and recreate its Job, or start the next stage in parallel.
    A gate may run for hours, and enforces limits until the next one takes its place. It is stopped only to see whether
    the Helm client of a pending revision waits for it. Raises OperationInProgress if a Helm client is alive.
    """
    records = pending(api, release, kind)

    def unfinished() -> list[Object]:
        return [job for job in unfinished_jobs(api, release) if records or not is_gate(job)]

    known = uids(unfinished())
    if not records and not known:
        return
    logged: list[str] = []
    quiet = 0
    while quiet < QUIET_LOOKS:
        jobs = unfinished()
        # A live client creates the next Job when one has ended, and updates its record before each Job and at the end.
        if uids(jobs) - known or versions(pending(api, release, kind)) != versions(records):
            raise OperationInProgress(release)
        for job in jobs:
            if is_gate(job):
                fail_job(api, job)
        names = [name_of(job) for job in jobs]
        if names and names != logged:
            log.info("waiting for %s, started by an earlier Helm client", ", ".join(names))
            logged = names
        quiet = 0 if jobs else quiet + 1
        time.sleep(interval)
    for record in records:
        mark_failed(api, release, record, kind)


def uids(items: list[Object]) -> set[str]:
    return {item["metadata"]["uid"] for item in items}


def unfinished_jobs(api: Api, release: str) -> list[Object]:
    """Unfinished Jobs that Helm waits for: stages, and the cleanup before an install or a rollback."""
    jobs = api.list(kinds.JOBS, labels=f"{INSTANCE}={release}")
    return [
        job for job in jobs if STAGE in annotations_of(job) and component_of(job) != RUNNER and not is_finished(job)
    ]


def is_gate(job: Object) -> bool:
    return component_of(job).endswith(GATE_SUFFIX)


def versions(records: list[Object]) -> list[tuple[str, str]]:
    return [(name_of(record), record["metadata"]["resourceVersion"]) for record in records]


def mark_failed(api: Api, release: str, record: Object, kind: Kind) -> None:
    """Set the revision's status to failed, as Helm does when it is stopped by a signal.

    The record is not deleted: Helm would reuse the revision number, whose jobs exist ("already exists"), and a
    first install would run the cleanup hook, which stops the training.
    """
    labels = labels_of(record)
    revision, status = labels.get("version"), labels.get("status")
    log.info("%s is %s (revision %s): its Helm client was killed; marking it as failed", release, status, revision)
    if not api.replace(kind, marked_failed(api, kind, record)):
        raise OperationInProgress(release)
