"""The stages of a release with their states, decided from Helm's record and the API's objects. No I/O.

Helm's hooks say which stages there are, in which order, and whether one has started in this revision (a Job of an
earlier revision stays until its stage starts again). The stage's Job, its gate's Job and the PyTorchJob or TrainJob say
the rest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any, Literal

from genvalues.cluster.failures import STOPPED, parse_failure
from genvalues.cluster.kinds import Object
from genvalues.cluster.objects import (
    COST,
    GATE_SUFFIX,
    INSTANCE,
    PROGRESS,
    QUEUE_NAME,
    annotations_of,
    component_of,
    condition,
    container_statuses,
    created,
    ends_of,
    family_of,
    is_over,
    labels_of,
    latest_warning,
    moment,
    name_of,
    uid_of,
    unschedulable,
    why_not_started,
)
from genvalues.cluster.workloads import NAMES, is_released, is_running, is_suspended, job_of, workers_of, workload_of
from genvalues.common.manifests import SKIPPED
from genvalues.ops.records import HelmHook

State = Literal["waiting", "running", "done", "skipped", "failed", "stopped"]

NO_DEVICES = ("cpu", "memory", "ephemeral-storage", "hugepages-")


@dataclass(frozen=True)
class ReleaseObjects:
    """The API's objects of one release. ``logs``: by pod that has ended, the last lines of its log."""

    jobs: Sequence[Object] = ()
    workloads: Sequence[Object] = ()  # PyTorchJobs and TrainJobs
    pods: Sequence[Object] = ()
    events: Sequence[Object] = ()
    logs: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def pods_of(self, owner: Object | None) -> list[Object]:
        """The pods that belong to the Job, oldest first; not those of an earlier revision's Job of the same name."""
        if owner is None:
            return []
        uid = uid_of(owner)
        owned = [
            pod for pod in self.pods if uid in (one.get("uid") for one in pod["metadata"].get("ownerReferences") or [])
        ]
        return sorted(owned, key=created)

    def job(self, name: str) -> Object | None:
        return find(self.jobs, name)


@dataclass(frozen=True)
class StageStatus:
    """The state of one stage. Costs in dollars."""

    name: str
    state: State
    started: datetime | None = None
    ended: datetime | None = None
    progress: dict[str, Any] | None = None  # stage, step, totalSteps, loss, learningRate, tokensPerSecond, etaSeconds
    cost: dict[str, Any] | None = None  # cost, nodeHours, pricePerNodeHour, maxCost, updated
    note: str = ""  # what a running stage waits for
    reason: str = ""  # why it failed or was stopped
    exit_status: int | None = None  # of the container whose end ended the stage
    tail_of: str = ""  # a pod
    tail: tuple[str, ...] = ()  # the last lines of its log
    nodes: tuple[str, ...] = ()  # on which its pods run
    devices: dict[str, int] = field(default_factory=dict)  # of all its pods together
    pods: tuple[str, ...] = ()  # including those that have ended
    restarts: int = 0  # of its pods' containers

    @property
    def is_over(self) -> bool:
        return self.state in ("done", "skipped", "failed", "stopped")


def stages_of(hooks: Sequence[HelmHook], objects: ReleaseObjects) -> tuple[StageStatus, ...]:
    """Every stage of the release, in the order in which Helm runs them."""
    return tuple(stage_status(name, of_stage, objects) for name, of_stage in hooks_by_stage(hooks).items())


def hooks_by_stage(hooks: Sequence[HelmHook]) -> dict[str, list[HelmHook]]:
    """By stage, in order: the hook of its Job, or those of its PyTorchJob or TrainJob and of its gate."""
    found: dict[str, list[HelmHook]] = {}
    for hook in sorted(hooks, key=lambda hook: (hook.weight, hook.name)):
        if hook.stage:
            found.setdefault(hook.stage.removesuffix(GATE_SUFFIX), []).append(hook)
    return found


