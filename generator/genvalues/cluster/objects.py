"""Reading Kubernetes objects: what a Job, a PyTorchJob or a pod says about itself."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from genvalues.cluster.api import Object

STAGE = "llama-lora/stage"  # annotation on every stage object
FINGERPRINT = "llama-lora/fingerprint"  # annotation on a PyTorchJob that a gate has released
INSTANCE = "app.kubernetes.io/instance"
COMPONENT = "app.kubernetes.io/component"
RUN = "llama-lora/run"  # label on every stage object and pod: the same for all that work in one run's folder
JOB_NAME = "training.kubeflow.org/job-name"  # the operator's label on a PyTorchJob's pods
QUEUE_NAME = "kueue.x-k8s.io/queue-name"
OVERDUE = "llama-lora/seconds-overdue"  # annotation on a PyTorchJob that its operator shall look at
PROGRESS, COST = "llama-lora/progress", "llama-lora/cost"  # the same, for `genvalues status`: compact JSON

# Waiting reasons that end by themselves only if somebody changes something (or a registry comes back).
CANNOT_START = {
    "CreateContainerConfigError",
    "CreateContainerError",
    "ErrImageNeverPull",
    "ErrImagePull",
    "ImageInspectError",
    "ImagePullBackOff",
    "InvalidImageName",
    "RunContainerError",
}


@dataclass(frozen=True)
class End:
    """How one run of a container ended."""

    pod: str
    code: int
    reason: str
    finished: str

    def __str__(self) -> str:
        why = f" ({self.reason})" if self.reason not in {"", "Error", "Completed"} else ""
        return f"{self.pod} ended with status {self.code}{why}"


def family_of(release: str) -> str:
    """A detached release and the one that its runner installs belong together; so does an attached one of that name."""
    return release.removesuffix("-run")


def name_of(item: Object) -> str:
    return str(item["metadata"]["name"])


def labels_of(item: Object) -> dict[str, str]:
    return item["metadata"].get("labels") or {}


def annotations_of(item: Object) -> dict[str, str]:
    return item["metadata"].get("annotations") or {}


def owners_of(item: Object) -> list[str]:
    return [owner["name"] for owner in item["metadata"].get("ownerReferences") or []]


def component_of(item: Object) -> str:
    return annotations_of(item).get(STAGE) or labels_of(item).get(COMPONENT, "")


def condition(item: Object, kind: str) -> Object | None:
    """The condition of that type when it is True. Jobs, PyTorchJobs and nodes keep theirs in the same form."""
    conditions = item.get("status", {}).get("conditions") or []
    return next((one for one in conditions if one["type"] == kind and one["status"] == "True"), None)


def is_finished(job: Object) -> bool:
    """A Job or a PyTorchJob that will not run again."""
    return any(condition(job, kind) for kind in ("Complete", "Succeeded", "Failed"))


def is_suspended(pytorch_job: Object) -> bool:
    return bool(pytorch_job["spec"].get("runPolicy", {}).get("suspend"))


def workers_of(pytorch_job: Object) -> int:
    return int(pytorch_job["spec"]["pytorchReplicaSpecs"]["Worker"].get("replicas", 1))


def backoff_limit_of(pytorch_job: Object) -> int:
    """How often each worker is tried again. The chart leaves room for that of all workers, and one restart more."""
    return max(0, (pytorch_job["spec"]["runPolicy"].get("backoffLimit", 1) - 1) // workers_of(pytorch_job))


def seconds_overdue(pytorch_job: Object) -> float:
    """How long the job has been active beyond its activeDeadlineSeconds; time held suspended does not count."""
    limit = pytorch_job["spec"]["runPolicy"].get("activeDeadlineSeconds")
    since = pytorch_job.get("status", {}).get("startTime")
    if limit is None or not since or is_suspended(pytorch_job):
        return 0.0
    return time.time() - moment(since) - float(limit)


def phase_of(pod: Object) -> str:
    return str(pod.get("status", {}).get("phase", "Pending"))


def is_over(pod: Object) -> bool:
    """Its containers have ended for good."""
    return phase_of(pod) in {"Succeeded", "Failed"}


def container_statuses(pod: Object) -> list[Object]:
    return pod.get("status", {}).get("containerStatuses") or []


def ends_of(pod: Object) -> list[End]:
    """The ends of its containers that the pod still knows: the last one, and the one before a restart."""
    ends = []
    for status in container_statuses(pod):
        for moment in ("lastState", "state"):
            if over := (status.get(moment) or {}).get("terminated"):
                ends.append(End(name_of(pod), over["exitCode"], over.get("reason", ""), over.get("finishedAt") or ""))
    return ends


def failures_of(pod: Object) -> int:
    """How often a container of the pod has ended by itself, and not well."""
    if is_over(pod) or "deletionTimestamp" in pod["metadata"]:  # evicted, or told to stop: a new pod takes its place
        return 0
    return sum(status.get("restartCount", 0) + has_just_failed(status) for status in container_statuses(pod))


def has_just_failed(status: Object) -> bool:
    """The restart, which the kubelet puts off longer each time, is not counted yet."""
    state, before = status.get("state") or {}, status.get("lastState") or {}
    ended = state.get("terminated") or ("waiting" in state and before.get("terminated"))
    return bool(ended and ended["exitCode"] != 0)


def started_container(pod: Object) -> str:
    """The name of the container that has something in its log, or nothing."""
    for status in container_statuses(pod):
        if any((status.get(moment) or {}).get(kind) for moment in ("state", "lastState") for kind in RAN):
            return str(status["name"])
    return ""


RAN = ("running", "terminated")


def why_not_started(pod: Object) -> str:
    """Why a container of the pod cannot start, in the kubelet's words, or nothing."""
    for status in container_statuses(pod):
        waiting = (status.get("state") or {}).get("waiting") or {}
        if waiting.get("reason") in CANNOT_START:
            return f"{name_of(pod)}: {waiting['reason']}: {waiting.get('message', '')}".rstrip(": ")
    return ""


def unschedulable(pod: Object) -> Object | None:
    """The scheduler's condition on a pod that fits nowhere. (SchedulingGated is somebody's wish, not a lack.)"""
    for one in pod.get("status", {}).get("conditions") or []:
        if one["type"] == "PodScheduled" and one["status"] == "False" and one.get("reason") == "Unschedulable":
            return dict(one)
    return None


def moment(text: str | None) -> float:
    """Seconds since 1970 of an API time like 2025-01-31T12:00:00Z (or with microseconds); 0 for none."""
    if not text:
        return 0.0
    return datetime.fromisoformat(text.replace("Z", "+00:00")).astimezone(timezone.utc).timestamp()


def created(item: Object) -> float:
    return moment(item["metadata"].get("creationTimestamp"))


def last_seen(event: Object) -> float:
    series: dict[str, Any] = event.get("series") or {}
    times = (series.get("lastObservedTime"), event.get("lastTimestamp"), event.get("eventTime"))
    return max(map(moment, times)) or moment(event["metadata"].get("creationTimestamp"))
