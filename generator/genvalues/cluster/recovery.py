"""Going on where a Helm client was killed: ``genvalues install`` on its release, the runner on its inner one.

A client that is killed by SIGKILL leaves its release pending, and then every Helm command refuses to work on it
("another operation is in progress"). No hook is run here, because a rollback's or an uninstall's would stop the
training, for which the next client's gate looks.
"""

from __future__ import annotations

import base64
import gzip
import json
import time
import zlib
from collections.abc import Callable

from genvalues.cluster import api as kinds
from genvalues.cluster.api import Api, Object
from genvalues.cluster.cleanup import QUIET_LOOKS, fail_job
from genvalues.cluster.objects import INSTANCE, STAGE, annotations_of, component_of, is_finished, labels_of, name_of
from genvalues.common.errors import UserError

PENDING = "status in (pending-install,pending-upgrade,pending-rollback)"
UNREADABLE = (AttributeError, KeyError, TypeError, ValueError, OSError, EOFError, zlib.error)


class AtWork(UserError):
    """The release is pending because a Helm client works on it right now."""

    def __init__(self, release: str) -> None:
        fix = "Wait for it or stop it, then write the same command again"
        super().__init__(f"another Helm client is at work on release {release}", fix=fix)


def pending(api: Api, release: str) -> list[Object]:
    """The release's records with which Helm refuses to work."""
    return api.list(kinds.SECRETS, labels=f"owner=helm,name={release},{PENDING}")


def take_over(api: Api, release: str, say: Callable[[str], None], interval: float) -> None:
    """Return when no Job of the release runs and no record of it is pending; raise AtWork when a client is alive.

    Helm would delete a running stage's Job to make it anew, or start the next stage beside it: it is waited for. A gate
    is ended instead: the PyTorchJob that it follows, for hours, goes on without it.
    """
    records, known = pending(api, release), uids(living_jobs(api, release))
    if not records and not known:
        return
    told: list[str] = []
    quiet = 0
    while quiet < QUIET_LOOKS:
        living = living_jobs(api, release)
        # A client starts the next Job when one has ended, and writes its record anew before each and at its end.
        if uids(living) - known or versions(pending(api, release)) != versions(records):
            raise AtWork(release)
        for job in living:
            if component_of(job).endswith("-gate"):
                fail_job(api, job, say)
        names = [name_of(job) for job in living]
        if names and names != told:
            say(f"waiting for {', '.join(names)}, which an earlier Helm client started")
            told = names
        quiet = 0 if living else quiet + 1
        time.sleep(interval)
    for record in records:
        mark_failed(api, release, record, say)


def uids(items: list[Object]) -> set[str]:
    return {item["metadata"]["uid"] for item in items}


def living_jobs(api: Api, release: str) -> list[Object]:
    """Jobs that Helm waits for: stages, and the cleanup before an install or a rollback."""
    jobs = api.list(kinds.JOBS, labels=f"{INSTANCE}={release}")
    return [
        job for job in jobs if STAGE in annotations_of(job) and component_of(job) != "runner" and not is_finished(job)
    ]


def versions(records: list[Object]) -> list[tuple[str, str]]:
    return [(name_of(record), record["metadata"]["resourceVersion"]) for record in records]


def mark_failed(api: Api, release: str, record: Object, say: Callable[[str], None]) -> None:
    """What Helm itself does when it is stopped by a signal.

    Not deleted: Helm would give the revision's number again, to PyTorchJobs that exist ("already exists"), and a first
    install would begin with the cleanup hook, which stops the training.
    """
    labels = labels_of(record)
    revision, status = labels.get("version"), labels.get("status")
    say(f"{release} is {status} (revision {revision}), left by a Helm client that was killed: marking it as failed")
    try:
        content = with_status_failed(record["data"]["release"])
    except UNREADABLE as error:
        fix = f"Delete it: kubectl -n {api.namespace} delete secret {name_of(record)}"
        raise UserError("is no record of Helm's", where=f"secret {name_of(record)}", fix=fix) from error
    failed = {
        **record,
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {**record["metadata"], "labels": {**labels, "status": "failed"}},
        "data": {**record["data"], "release": content},
    }
    if not api.replace(kinds.SECRETS, failed):
        raise AtWork(release)


def with_status_failed(content: str) -> str:
    """A record's content: JSON, by gzip, in base64, and that in base64 again as in every Secret."""
    release = json.loads(gzip.decompress(base64.b64decode(base64.b64decode(content))))
    release["info"].update(status="failed", description="the Helm client was killed")
    packed = gzip.compress(json.dumps(release, ensure_ascii=False).encode(), mtime=0)
    return base64.b64encode(base64.b64encode(packed)).decode()
