"""The stages of a release, each with its state, from what Helm and the API know. Pure: objects in, statuses out.

Which stages there are, and in which order, say the release's hooks; that one has begun in this revision says Helm's
record of them (a Job of an earlier revision is there until its stage begins again); how it does say its Job, its gate's
Job and its PyTorchJob.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from genvalues.cluster.failures import STOPPED, parse_failure
from genvalues.cluster.objects import (
    COST,
    GATE_SUFFIX,
    INSTANCE,
    JOB_NAME,
    PROGRESS,
    QUEUE_NAME,
    annotations_of,
    component_of,
    condition,
    container_statuses,
    created,
    ends_of,
    family_of,
    is_active,
    is_over,
    is_released,
    is_suspended,
    labels_of,
    last_seen,
    moment,
    name_of,
    unschedulable,
    why_not_started,
    workers_of,
)
from genvalues.common.manifests import SKIPPED
from genvalues.ops.records import Hook

Object = dict[str, Any]
State = Literal["waiting", "running", "done", "skipped", "failed", "stopped"]

NO_DEVICES = ("cpu", "memory", "ephemeral-storage", "hugepages-")


@dataclass(frozen=True)
class ReleaseObjects:
    """What there is of one release. ``logs``: by pod, the last lines of those that have ended."""

    hooks: Sequence[Hook]
    jobs: Sequence[Object] = ()
    pytorch_jobs: Sequence[Object] = ()
    pods: Sequence[Object] = ()
    events: Sequence[Object] = ()
    logs: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class StageStatus:
    """One stage. Times in seconds since 1970, None for not (yet); costs in dollars."""

    name: str
    state: State
    started: float | None = None
    ended: float | None = None
    progress: dict[str, Any] | None = None  # stage, step, totalSteps, loss, learningRate, tokensPerSecond, etaSeconds
    cost: dict[str, Any] | None = None  # cost, nodeHours, pricePerNodeHour, maxCost, updated
    note: str = ""  # what a running one waits for
    reason: str = ""  # why it failed or was stopped
    exit_status: int | None = None  # of the container whose end was the stage's
    tail_of: str = ""  # a pod
    tail: tuple[str, ...] = ()  # the last lines of its log
    nodes: tuple[str, ...] = ()  # on which its pods run
    devices: dict[str, int] = field(default_factory=dict)  # that its pods hold, all together
    pods: tuple[str, ...] = ()  # that there are, ended ones too
    restarts: int = 0  # of its pods' containers

    @property
    def is_over(self) -> bool:
        return self.state in ("done", "skipped", "failed", "stopped")


def stages_of(seen: ReleaseObjects) -> list[StageStatus]:
    """Every stage of the release, in the order in which Helm runs them."""
    return [stage_of(name, hooks, seen) for name, hooks in stage_hooks(seen.hooks).items()]


def stage_hooks(hooks: Sequence[Hook]) -> dict[str, list[Hook]]:
    """By stage, in order: its Job's hook, or that of its PyTorchJob and its gate's."""
    found: dict[str, list[Hook]] = {}
    stages = [hook for hook in hooks if hook.stage and {"post-install", "post-upgrade"} & set(hook.events)]
    for hook in sorted(stages, key=lambda hook: (hook.weight, hook.name)):
        if hook.kind in ("Job", "PyTorchJob"):
            found.setdefault(hook.stage.removesuffix(GATE_SUFFIX), []).append(hook)
    return found


def stage_of(name: str, hooks: Sequence[Hook], seen: ReleaseObjects) -> StageStatus:
    job = next(hook for hook in hooks if hook.kind == "Job")
    pytorch = next((hook for hook in hooks if hook.kind == "PyTorchJob"), None)
    status = of_job(name, job, seen)
    if pytorch is not None:
        return of_pytorch_job(name, status, pytorch, seen)
    return with_pods(status, pods_of(job.name, seen) if status.state != "waiting" else [])


# --- a Job: a stage's own, or a gate's


def of_job(stage: str, hook: Hook, seen: ReleaseObjects) -> StageStatus:
    """What the Job of this hook says of its stage."""
    if not hook.begun:
        return StageStatus(stage, "waiting")
    job = find(seen.jobs, hook.name)
    if job is None:
        ended: dict[str, State] = {"Succeeded": "done", "Failed": "failed"}
        status = StageStatus(stage, ended.get(hook.phase, "running"))
        return replace(status, reason=f"job {hook.name} is gone") if status.state == "failed" else status
    started = moment(job.get("status", {}).get("startTime")) or created(job)
    status = StageStatus(stage, "running", started)
    if condition(job, "Complete"):
        ended_at = moment(job["status"].get("completionTime")) or None
        state: State = "skipped" if had_nothing_to_do(hook.name, seen) else "done"
        return replace(status, state=state, ended=ended_at)
    if failed := condition(job, "Failed"):
        return of_failed_job(replace(status, ended=moment(failed.get("lastTransitionTime")) or None), job, seen)
    if job["spec"].get("suspend"):
        return replace(status, note=f"job {hook.name} is suspended")
    return status


def of_failed_job(status: StageStatus, job: Object, seen: ReleaseObjects) -> StageStatus:
    failed = condition(job, "Failed") or {}
    limit = job["spec"].get("activeDeadlineSeconds")
    if failed.get("reason") == "DeadlineExceeded" and limit == 1:  # how cleanup and recovery stop a Job
        return replace(status, state="stopped", reason="stopped by a cleanup, or to be taken over")
    pods = pods_of(name_of(job), seen)
    end = next((end for pod in reversed(pods) for end in reversed(ends_of(pod)) if end.code), None)
    lines = tuple(seen.logs.get(end.pod, ())) if end else ()
    if component_of(job).endswith(GATE_SUFFIX):
        reason, tail_of, tail = parse_failure(status.name, lines)
    else:
        reason, tail_of, tail = "", end.pod if end else "", lines
    if not reason:
        reason = str(end) if end else f"{failed.get('reason', 'Failed')}: {failed.get('message', '')}".rstrip(": ")
        if failed.get("reason") == "DeadlineExceeded":
            reason = f"did not end within its {limit} s (activeDeadlineSeconds)"
    # A guard's end (guards.maxCost, guards.stallTimeout) is no failure of the stage's own.
    state: State = "stopped" if reason.startswith(STOPPED) else "failed"
    reason = reason.removeprefix(STOPPED)
    return replace(
        status, state=state, reason=reason, exit_status=end.code if end else None, tail_of=tail_of, tail=tail
    )


def had_nothing_to_do(job: str, seen: ReleaseObjects) -> bool:
    lines = (line for pod in pods_of(job, seen) for line in seen.logs.get(name_of(pod), ()))
    return any(SKIPPED in line for line in lines)


def pods_of(job: str, seen: ReleaseObjects) -> list[Object]:
    """The pods of the Job of that name, oldest first; not those that one of an earlier revision has left."""
    owner = find(seen.jobs, job)
    if owner is None:
        return []
    uid = owner["metadata"]["uid"]
    owned = [pod for pod in seen.pods if any(one["uid"] == uid for one in pod["metadata"].get("ownerReferences") or [])]
    return sorted(owned, key=created)


# --- a PyTorchJob with its gate


def of_pytorch_job(name: str, gate: StageStatus, hook: Hook, seen: ReleaseObjects) -> StageStatus:
    """The gate ends as the stage does; while it works, or where it is gone, the PyTorchJob is looked at."""
    job = followed(name, hook, seen)
    if job is None:
        if gate.state == "waiting" and hook.begun:
            gate = replace(gate, state="running")  # between the two hooks
        return gate
    runs = is_released(job) and is_active(job)
    workers = [pod for pod in seen.pods if labels_of(pod).get(JOB_NAME) == name_of(job)]
    status = gate
    if runs and gate.state in ("waiting", "failed", "stopped") and not is_suspended(job):
        note = f"PyTorchJob {name_of(job)} runs without a gate; the next install follows it"
        status = StageStatus(name, "running", moment(job.get("status", {}).get("startTime")) or created(job), note=note)
    if status.state in ("waiting", "skipped"):
        return status
    status = replace(status, progress=annotated(job, PROGRESS, name), cost=annotated(job, COST))
    status = with_pods(status, workers)
    if status.state == "running" and not status.note:
        status = replace(status, note=why_no_workers(job, workers, seen))
    return status


def followed(stage: str, hook: Hook, seen: ReleaseObjects) -> Object | None:
    """The stage's PyTorchJob: one that was released and runs, of whatever revision, else this revision's, else none."""
    release = labels_of(hook.manifest).get(INSTANCE, "")
    jobs = [
        job
        for job in seen.pytorch_jobs
        if component_of(job) == stage and family_of(labels_of(job).get(INSTANCE, "")) == family_of(release)
    ]
    alive = [job for job in jobs if is_released(job) and is_active(job)]
    newest = max(alive, key=created, default=None)
    if newest is not None or not hook.begun:
        return newest
    released = [job for job in jobs if is_released(job)]
    return find(jobs, hook.name) or max(released, key=created, default=None)


def why_no_workers(job: Object, workers: Sequence[Object], seen: ReleaseObjects) -> str:
    """What a job with too few workers waits for, or nothing."""
    if is_suspended(job):
        if not is_released(job):
            return "the gate has not released it yet"
        queue = labels_of(job).get(QUEUE_NAME)
        return f"waits in queue {queue}" if queue else "suspended"
    if len(workers) < workers_of(job):
        complaint = latest_warning(job, seen)
        return f"{len(workers)} of {workers_of(job)} worker pods{f': {complaint}' if complaint else ''}"
    return ""


def annotated(job: Object, annotation: str, stage: str = "") -> dict[str, Any] | None:
    """An annotation's JSON, unless it is another stage's or none at all."""
    try:
        found = json.loads(annotations_of(job).get(annotation, ""))
    except ValueError:
        return None
    if not isinstance(found, dict) or (stage and found.get("stage", stage) != stage):
        return None
    return found


# --- pods


def with_pods(status: StageStatus, pods: Sequence[Object]) -> StageStatus:
    living = [pod for pod in pods if not is_over(pod)]
    note = status.note
    if status.state == "running" and not note:
        note = next(filter(None, map(waits_for, living)), "")
    return replace(
        status,
        note=note,
        pods=tuple(name_of(pod) for pod in pods),
        nodes=tuple(sorted({pod["spec"]["nodeName"] for pod in living if pod["spec"].get("nodeName")})),
        devices=devices_of(living),
        restarts=sum(one.get("restartCount", 0) for pod in pods for one in container_statuses(pod)),
    )


def waits_for(pod: Object) -> str:
    """Why a pod does not start, in the scheduler's or the kubelet's words."""
    if lack := unschedulable(pod):
        return f"{name_of(pod)} fits on no node: {lack.get('message') or 'Unschedulable'}"
    return why_not_started(pod)


def devices_of(pods: Sequence[Object]) -> dict[str, int]:
    """What pods that have a node hold of it, besides processors and memory."""
    held: dict[str, int] = {}
    for pod in pods:
        for container in pod["spec"].get("containers") or [] if pod["spec"].get("nodeName") else []:
            for resource, amount in (container.get("resources", {}).get("limits") or {}).items():
                if not resource.startswith(NO_DEVICES):
                    held[resource] = held.get(resource, 0) + int(amount)
    return held


def latest_warning(item: Object, seen: ReleaseObjects) -> str:
    uid = item["metadata"].get("uid")
    about = [
        event
        for event in seen.events
        if event.get("type") == "Warning" and (event.get("involvedObject") or {}).get("uid") == uid
    ]
    latest = max(about, key=last_seen, default=None)
    return f"{latest['reason']}: {latest.get('message', '')}" if latest else ""


def find(items: Sequence[Object], name: str) -> Object | None:
    return next((item for item in items if name_of(item) == name), None)
