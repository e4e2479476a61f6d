"""Follows one released PyTorchJob to its end, and ends it where it cannot or must not go on.

While it follows, it counts what the run's nodes cost (account.py), and ends the job where that or a standstill is
beyond the guards (guards.py): its workers save, its nodes are free again, and the stage has failed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, NoReturn

from genvalues.cluster import api as kinds
from genvalues.cluster.api import Api, ApiError, Object
from genvalues.cluster.config import ClusterConfig
from genvalues.cluster.cost_tracker import RAISE, Account
from genvalues.cluster.failures import STAGE_FAILED, StageFailed, StoppedByGuard
from genvalues.cluster.guards import Standstill, describe_checkpoint, describe_standstill, reserve_hours
from genvalues.cluster.objects import (
    COST,
    JOB_NAME,
    OVERDUE,
    PROGRESS,
    RUN,
    backoff_limit_of,
    condition,
    failures_of,
    is_over,
    is_suspended,
    labels_of,
    last_seen,
    moment,
    name_of,
    phase_of,
    seconds_overdue,
    unschedulable,
    why_not_started,
    workers_of,
)
from genvalues.cluster.progress import describe_progress, read_progress
from genvalues.cluster.trainer_client import Ask, StageState
from genvalues.cluster.workers import Workers
from genvalues.common.errors import EXIT_USER_ERROR


@dataclass(frozen=True)
class Pace:
    """How often the gate looks and how long it waits for others; tests make it short."""

    interval: float = 2.0
    progress: float = 30.0  # between two progress lines, two annotations, and two entries of what the run has cost
    cannot_start: float = 300.0  # an image that is not there may be a registry's bad minute
    others_end: float = 300.0  # workers after the first has succeeded; they end with a barrier
    manifest: float = 60.0  # NFS clients may not see a new file for as long
    last_words: float = 3.0  # until the logs of what has ended are read
    pods_gone: float = 600.0  # grace period 120 s, or the five minutes until a lost node is given up


PACE = Pace()


class Follower:
    """Follows one released PyTorchJob to its end."""

    def __init__(
        self,
        api: Api,
        config: ClusterConfig,
        stage: str,
        job: str,
        ask: Ask,
        say: Callable[[str], None],
        pace: Pace,
        account: Account,
    ) -> None:
        self.api = api
        self.config = config
        self.stage = stage
        self.job = job
        self.ask = ask
        self.say = say
        self.pace = pace
        self.account = account
        self.standstill = Standstill()
        self.workers = Workers(api, job, pace.interval)
        self._told: dict[str, str] = {}
        self._since: dict[str, float] = {}
        self._progress_at = float("-inf")
        self._published_at = float("-inf")
        self._cannot_publish = False
        self._stale = ""
        self.job_started = 0.0

    def start(self, state: StageState) -> None:
        self._told["progress"] = self._stale = read_progress(state.progress).get("updated", "")  # of an earlier run
        self.workers.start()

    def follow(self, state: StageState) -> None:
        """Return when the stage is done."""
        try:
            while not self.look(state):
                time.sleep(self.pace.interval)
            self.publish(state)
        except StageFailed as failure:
            time.sleep(min(self.pace.interval, 1.0))  # the watch may be a moment behind what the job says
            self.workers.close(self.pace.last_words)
            failure.pod, failure.tail = self.workers.tail()
            if isinstance(failure, StoppedByGuard):
                raise  # its workers have ended because they were told to
            if cause := self.workers.first_failure():
                failure.reason = f"{cause}; {failure.reason}" if str(cause) not in failure.reason else failure.reason
                failure.status = EXIT_USER_ERROR if cause.code == EXIT_USER_ERROR else failure.status
            raise
        finally:
            self.account.write()
        self.workers.close(0.0)

    def look(self, state: StageState) -> bool:
        """One look at the job and its pods: True when the stage is done, StageFailed when it has failed."""
        job = self.api.get(kinds.PYTORCH_JOBS, self.job)
        pods = self.look_at_pods()
        if job is None:
            fix = f"helm upgrade {self.config.release} starts it again"
            raise StageFailed(f"PyTorchJob {self.job} was deleted while it ran; {fix}", status=EXIT_USER_ERROR)
        self.job_started = moment(job.get("status", {}).get("startTime"))
        self.tell(job, pods, state)
        if time.monotonic() - self._published_at >= self.pace.progress:
            self.publish(state)
        if failed := condition(job, "Failed"):
            raise StageFailed(f"PyTorchJob {self.job}: {failed.get('message') or 'Failed'}")
        if any(end.code == EXIT_USER_ERROR for end in self.workers.ends):
            # A restart would end the same way, and Trainium nodes would wait for it.
            self.end("ended without a retry, because something must be changed first")
        if condition(job, "Succeeded"):
            return self.all_succeeded(pods) and self.manifest_is_there(state)
        self.give_up_what_fails_again(job, pods)
        self.give_up_what_cannot_start(job, pods)
        self.guard_cost(job, state)
        self.guard_standstill(job, pods, state)
        if (overdue := seconds_overdue(job)) > 0:
            # The operator looks at a job's deadline only when something has happened to the job: so something happens.
            self.api.patch(kinds.PYTORCH_JOBS, self.job, {"metadata": {"annotations": {OVERDUE: f"{overdue:.1f}"}}})
        return False

    def look_at_pods(self) -> list[Object]:
        """The job's pods as they are now; those of the run's other jobs are counted, too."""
        of_run = self.api.list(kinds.PODS, labels=f"{RUN}={self.config.run}")
        self.account.see(of_run)
        pods = [pod for pod in of_run if labels_of(pod).get(JOB_NAME) == self.job]
        for pod in pods:
            self.workers.observe(pod)
        return pods

    def publish(self, state: StageState) -> None:
        """Progress and cost, as annotations of the job: `genvalues status` sees no volume.

        They are for people: where the API takes none, that is said once, and the job is followed on.
        """
        self._published_at = time.monotonic()
        now = datetime.fromtimestamp(self.account.clock(), timezone.utc).isoformat(timespec="seconds")
        annotations = {COST: compact(self.account.limit.as_annotation(self.account.ledger.node_hours, now))}
        if progress := self.new_progress(state):
            annotations[PROGRESS] = compact(progress)
        try:
            self.api.patch(kinds.PYTORCH_JOBS, self.job, {"metadata": {"annotations": annotations}})
        except ApiError as error:
            if not self._cannot_publish:
                self.say(f"{self.stage}: progress and cost cannot be written to PyTorchJob {self.job}: {error.message}")
            self._cannot_publish = True
        else:
            self._cannot_publish = False

    def new_progress(self, state: StageState) -> dict[str, Any]:
        """What this job has last said of its progress; nothing where it has said none yet.

        What was there before we came is an earlier job's, unless it was written since this one began.
        """
        progress = read_progress(state.progress)
        updated = progress.get("updated", "")
        is_new = updated != self._stale or 0 < self.job_started <= moment(updated)
        return progress if is_new and progress.get("stage") == self.stage else {}

    def guard_cost(self, job: Object, state: StageState) -> None:
        account = self.account
        if account.limit.is_reached(account.ledger.node_hours, reserve_hours(job)):
            self.stop(lambda: account.limit.describe(account.ledger.node_hours), RAISE, state)

    def guard_standstill(self, job: Object, pods: list[Object], state: StageState) -> None:
        """Of train alone: compile takes no steps, and has its deadline."""
        limit = self.config.guards.stall_timeout_seconds
        if not limit or self.stage != "train":
            return
        progress = self.new_progress(state)
        seconds = self.standstill.seconds(job, pods, progress, self.account.clock())
        if seconds >= limit:
            why = describe_standstill(seconds, progress)
            stacks = state.progress.with_name("stacks")
            where = f"What each worker was doing is in {stacks}. Look there, then upgrade to go on"
            self.stop(lambda: why, where, state)

    def stop(self, why: Callable[[], str], then: str, state: StageState) -> NoReturn:
        """End the job, its workers saving; wait until its nodes are free; fail."""
        self.say(f"{self.stage}: stopping: {why()}; the workers save and end")
        self.account.note_stop(self.job, f"stopped: {why()}. {then}")
        # Foreground: the job stays, and makes no new pods, until the old ones have ended.
        self.api.delete(kinds.PYTORCH_JOBS, self.job, propagation="Foreground")
        ends = time.monotonic() + self.pace.pods_gone
        while (pods := [pod for pod in self.look_at_pods() if not is_over(pod)]) and time.monotonic() < ends:
            time.sleep(self.pace.interval)
        self.account.write()
        kept = describe_checkpoint(self.new_progress(state))
        reason = f"stopped: {why()}{f'; {kept}' if kept else ''}. {then}"
        if pods:
            names = " ".join(map(name_of, pods))
            reason += f". STILL RUNNING after {self.pace.pods_gone:.0f} s, on nodes that cost: {names}. If their nodes "
            reason += f"are lost: kubectl -n {self.api.namespace} delete pod --force {names}"
        self.account.note_stop(self.job, reason)
        raise StoppedByGuard(reason)

    def tell(self, job: Object, pods: list[Object], state: StageState) -> None:
        """Say what has changed since the last look."""
        conditions = [one["type"] for one in job.get("status", {}).get("conditions") or [] if one["status"] == "True"]
        if is_suspended(job) and "Suspended" not in conditions:
            conditions.append("Suspended")
        self.tell_change("job", f"{self.job}: {', '.join(conditions) or 'no condition yet'}")
        for pod in pods:
            where = pod["spec"].get("nodeName")
            self.tell_change(
                pod["metadata"]["uid"], f"{name_of(pod)}: {phase_of(pod)}{f' on {where}' if where else ''}"
            )
        if time.monotonic() - self._progress_at >= self.pace.progress:
            progress = read_progress(state.progress)
            updated = progress.get("updated", "")
            if progress.get("stage") == self.stage and updated != self._told["progress"]:
                self._told["progress"], self._progress_at = updated, time.monotonic()
                self.say(f"{self.stage}: {describe_progress(progress)}")

    def tell_change(self, about: str, text: str) -> None:
        if self._told.get(about) != text:
            self._told[about] = text
            self.say(f"{self.stage}: {text}")

    def all_succeeded(self, pods: list[Object]) -> bool:
        """With an elasticPolicy the job succeeds as soon as one worker has: the others are waited for."""
        failed = [pod for pod in pods if phase_of(pod) == "Failed"]
        if failed:
            self.end(f"{name_of(failed[0])} failed, though PyTorchJob {self.job} counts as succeeded", STAGE_FAILED)
        running = [name_of(pod) for pod in pods if not is_over(pod)]
        if not running:
            return True
        if self.lasts("running", self.pace.others_end):
            names = ", ".join(running)
            self.end(f"{names} still run {self.pace.others_end:.0f} s after another worker's success", STAGE_FAILED)
        return False

    def manifest_is_there(self, state: StageState) -> bool:
        now = self.ask(self.stage)
        if now.up_to_date and now.fingerprint == state.fingerprint:
            return True
        if self.lasts("manifest", self.pace.manifest):
            raise StageFailed(
                f"PyTorchJob {self.job} succeeded, but the stage's manifest is not there or is another one's"
            )
        return False

    def give_up_what_fails_again(self, job: Object, pods: list[Object]) -> None:
        """The operator adds up all workers' restarts, and sees a failure only when the kubelet has put its restart off
        and begun it: up to five minutes, in which Trainium nodes are held."""
        limit = backoff_limit_of(job)
        for pod in pods:
            if failures_of(pod) > limit:
                self.end(f"{name_of(pod)} has failed {failures_of(pod)} times (backoffLimit {limit})", STAGE_FAILED)

    def give_up_what_cannot_start(self, job: Object, pods: list[Object]) -> None:
        """Workers that cannot start while others already hold nodes cost money; time held suspended does not count."""
        limit = self.config.train.unschedulable_timeout_seconds
        if is_suspended(job):
            self._since.clear()
            return
        for pod in pods:
            if lack := unschedulable(pod):
                reason = f"{name_of(pod)}: {lack.get('message') or 'Unschedulable'}"
                self.tell_change(f"lack {name_of(pod)}", f"unschedulable: {reason}")
                if time.time() - moment(lack.get("lastTransitionTime")) > limit:
                    self.end(f"unschedulable for more than {limit:.0f} s: {reason}")
        stuck = next(filter(None, map(why_not_started, pods)), "")
        if stuck:
            self.tell_change("stuck", f"cannot start: {stuck}")
        if self.lasts("stuck", self.pace.cannot_start, stuck != ""):
            self.end(f"could not start for {self.pace.cannot_start:.0f} s: {stuck}")
        if self.lasts("missing", limit, len(pods) < workers_of(job)):
            self.end(f"only {len(pods)} of {workers_of(job)} worker pods after {limit:.0f} s: {self.why_no_pods(job)}")

    def end(self, reason: str, status: int = EXIT_USER_ERROR) -> NoReturn:
        """Delete the job and fail. The next gate waits for the pods to be gone, so this one need not."""
        self.api.delete(kinds.PYTORCH_JOBS, self.job, propagation="Foreground")
        raise StageFailed(reason, status=status)

    def lasts(self, what: str, seconds: float, holds: bool = True) -> bool:
        """Whether ``what`` has held at every look for longer than ``seconds``."""
        if not holds:
            self._since.pop(what, None)
            return False
        return time.monotonic() - self._since.setdefault(what, time.monotonic()) > seconds

    def why_no_pods(self, job: Object) -> str:
        """The operator's latest complaint, e.g. a Pod Security or quota refusal."""
        events = self.api.list(kinds.EVENTS, fields=f"involvedObject.uid={job['metadata']['uid']}")
        complaints = [event for event in events if event.get("type") == "Warning"]
        latest = max(complaints, key=last_seen, default=None)
        return f"{latest['reason']}: {latest.get('message', '')}" if latest else "the training operator made no more"


def compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
