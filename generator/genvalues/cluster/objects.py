"""Reading Kubernetes objects: labels, conditions, states and times of Jobs, pods and events.

Objects are plain dicts, as the API returns them. Functions are pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from genvalues.cluster.kinds import Object

STAGE = "llama-lora/stage"  # annotation of every stage's objects
FINGERPRINT = "llama-lora/fingerprint"  # annotation that a gate sets on the job it releases
INSTANCE = "app.kubernetes.io/instance"
COMPONENT = "app.kubernetes.io/component"
RUN = "llama-lora/run"  # label of every stage's objects and pods: equal for all that use the same run folder
QUEUE_NAME = "kueue.x-k8s.io/queue-name"
INDEX = "batch.kubernetes.io/job-completion-index"  # annotation of the pods of an Indexed Job
PROGRESS, COST = "llama-lora/progress", "llama-lora/cost"  # annotations of a job for `genvalues status`, compact JSON
STOPPED_BY_US = 1  # activeDeadlineSeconds by which cleanup and recovery stop a Job
RUNNER = "runner"  # component of the Job that installs the inner release in mode detached
GATE_SUFFIX = "-gate"  # component of a stage's gate: STAGE-gate
INNER_SUFFIX = "-run"  # the release that the runner installs: RELEASE-run

# Waiting reasons that last until someone fixes the pod or, for an image, until the registry is available again.
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
class ContainerExit:
    """How one run of a container ended."""

    pod: str
    code: int
    reason: str
    finished: str

    def __str__(self) -> str:
        reason = f" ({self.reason})" if self.reason not in {"", "Error", "Completed"} else ""
        return f"{self.pod} ended with status {self.code}{reason}"


def inner_release_of(release: str) -> str:
    """The release that the runner of a detached release installs."""
    return release + INNER_SUFFIX


def family_of(release: str) -> str:
    """The outer release's name: a detached release, its inner release and an attached one of that name are related."""
    return release.removesuffix(INNER_SUFFIX)


def name_of(item: Object) -> str:
    return str(item["metadata"]["name"])


def uid_of(item: Object) -> str:
    """The uid; the name if what answers gives none."""
    return str(item["metadata"].get("uid") or name_of(item))


def labels_of(item: Object) -> dict[str, str]:
    return item["metadata"].get("labels") or {}


def annotations_of(item: Object) -> dict[str, str]:
    return item["metadata"].get("annotations") or {}


def owners_of(item: Object) -> list[str]:
    return [owner["name"] for owner in item["metadata"].get("ownerReferences") or []]


def component_of(item: Object) -> str:
    return annotations_of(item).get(STAGE) or labels_of(item).get(COMPONENT, "")


def is_being_deleted(item: Object) -> bool:
    return "deletionTimestamp" in item["metadata"]


def condition(item: Object, kind: str) -> Object | None:
    """The condition of type ``kind`` if its status is True. Jobs, custom resources and nodes share this format."""
    conditions = item.get("status", {}).get("conditions") or []
    return next((one for one in conditions if one["type"] == kind and one["status"] == "True"), None)


def is_finished(job: Object) -> bool:
    """Whether a Job has completed or failed for good."""
    return any(condition(job, kind) for kind in ("Complete", "Failed"))


def phase_of(pod: Object) -> str:
    return str(pod.get("status", {}).get("phase", "Pending"))


def is_over(pod: Object) -> bool:
    """Whether the pod's containers have ended and will not restart."""
    return phase_of(pod) in {"Succeeded", "Failed"}


def latest_of_each_worker(pods: list[Object]) -> list[Object]:
    """The pods of a job without those that another pod has replaced.

    The Job of a TrainJob keeps a pod that was evicted, or ended with its node, beside its replacement.
    """
    newest_last = sorted(pods, key=lambda pod: (created(pod), not is_over(pod)))
    latest = {annotations_of(pod).get(INDEX, name_of(pod)): name_of(pod) for pod in newest_last}
    return [pod for pod in pods if not is_over(pod) or name_of(pod) in latest.values()]


def container_statuses(pod: Object) -> list[Object]:
    return pod.get("status", {}).get("containerStatuses") or []


def terminations(pod: Object) -> list[Object]:
    """The ``terminated`` states of the pod's containers that have ended."""
    states = ((status.get("state") or {}).get("terminated") for status in container_statuses(pod))
    return [state for state in states if state]


def ends_of(pod: Object) -> list[ContainerExit]:
    """The container exits in the pod's status: the last one, and the one before a restart."""
    ends = []
    for status in container_statuses(pod):
        for key in ("lastState", "state"):
            if over := (status.get(key) or {}).get("terminated"):
                finished = over.get("finishedAt") or ""
                ends.append(ContainerExit(name_of(pod), over["exitCode"], over.get("reason", ""), finished))
    return ends


def failures_of(pod: Object) -> int:
    """How often a container of the pod has failed. An evicted or deleted pod counts as 0: a new pod replaces it."""
    if is_over(pod) or is_being_deleted(pod):
        return 0
    return sum(status.get("restartCount", 0) + has_just_failed(status) for status in container_statuses(pod))


def has_just_failed(status: Object) -> bool:
    """Whether a container has failed and restartCount does not include it yet, during the kubelet's back-off."""
    state, before = status.get("state") or {}, status.get("lastState") or {}
    ended = state.get("terminated") or ("waiting" in state and before.get("terminated"))
    return bool(ended and ended["exitCode"] != 0)


def started_container(pod: Object) -> str:
    """The name of the pod's container that has started, and so has a log; empty if none has."""
    for status in container_statuses(pod):
        states = [status.get(key) or {} for key in ("state", "lastState")]
        if any(state.get("running") or state.get("terminated") for state in states):
            return str(status["name"])
    return ""


def why_not_started(pod: Object) -> str:
    """Why a container of the pod cannot start, in the kubelet's words; empty if nothing prevents it."""
    for status in container_statuses(pod):
        waiting = (status.get("state") or {}).get("waiting") or {}
        if waiting.get("reason") in CANNOT_START:
            return f"{name_of(pod)}: {waiting['reason']}: {waiting.get('message', '')}".rstrip(": ")
    return ""


def unschedulable(pod: Object) -> Object | None:
    """The pod's PodScheduled condition with reason Unschedulable, or None (SchedulingGated is intended)."""
    for one in pod.get("status", {}).get("conditions") or []:
        if one["type"] == "PodScheduled" and one["status"] == "False" and one.get("reason") == "Unschedulable":
            return dict(one)
    return None


def moment(text: str | None) -> float:
    """Seconds since 1970 of an API time such as 2025-01-31T12:00:00Z, with or without microseconds; 0 for none."""
    if not text:
        return 0.0
    return datetime.fromisoformat(text.replace("Z", "+00:00")).astimezone(timezone.utc).timestamp()


def created(item: Object) -> float:
    """Creation time in seconds since 1970."""
    return moment(item["metadata"].get("creationTimestamp"))


def latest_warning(events: Iterable[Object]) -> str:
    """The newest of these events that is a warning, in the words of its source; empty without one."""
    newest = max((event for event in events if event.get("type") == "Warning"), key=last_seen, default=None)
    return f"{newest['reason']}: {newest.get('message', '')}" if newest else ""


def last_seen(event: Object) -> float:
    """When the event last occurred, in seconds since 1970."""
    series: dict[str, Any] = event.get("series") or {}
    times = (series.get("lastObservedTime"), event.get("lastTimestamp"), event.get("eventTime"))
    return max(map(moment, times)) or moment(event["metadata"].get("creationTimestamp"))
