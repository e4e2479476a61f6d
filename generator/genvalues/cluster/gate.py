"""The gate of a stage that runs as a PyTorchJob: releases the job, or an earlier one, or none, and ends as it ends.

Helm waits for Jobs, not for PyTorchJobs. So the chart creates the PyTorchJob suspended, and this runs as a Job after
it:

 1. the stage's manifest is up to date: the suspended job is deleted; no Trainium node was ever asked for;
 2. a job with the same fingerprint still runs, of an earlier revision or another release: that one is followed, the new
    one deleted;
 3. else the new one is released and followed, when nothing else writes in the run's folder or holds its nodes any more.

Killed and started again at any point, it goes on: what was released is marked with the fingerprint it was released for.

While it follows, it counts what the run's nodes cost, in costs.json beside progress.json, and ends the job where that
or a standstill is beyond the guards (guards.py): its workers save, its nodes are free again, and the stage has failed.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NoReturn

from genvalues import files
from genvalues.errors import EXIT_USER_ERROR, UserError

from . import api as kinds
from .api import Api, ApiError, Object
from .config import ClusterConfig
from .guards import (
    Ledger,
    Limit,
    Standstill,
    describe_checkpoint,
    describe_standstill,
    is_worker,
    reserve_hours,
)
from .objects import (
    COST,
    FINGERPRINT,
    INSTANCE,
    JOB_NAME,
    OVERDUE,
    PROGRESS,
    QUEUE_NAME,
    RUN,
    annotations_of,
    backoff_limit_of,
    component_of,
    condition,
    created,
    failures_of,
    family_of,
    is_finished,
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
from .workers import Workers

STAGE_FAILED = 1


class StageFailed(Exception):
    """The stage's job ended badly. ``status`` is 2 when the user must change something."""

    def __init__(self, reason: str, *, status: int = STAGE_FAILED) -> None:
        self.reason = reason
        self.status = status
        self.pod = ""
        self.tail: list[str] = []
        super().__init__(reason)