def stage_status(name: str, hooks: Sequence[HelmHook], objects: ReleaseObjects) -> StageStatus:
    job = next(hook for hook in hooks if hook.kind == "Job")
    gated = next((hook for hook in hooks if hook.kind in NAMES), None)
    status = job_status(name, job, objects)
    if gated is not None:
        return gated_job_status(name, status, gated, objects)
    return status if status.state == "waiting" else with_pods(status, objects.pods_of(objects.job(job.name)))


# --- a Job: a stage's own, or its gate's


def job_status(stage: str, hook: HelmHook, objects: ReleaseObjects) -> StageStatus:
    """The status of a stage according to the Job of this hook."""
    if not hook.has_started:
        return StageStatus(stage, "waiting")
    job = objects.job(hook.name)
    if job is None:
        if hook.phase == "Failed":
            return StageStatus(stage, "failed", reason=f"job {hook.name} not found")
        return StageStatus(stage, "done" if hook.phase == "Succeeded" else "running")
    status = StageStatus(stage, "running", time_of(moment(job.get("status", {}).get("startTime")) or created(job)))
    if condition(job, "Complete"):
        lines = (line for pod in objects.pods_of(job) for line in objects.logs.get(name_of(pod), ()))
        state: State = "skipped" if any(SKIPPED in line for line in lines) else "done"
        return replace(status, state=state, ended=time_of(moment(job["status"].get("completionTime"))))
    if failed := condition(job, "Failed"):
        status = replace(status, ended=time_of(moment(failed.get("lastTransitionTime"))))
        return failed_job_status(status, job, failed, objects)
    if job["spec"].get("suspend"):
        return replace(status, note=f"job {hook.name} is suspended")
    return status


def failed_job_status(status: StageStatus, job: Object, failed: Object, objects: ReleaseObjects) -> StageStatus:
    """``failed``: the Job's condition of that type."""
    limit = job["spec"].get("activeDeadlineSeconds")
    is_overdue = failed.get("reason") == "DeadlineExceeded"
    if is_overdue and limit == 1:  # how cleanup and recovery stop a Job
        return replace(status, state="stopped", reason="stopped by a cleanup, or by an install that takes over")
    end = next((end for pod in reversed(objects.pods_of(job)) for end in reversed(ends_of(pod)) if end.code), None)
    lines = tuple(objects.logs.get(end.pod, ())) if end else ()
    if component_of(job).endswith(GATE_SUFFIX):
        reason, tail_of, tail = parse_failure(status.name, lines)
    else:
        reason, tail_of, tail = "", end.pod if end else "", lines
    if not reason and is_overdue:
        reason = f"did not end within {limit} s (activeDeadlineSeconds)"
    elif not reason:
        reason = str(end) if end else f"{failed.get('reason', 'Failed')}: {failed.get('message', '')}".rstrip(": ")
    return replace(
        status,
        state="stopped" if reason.startswith(STOPPED) else "failed",  # a guard stopped it: not the stage's failure
        reason=reason.removeprefix(STOPPED),
        exit_status=end.code if end else None,
        tail_of=tail_of,
        tail=tail,
    )


# --- a PyTorchJob or TrainJob and its gate


def gated_job_status(stage: str, gate: StageStatus, hook: HelmHook, objects: ReleaseObjects) -> StageStatus:
    """The gate ends as the stage does. While it runs, or if it does not exist, its job says more."""
    job = gated_job_of(stage, hook, objects)
    if job is None:
        is_between_hooks = gate.state == "waiting" and hook.has_started
        return replace(gate, state="running") if is_between_hooks else gate
    status = gate
    if is_running(job) and gate.state in ("waiting", "failed", "stopped") and not is_suspended(job):
        note = f"{workload_of(job).name} {name_of(job)} runs without a gate; the next install follows it"
        status = StageStatus(stage, "running", time_of(workload_of(job).started(job) or created(job)), note=note)
    if status.state in ("waiting", "skipped"):
        return status
    workers = [pod for pod in objects.pods if job_of(pod) == name_of(job)]
    status = replace(status, progress=annotated(job, PROGRESS, stage), cost=annotated(job, COST))
    status = with_pods(status, workers)
    if status.state == "running" and not status.note:
        status = replace(status, note=why_no_workers(job, workers, objects))
    return status


