"""Follows one released job to its end, and stops it if it cannot continue.

While it follows the job it tracks the run's cost (cost_tracker) and stops the job when a guard is reached (guards): the
workers save a checkpoint, the nodes are released, and the stage fails.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, NoReturn

from genvalues.cluster import kinds
from genvalues.cluster.api import Api
from genvalues.cluster.config import ClusterConfig
from genvalues.cluster.cost_tracker import RAISE_MAX_COST, CostTracker
from genvalues.cluster.failures import STAGE_FAILED, STOPPED, StageFailed, StoppedByGuard
from genvalues.cluster.guards import StallTimer, describe_stall, reserve_hours
from genvalues.cluster.kinds import ApiError, Object
from genvalues.cluster.objects import (
    COST,
    PROGRESS,
    QUEUE_NAME,
    RUN,
    failures_of,
    is_over,
    labels_of,
    latest_of_each_worker,
    latest_warning,
    moment,
    name_of,
    phase_of,
    unschedulable,
    why_not_started,
)
from genvalues.cluster.progress import describe_checkpoint, describe_progress, read_progress
from genvalues.cluster.queueing import Queue
from genvalues.cluster.trainer_client import ReadStageState, StageState
from genvalues.cluster.workers import Workers
from genvalues.cluster.workloads import Workload, job_of
from genvalues.common.errors import EXIT_USER_ERROR
from genvalues.common.manifests import as_json

log = logging.getLogger(__name__)

NO_WORKLOAD = "no Workload"  # a condition that may last
PUBLISH_SECONDS = 3.0  # for what is informational: the guards wait for it, and a webhook may refuse changes for hours


@dataclass(frozen=True)
class GateTimings:
    """Intervals and timeouts of the gate, in seconds."""

    interval: float = 2.0  # between two looks at the job
    progress: float = 30.0  # between two progress lines, two annotations, and two writes of costs.json
    cannot_start: float = 300.0  # an image that cannot be pulled may be a temporary registry failure
    others_end: float = 300.0  # for the other workers after one has succeeded; they end with a barrier
    manifest: float = 60.0  # NFS clients may see a new file only after this time
    last_words: float = 3.0  # to read the logs of pods that have ended
    workload: float = 60.0  # for Kueue to make a Workload; it takes one second, on a busy node six
    pods_gone: float = 600.0  # longer than the grace period, 120 s, and the 5 minutes until a lost node is evicted


TIMINGS = GateTimings()


@dataclass
class JobFollower:
    """Follows one released job to its end."""

    api: Api
    config: ClusterConfig
    stage: str
    workload: Workload
    job: str
    read_state: ReadStageState
    timings: GateTimings
    costs: CostTracker
    stall: StallTimer = field(default_factory=StallTimer)
    job_started: float = 0.0
    _logged: dict[str, str] = field(default_factory=dict)  # the last text logged, by subject
    _since: dict[str, float] = field(default_factory=dict)  # since when a condition holds
    _progress_logged_at: float = float("-inf")
    _published_at: float = float("-inf")
    _publish_failure_logged: bool = False
    _stale_progress: str = ""  # time of the progress that an earlier job left

    def __post_init__(self) -> None:
        self.title = f"{self.workload.name} {self.job}"
        self.queue = Queue(self.api, self.workload) if self.config.job.queue_name else None
        self.hasty = self.api.with_patience(PUBLISH_SECONDS)
        self.workers = Workers(self.api, f"{self.workload.job_label}={self.job}", self.timings.interval)

    def start(self, state: StageState) -> None:
        self._logged["progress"] = self._stale_progress = read_progress(state.progress).get("updated", "")
        self.workers.start()

    def follow(self, state: StageState) -> None:
        """Return when the stage is done. Raises StageFailed, with the log of the pod that failed."""
        try:
            while not self.check(state):
                time.sleep(self.timings.interval)
            self.publish(state)
        except StageFailed as failure:
            time.sleep(min(self.timings.interval, 1.0))  # the watch on the pods may lag behind the job's status
            self.workers.close(self.timings.last_words)
            failure.pod, failure.tail = self.workers.tail()
            if isinstance(failure, StoppedByGuard):
                raise  # its workers ended because the gate stopped them
            if cause := self.workers.first_failure():
                failure.reason = f"{cause}; {failure.reason}" if str(cause) not in failure.reason else failure.reason
                failure.status = EXIT_USER_ERROR if cause.code == EXIT_USER_ERROR else failure.status
            raise
        finally:
            self.costs.write()
            self.workers.close(0.0)

    def check(self, state: StageState) -> bool:
        """Look at the job and its pods once. Return True when the stage is done; raises StageFailed if it failed."""
        job = self.api.get(self.workload.kind, self.job)
        pods = self.list_pods()
        if job is None:
            fix = f"Start it again: helm upgrade {self.config.release}"
            raise StageFailed(f"{self.title} was deleted while it was running. {fix}", status=EXIT_USER_ERROR)
        self.job_started = self.workload.started(job)
        self.log_changes(job, pods, state)
        if time.monotonic() - self._published_at >= self.timings.progress:
            self.publish(state)
        if failed := self.workload.failed(job):
            raise StageFailed(f"{self.title}: {failed.get('message') or 'Failed'}")
        if any(end.code == EXIT_USER_ERROR for end in self.workers.ends):
            self.end("not retried, because a retry would fail the same way")  # and hold Trainium nodes meanwhile
        if self.workload.succeeded(job):
            return self.all_succeeded(pods) and self.manifest_is_there(state)
        self.end_if_retries_exhausted(job, pods)
        self.end_if_it_cannot_start(job, pods)
        self.guard_cost(job, state)
        self.guard_stall(job, pods, state)
        self.workload.enforce_deadline(self.api, job)
        return False

    def list_pods(self) -> list[Object]:
        """The job's workers as they are now. Costs include the pods of the run's other jobs."""
        of_run = self.api.list(kinds.PODS, labels=f"{RUN}={self.config.run}")
        self.costs.update(of_run)
        pods = [pod for pod in of_run if job_of(pod) == self.job]
        for pod in pods:
            self.workers.observe(pod)
        return latest_of_each_worker(pods)

    # --- reporting

    def publish(self, state: StageState) -> None:
        """Write progress and cost to annotations of the job, where `genvalues status` reads them.

        A failure is logged once and does not stop the job: the annotations are informational.
        """
        self._published_at = time.monotonic()
        now = datetime.fromtimestamp(self.costs.clock(), timezone.utc).isoformat(timespec="seconds")
        annotations = {COST: as_json(self.costs.limit.as_annotation(self.costs.ledger.node_hours, now))}
        if progress := self.new_progress(state):
            annotations[PROGRESS] = as_json(progress)
        try:
            self.hasty.patch(self.workload.kind, self.job, {"metadata": {"annotations": annotations}})
        except ApiError as error:
            if not self._publish_failure_logged:
                log.warning("%s: cannot write progress and cost to %s: %s", self.stage, self.title, error.message)
            self._publish_failure_logged = True
        else:
            self._publish_failure_logged = False

    def new_progress(self, state: StageState) -> dict[str, Any]:
        """The latest progress of this job; empty before its first.

        Progress that existed before this gate started is an earlier job's, unless it is newer than the job's start.
        """
        progress = read_progress(state.progress)
        updated = progress.get("updated", "")
        is_new = updated != self._stale_progress or 0 < self.job_started <= moment(updated)
        return progress if is_new and progress.get("stage") == self.stage else {}

    def log_changes(self, job: Object, pods: list[Object], state: StageState) -> None:
        """Log what has changed since the last look."""
        conditions = [one["type"] for one in job.get("status", {}).get("conditions") or [] if one["status"] == "True"]
        if self.workload.is_suspended(job) and "Suspended" not in conditions:
            conditions.append("Suspended")
        self.log_change("job", f"{self.job}: {', '.join(conditions) or 'no condition yet'}")
        for pod in pods:
            node = pod["spec"].get("nodeName")
            self.log_change(pod["metadata"]["uid"], f"{name_of(pod)}: {phase_of(pod)}{f' on {node}' if node else ''}")
        if time.monotonic() - self._progress_logged_at >= self.timings.progress:
            progress = read_progress(state.progress)
            updated = progress.get("updated", "")
            if progress.get("stage") == self.stage and updated != self._logged["progress"]:
                self._logged["progress"], self._progress_logged_at = updated, time.monotonic()
                log.info("%s: %s", self.stage, describe_progress(progress))

    def log_change(self, subject: str, text: str) -> None:
        if self._logged.get(subject) != text:
            self._logged[subject] = text
            log.info("%s: %s", self.stage, text)

    # --- guards

    def guard_cost(self, job: Object, state: StageState) -> None:
        costs = self.costs
        if costs.limit.is_reached(costs.ledger.node_hours, reserve_hours(job)):
            self.stop(lambda: costs.limit.describe(costs.ledger.node_hours), RAISE_MAX_COST, state)

    def guard_stall(self, job: Object, pods: list[Object], state: StageState) -> None:
        """Stop a stalled training. Compile takes no steps, and is limited by its deadline."""
        limit = self.config.guards.stall_timeout_seconds
        if not limit or self.stage != "train":
            return
        progress = self.new_progress(state)
        seconds = self.stall.seconds(job, pods, progress, self.costs.clock())
        if seconds >= limit:
            why = describe_stall(seconds, progress)
            stacks = state.progress.with_name("stacks")
            self.stop(lambda: why, f"See the workers' stack traces in {stacks}, then upgrade to resume", state)

    def stop(self, why: Callable[[], str], fix: str, state: StageState) -> NoReturn:
        """Delete the job, wait until its workers have saved and its nodes are free, and raise StoppedByGuard.

        ``why`` is called again after the wait, because the cost increases meanwhile.
        """
        log.warning("%s: stopping: %s; waiting for the workers to save and exit", self.stage, why())
        self.costs.record_stop(self.job, f"{STOPPED}{why()}. {fix}")
        self.workload.stop(self.api, self.job)
        deadline = time.monotonic() + self.timings.pods_gone
        while (pods := [pod for pod in self.list_pods() if not is_over(pod)]) and time.monotonic() < deadline:
            time.sleep(self.timings.interval)
        self.costs.write()
        kept = describe_checkpoint(self.new_progress(state))
        reason = f"{STOPPED}{why()}{f'; {kept}' if kept else ''}. {fix}"
        if pods:
            names = " ".join(map(name_of, pods))
            reason += f". STILL RUNNING after {self.timings.pods_gone:.0f} s, and their nodes cost money: {names}. "
            reason += f"If their nodes are lost: kubectl -n {self.api.namespace} delete pod --force {names}"
        self.costs.record_stop(self.job, reason)
        raise StoppedByGuard(reason)

    # --- conditions that end the job

    def all_succeeded(self, pods: list[Object]) -> bool:
        """Whether every worker has succeeded. A PyTorchJob succeeds as soon as one worker has."""
        failed = [pod for pod in pods if phase_of(pod) == "Failed"]
        if failed:
            self.end(f"{name_of(failed[0])} failed although {self.title} succeeded", STAGE_FAILED)
        running = [name_of(pod) for pod in pods if not is_over(pod)]
        if not running:
            return True
        if self.lasts("running", self.timings.others_end):
            names, seconds = ", ".join(running), f"{self.timings.others_end:.0f} s"
            self.end(f"{names} still running {seconds} after another worker succeeded", STAGE_FAILED)
        return False

    def manifest_is_there(self, state: StageState) -> bool:
        now = self.read_state(self.stage)
        if now.up_to_date and now.fingerprint == state.fingerprint:
            return True
        if self.lasts("manifest", self.timings.manifest):
            problem = "the stage's manifest is missing or has another fingerprint"
            raise StageFailed(f"{self.title} succeeded, but {problem}")
        return False

    def end_if_retries_exhausted(self, job: Object, pods: list[Object]) -> None:
        """End the job when a worker has failed more often than backoffLimit allows.

        The operator would notice only after the kubelet's back-off, up to five minutes during which the nodes are held,
        and counts the restarts of all workers together.
        """
        limit = self.workload.retries(job)
        for pod in pods:
            if failures_of(pod) > limit:
                self.end(f"{name_of(pod)} has failed {failures_of(pod)} times (backoffLimit {limit})", STAGE_FAILED)

    def end_if_it_cannot_start(self, job: Object, pods: list[Object]) -> None:
        """End a job whose workers do not start: other workers may already hold nodes. Suspended time does not count."""
        limit = self.config.train.unschedulable_timeout_seconds
        if self.workload.is_suspended(job):
            self._since = {NO_WORKLOAD: since} if (since := self._since.get(NO_WORKLOAD)) else {}
            self.look_at_queue(job)
            return
        self._since.pop(NO_WORKLOAD, None)
        for pod in pods:
            if lack := unschedulable(pod):
                reason = f"{name_of(pod)}: {lack.get('message') or 'Unschedulable'}"
                self.log_change(f"lack {name_of(pod)}", f"unschedulable: {reason}")
                if time.time() - moment(lack.get("lastTransitionTime")) > limit:
                    self.end(f"unschedulable for more than {limit:.0f} s: {reason}")
        stuck = next(filter(None, map(why_not_started, pods)), "")
        if stuck:
            self.log_change("stuck", f"cannot start: {stuck}")
        if self.lasts("stuck", self.timings.cannot_start, stuck != ""):
            self.end(f"did not start within {self.timings.cannot_start:.0f} s: {stuck}")
        wanted = self.workload.workers(job)
        if self.lasts("missing", limit, len(pods) < wanted):
            self.end(f"only {len(pods)} of {wanted} worker pods after {limit:.0f} s: {self.why_no_pods(job)}")

    def look_at_queue(self, job: Object) -> None:
        """Log why Kueue does not start the job. End a job that Kueue does not manage."""
        if self.queue is None:
            return
        why = self.queue.why_waiting(job)
        if self.lasts(NO_WORKLOAD, self.timings.workload, why is None):
            self.end(self.queue.why_not_managed(self.timings.workload))
        if why is not None:
            self.log_change("queue", f"{self.job} waits in queue {labels_of(job).get(QUEUE_NAME)}: {why}")

    def end(self, reason: str, status: int = EXIT_USER_ERROR) -> NoReturn:
        """Delete the job and fail. The next gate waits for its pods, so this one does not."""
        self.workload.stop(self.api, self.job)
        raise StageFailed(reason, status=status)

    def lasts(self, what: str, seconds: float, holds: bool = True) -> bool:
        """Whether ``what`` has held at every look for longer than ``seconds``."""
        if not holds:
            self._since.pop(what, None)
            return False
        return time.monotonic() - self._since.setdefault(what, time.monotonic()) > seconds

    def why_no_pods(self, job: Object) -> str:
        """The job's latest warning event, e.g. a Pod Security or quota rejection."""
        events = self.api.list(kinds.EVENTS, fields=f"involvedObject.uid={job['metadata']['uid']}")
        return latest_warning(events) or f"no warning event; check the log of {self.workload.operator}"