class StoppedByGuard(StageFailed):
    """The gate itself has ended the job. Status 2: what tries again unasked would pay again, for the same."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason, status=EXIT_USER_ERROR)


@dataclass(frozen=True)
class StageState:
    """What ``llama-lora fingerprint STAGE`` says."""

    fingerprint: str | None  # None: a stage it reads from is not done
    up_to_date: bool
    progress: Path


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


Ask = Callable[[str], StageState]  # of a stage
Clock = Callable[[], float]  # seconds since 1970


@dataclass(frozen=True)
class Plan:
    follow: str = ""
    release: bool = False
    delete: list[str] = field(default_factory=list)  # never ran
    stop: list[str] = field(default_factory=list)  # ran or runs: its pods must be gone before anything else starts


def plan(jobs: list[Object], own: str, release: str, state: StageState) -> Plan:
    """What to do with the PyTorchJobs of this stage and run: this revision's (``own``), earlier ones, others'."""
    ours = [job for job in jobs if is_ours(job, release)]
    waiting = [name_of(job) for job in ours if FINGERPRINT not in annotations_of(job)]  # another's has its own gate
    released = [job for job in jobs if FINGERPRINT in annotations_of(job)]
    newest_first = sorted(released, key=lambda job: (name_of(job) == own, created(job)), reverse=True)
    same = [job for job in newest_first if annotations_of(job)[FINGERPRINT] == state.fingerprint]
    alive = [name_of(job) for job in same if is_alive(job)]
    # Two trainers on one run directory would overwrite each other's checkpoints.
    stop = names_to_stop([job for job in released if name_of(job) not in alive[:1]], release)
    if state.up_to_date:
        return Plan(delete=waiting, stop=stop)
    if alive:
        return Plan(follow=alive[0], delete=waiting, stop=stop)
    if own in waiting:
        over = [name_of(job) for job in released if is_finished(job) and is_ours(job, release)]
        return Plan(follow=own, release=True, delete=[name for name in waiting if name != own], stop=stop + over)
    ended = [name_of(job) for job in same if is_finished(job) and is_ours(job, release)]
    if ended:  # a gate that comes after the end reports it
        return Plan(follow=ended[0], delete=waiting, stop=stop)
    return Plan(stop=stop)


def in_the_way(jobs: list[Object], stage: str, release: str, ask: Ask) -> list[str]:
    """Jobs of the run's other stages that run for another configuration: they hold the nodes that ``stage`` needs.

    A stage whose fingerprint is not known yet has an upstream that has changed since its job was released, so that job
    is another configuration's too. Little is lost where that is wrong: it resumes from its checkpoints.
    """
    released = [job for job in jobs if FINGERPRINT in annotations_of(job) and not is_finished(job)]
    others = [job for job in released if component_of(job) != stage]
    current = {other: ask(other).fingerprint for other in sorted({component_of(job) for job in others})}
    outdated = [job for job in others if annotations_of(job)[FINGERPRINT] != current[component_of(job)]]
    return names_to_stop(outdated, release)


def names_to_stop(jobs: list[Object], release: str) -> list[str]:
    """Those that have not ended. One that is being deleted is here too: it is waited for."""
    for job in jobs:
        if is_alive(job) and not is_ours(job, release):
            owner = labels_of(job).get(INSTANCE)
            raise UserError(
                f"PyTorchJob {name_of(job)} of release {owner} works in this run's folder with another configuration",
                where="name",
                fix=f"Set another name: in this release's values, or first: helm uninstall {owner}",
            )
    return [name_of(job) for job in jobs if not is_finished(job)]


def is_ours(job: Object, release: str) -> bool:
    return family_of(labels_of(job).get(INSTANCE, "")) == family_of(release)


def is_alive(job: Object) -> bool:
    return not is_finished(job) and not is_being_deleted(job)


def is_being_deleted(job: Object) -> bool:
    return "deletionTimestamp" in job["metadata"]


def gate(
    api: Api,
    config: ClusterConfig,
    stage: str,
    own: str,
    ask: Ask,
    say: Callable[[str], None],
    pace: Pace = Pace(),
    clock: Clock = time.time,
) -> None:
    """Return when the stage is done; raise StageFailed or UserError when it is not."""
    state = ask(stage)
    if state.fingerprint is None:
        fix = "Run the pipeline from the start: helm upgrade; finished stages are skipped"
        raise UserError(f"stage {stage} cannot run: a stage it reads from is not done", fix=fix)
    jobs = api.list(kinds.PYTORCH_JOBS, labels=f"{RUN}={config.run}")  # of whatever release
    decided = plan([job for job in jobs if component_of(job) == stage], own, config.release, state)
    stop = decided.stop + (in_the_way(jobs, stage, config.release, ask) if decided.release else [])
    for name in stop:
        say(f"{stage}: making way: PyTorchJob {name}, which is over or runs for another configuration")
        # Foreground: the job stays, and makes no new pods, until the old ones have ended.
        api.delete(kinds.PYTORCH_JOBS, name, propagation="Foreground")
    for name in decided.delete:
        api.delete(kinds.PYTORCH_JOBS, name)
    account = None if state.up_to_date else Account(state.progress, config, say, pace.progress, clock)
    if stop or decided.release:
        wait_for_pods(api, config.run, stage, stop, decided.follow, pace, account)
    if state.up_to_date:
        say(f"{stage}: up to date, nothing to run")
        return
    assert account is not None
    if not decided.follow:
        if account.ledger.stopped_job == own:  # by a gate that was lost before it could say so
            raise StoppedByGuard(account.ledger.stopped_why)
        fix = f"Start it again: helm upgrade {config.release} CHART -n {config.namespace} --reuse-values"
        raise UserError(f"PyTorchJob {own} of stage {stage} is not there, and no earlier one runs", fix=fix)
    if decided.release:
        account.refuse_what_is_spent(next(job for job in jobs if name_of(job) == own))
    follower = Follower(api, config, stage, decided.follow, ask, say, pace, account)
    follower.start(state)  # before the release: nothing of what its pods say is missed
    if decided.release:
        release(api, own, state.fingerprint, config.job.queue_name)
    say(f"{stage}: {'released' if decided.release else 'following'} PyTorchJob {decided.follow}")
    follower.follow(state)
    say(f"{stage}: done")


def release(api: Api, name: str, fingerprint: str, queue: str) -> None:
    """Let the job run; with Kueue, let it queue, and Kueue let it run."""
    patch: Object = {"metadata": {"annotations": {FINGERPRINT: fingerprint}}}
    if queue:
        patch["metadata"]["labels"] = {QUEUE_NAME: queue}
    else:
        patch["spec"] = {"runPolicy": {"suspend": False}}
    api.patch(kinds.PYTORCH_JOBS, name, patch)


def wait_for_pods(
    api: Api, run: str, stage: str, stopped: list[str], follow: str, pace: Pace, account: Account | None
) -> None:
    """Until no pod of this stage and run works any more, but those of the job to follow, nor one of a stopped job.

    Of this stage whatever its job, because that may be gone already: a worker may take 120 s to save and end. What they
    hold until then is counted.
    """

    def look() -> list[Object]:
        pods = api.list(kinds.PODS, labels=f"{RUN}={run}")
        if account:
            account.see(pods)
        return pods

    def is_waited_for(pod: Object) -> bool:
        job = labels_of(pod).get(JOB_NAME, follow)
        return job != follow and not is_over(pod) and (job in stopped or component_of(pod) == stage)

    ends = time.monotonic() + pace.pods_gone
    while pods := [name_of(pod) for pod in look() if is_waited_for(pod)]:
        if time.monotonic() >= ends:
            names = " ".join(pods)
            fix = f"Look at their nodes; if those are lost: kubectl -n {api.namespace} delete pod --force {names}"
            raise UserError(f"pods of an earlier PyTorchJob still run after {pace.pods_gone:.0f} s: {names}", fix=fix)
        time.sleep(pace.interval)


class Account:
    """What the run's nodes have cost, kept on the volume: gates, jobs and releases come and go."""

    def __init__(
        self, progress: Path, config: ClusterConfig, say: Callable[[str], None], interval: float, clock: Clock
    ) -> None:
        self.file = progress.with_name("costs.json")
        self.limit = Limit(config.guards.max_cost, config.guards.price_per_node_hour)
        self.clock = clock
        self.ledger = self._read()
        self._say = say
        self._interval = interval
        self._written = (float("-inf"), self.ledger.pods.keys())
        self._cannot_write = False

    def see(self, pods: list[Object]) -> None:
        """Count the run's worker pods as they are now."""
        self.ledger = self.ledger.seen([pod for pod in pods if is_worker(pod)], self.clock())
        at, known = self._written
        if self.clock() - at >= self._interval or known != self.ledger.pods.keys():
            self.write()

    def note_stop(self, job: str, why: str) -> None:
        self.ledger = replace(self.ledger, stopped_job=job, stopped_why=why)
        self.write()

    def write(self) -> None:
        """A volume that takes no file is no reason to leave the job alone: the count goes on, for as long as we do."""
        self._written = (self.clock(), self.ledger.pods.keys())
        try:
            files.write_json(self.file, self.ledger.as_json())
        except OSError as error:
            if not self._cannot_write:
                self._say(f"{self.file} cannot be written: {error.strerror}; a gate that is started again counts anew")
            self._cannot_write = True

    def refuse_what_is_spent(self, job: Object) -> None:
        """Raise StoppedByGuard where the job would be ended as soon as it had nodes."""
        hours, reserve = self.ledger.node_hours, reserve_hours(job)
        if self.limit.is_reached(hours, reserve):
            also = f", and to end {name_of(job)} may take {self.limit.cost(reserve):,.2f}"
            raise StoppedByGuard(f"not started: {self.limit.describe(hours)}{also}. {RAISE}")
        if self.ledger.stopped_job:
            self.note_stop("", "")

    def _read(self) -> Ledger:
        try:
            return Ledger.from_json(json.loads(self.file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return Ledger()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            fix = "Put it right, or remove it: then what the run has cost so far is not counted"
            raise UserError("is not what a gate has written", where=str(self.file), fix=fix) from error


RAISE = "Raise guards.maxCost and upgrade to go on"


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


def read_progress(path: Path) -> dict[str, Any]:
    try:
        progress = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return progress if isinstance(progress, dict) else {}


def describe_progress(progress: dict[str, Any]) -> str:
    """``step 120 of 1,000, loss 1.234, 5,120 tokens/s, 1 h 02 min left``, as far as it is known."""
    parts = [f"step {progress.get('step')} of {progress.get('totalSteps')}"]
    if (loss := progress.get("loss")) is not None:
        parts.append(f"loss {loss:.4f}")
    if (rate := progress.get("learningRate")) is not None:
        parts.append(f"learning rate {rate:.3g}")
    if (speed := progress.get("tokensPerSecond")) is not None:
        parts.append(f"{speed:,.0f} tokens/s")
    if (left := progress.get("etaSeconds")) is not None:
        hours, minutes = divmod(round(left / 60), 60)
        parts.append(f"{hours} h {minutes:02d} min left" if hours else f"{minutes} min left")
    return ", ".join(parts)


class CannotAsk(Exception):
    """``llama-lora fingerprint`` broke down; worth another try."""


def ask_trainer(stage: str, run_config: Path) -> StageState:
    """Ask the trainer, through its command: the only thing that knows what the stage reads and whether it is done."""
    beside = Path(sys.executable).with_name("llama-lora")
    command = str(beside) if beside.exists() else shutil.which("llama-lora")
    if command is None:
        raise UserError("there is no llama-lora command here", fix="Use the image built from trainer/Dockerfile")
    asked = [command, "fingerprint", stage, "--config", str(run_config)]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    complaint = done.stderr.strip()
    if done.returncode == EXIT_USER_ERROR:
        raise UserError(complaint or f"{' '.join(asked)} ended with status 2")
    if done.returncode != 0:
        raise CannotAsk(f"{' '.join(asked)} ended with status {done.returncode}\n{complaint}")
    return read_state(stage, done.stdout)


def read_state(stage: str, text: str) -> StageState:
    try:
        answer = json.loads(text)
        fingerprint, up_to_date, progress = answer["fingerprint"], answer["upToDate"], answer["progress"]
    except (ValueError, KeyError, TypeError) as error:
        raise CannotAsk(f"llama-lora fingerprint {stage} did not answer as agreed: {text.strip()[:200]}") from error
    return StageState(fingerprint, up_to_date, Path(progress))


def describe_failure(stage: str, failure: StageFailed) -> str:
    """The last words of the gate's log: stage, reason, tail."""
    lines = [f"{stage} failed: {failure.reason}"]
    if failure.tail:
        lines += [f"last {len(failure.tail)} lines of {failure.pod}:", *(f"  {line}" for line in failure.tail)]
    return "\n".join(lines)
