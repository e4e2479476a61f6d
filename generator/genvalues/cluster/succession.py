"""Whether another gate follows a job when this one ends before the job does. Without one, nothing would enforce
guards.maxCost and guards.stallTimeout, so the gate stops the job."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from genvalues.cluster import kinds
from genvalues.cluster.api import Api
from genvalues.cluster.failures import StageFailed
from genvalues.cluster.kinds import ApiError, NotAllowed, Object
from genvalues.cluster.objects import STOPPED_BY_US, is_being_deleted, is_finished, name_of
from genvalues.cluster.workloads import Workload, is_running
from genvalues.common.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OwnJob:
    """The Job of this gate. ``wait``: seconds in which Helm, which deletes the Job, creates its successor."""

    name: str
    uid: str
    wait: float = 15.0
    interval: float = 1.0

    def has_successor(self, api: Api) -> bool:
        """Whether a gate follows when this one ends now: a new pod of this Job, or a new Job of its name."""
        if not self.uid:  # not a pod of the chart
            return True
        api = api.with_patience(self.interval)
        deadline = time.monotonic() + self.wait
        while True:
            job = api.get(kinds.JOBS, self.name)
            if job is not None and not is_being_deleted(job):
                return job["metadata"]["uid"] != self.uid or starts_again(job)
            if time.monotonic() >= deadline:
                return False
            time.sleep(self.interval)


def starts_again(job: Object) -> bool:
    """Whether the Job creates another pod, or whoever has stopped it takes care of the job that the gate follows."""
    spec = job["spec"]
    if spec.get("activeDeadlineSeconds") == STOPPED_BY_US or spec.get("suspend"):
        return True
    return not is_finished(job) and job.get("status", {}).get("failed", 0) < spec["backoffLimit"]


@contextmanager
def followed_to_its_end(
    api: Api, workload: Workload, jobs: Callable[[], list[Object]], has_successor: Callable[[Api], bool]
) -> Iterator[None]:
    """Stop those of ``jobs`` that run if the block ends by anything but their end, and no other gate follows them."""
    try:
        yield
    except StageFailed:  # the job has ended, or the follower has stopped it
        raise
    except BaseException as error:  # SIGTERM, too
        try:
            is_last = isinstance(error, (UserError, NotAllowed)) or not has_successor(api)
            for job in filter(is_running, jobs() if is_last else []):
                log.warning("stopping %s %s: no other gate follows it", workload.name, name_of(job))
                workload.stop(api, name_of(job))
        except ApiError as refused:
            log.warning("cannot find out whether another gate follows a %s: %s", workload.name, refused.message)
        raise