def gated_job_of(stage: str, hook: HelmHook, objects: ReleaseObjects) -> Object | None:
    """The stage's PyTorchJob or TrainJob: the one that runs, of any revision; else this revision's; else none."""
    release = labels_of(hook.manifest).get(INSTANCE, "")
    jobs = [
        job
        for job in objects.workloads
        if component_of(job) == stage and family_of(labels_of(job).get(INSTANCE, "")) == family_of(release)
    ]
    newest = max(filter(is_running, jobs), key=created, default=None)
    if newest is not None or not hook.has_started:
        return newest
    return find(jobs, hook.name) or max(filter(is_released, jobs), key=created, default=None)


def why_no_workers(job: Object, workers: Sequence[Object], objects: ReleaseObjects) -> str:
    """What a job with too few workers waits for; empty if it has all."""
    if is_suspended(job):
        if not is_released(job):
            return "the gate has not released it yet"
        queue = labels_of(job).get(QUEUE_NAME)
        return f"waits in queue {queue}" if queue else "suspended"
    if len(workers) < workers_of(job):
        uid = uid_of(job)
        warning = latest_warning(one for one in objects.events if (one.get("involvedObject") or {}).get("uid") == uid)
        return f"{len(workers)} of {workers_of(job)} worker pods{f': {warning}' if warning else ''}"
    return ""


def annotated(job: Object, annotation: str, stage: str = "") -> dict[str, Any] | None:
    """The JSON of an annotation; None if it is not a JSON object, or another stage's."""
    try:
        found = json.loads(annotations_of(job).get(annotation, ""))
    except ValueError:
        return None
    if not isinstance(found, dict) or (stage and found.get("stage", stage) != stage):
        return None
    return found


# --- pods, events, times


def with_pods(status: StageStatus, pods: Sequence[Object]) -> StageStatus:
    """Add what the stage's pods say."""
    running = [pod for pod in pods if not is_over(pod)]
    note = status.note
    if status.state == "running" and not note:
        note = next(filter(None, map(why_pending, running)), "")
    return replace(
        status,
        note=note,
        pods=tuple(name_of(pod) for pod in pods),
        nodes=nodes_of(running),
        devices=devices_of(running),
        restarts=sum(one.get("restartCount", 0) for pod in pods for one in container_statuses(pod)),
    )


def why_pending(pod: Object) -> str:
    """Why a pod does not start, in the scheduler's or the kubelet's words; empty if it does."""
    if lack := unschedulable(pod):
        return f"{name_of(pod)} cannot be scheduled: {lack.get('message') or 'Unschedulable'}"
    return why_not_started(pod)


def nodes_of(pods: Sequence[Object]) -> tuple[str, ...]:
    return tuple(sorted({pod["spec"]["nodeName"] for pod in pods if pod["spec"].get("nodeName")}))


def devices_of(pods: Sequence[Object]) -> dict[str, int]:
    """The devices that scheduled pods hold, by resource name."""
    held: dict[str, int] = {}
    for pod in pods:
        for container in pod["spec"].get("containers") or [] if pod["spec"].get("nodeName") else []:
            for resource, amount in (container.get("resources", {}).get("limits") or {}).items():
                if not resource.startswith(NO_DEVICES):
                    held[resource] = held.get(resource, 0) + int(amount)
    return held


def find(items: Sequence[Object], name: str) -> Object | None:
    return next((item for item in items if name_of(item) == name), None)


def time_of(seconds: float) -> datetime | None:
    """The time of so many seconds since 1970; None for 0."""
    return datetime.fromtimestamp(seconds, timezone.utc) if seconds else None
