"""Kueue: how a gate releases a job into a queue, and why the job waits there.

A job that Kueue manages must not start before its gate has released it, and a LocalQueue named ``default`` takes every
job without a queue. So where Kueue is installed, the chart creates a PyTorchJob in a queue that does not exist. A
TrainJob, whose queue Kueue copies to its JobSet for good, instead names a prebuilt Workload that does not exist.
"""

from __future__ import annotations

from dataclasses import dataclass

from genvalues.cluster.api import Api
from genvalues.cluster.kinds import ApiError, Kind, NotAllowed, Object
from genvalues.cluster.objects import FINGERPRINT, QUEUE_NAME, labels_of, name_of
from genvalues.cluster.workloads import Workload
from genvalues.common.dicts import get

NOT_RELEASED = "llama-lora-not-released"  # what does not exist; chart/templates/_stage-workload.tpl
PREBUILT = "kueue.x-k8s.io/prebuilt-workload-name"
DEFAULT_QUEUE = "default"  # Kueue's default LocalQueue
JOB_UID = "kueue.x-k8s.io/job-uid"  # label of a Workload: the uid of its job
WEBHOOK_SECONDS = 60.0  # Kueue's webhook does not answer for seconds while it restarts


def kueue_api(api: Api) -> str | None:
    """The path of Kueue's API, such as apis/kueue.x-k8s.io/v1beta1; None if Kueue is not installed."""
    group = api.discover("apis/kueue.x-k8s.io")
    version = get(group, "preferredVersion.groupVersion", str)
    return f"apis/{version}" if version else None


def workload_of_kueue(api: Api, kueue: str, job_uid: str) -> Object | None:
    """The Workload that Kueue has made for a job; None if there is none."""
    return next(iter(api.list(Kind(kueue, "workloads"), labels=f"{JOB_UID}={job_uid}")), None)


def release(api: Api, workload: Workload, job: Object, fingerprint: str, queue: str) -> None:
    """Let the job start, or put it into ``queue`` (kueue.queueName), from which Kueue starts it.

    The last request both annotates and releases: a gate that is killed before it leaves a job that is not released.
    """
    now_in = labels_of(job).get(QUEUE_NAME, "")
    held: dict[str, str | None] = {PREBUILT: None} if PREBUILT in labels_of(job) else {}
    if not queue and now_in == NOT_RELEASED:
        queue = "" if leave_queue(api, workload, job) else DEFAULT_QUEUE
    elif not queue:
        queue = now_in  # in which Kueue has put it
    patch: Object = {"metadata": {"annotations": {FINGERPRINT: fingerprint}}}
    if queue:
        patch["metadata"]["labels"] = {QUEUE_NAME: queue, **held}
    else:
        if held:  # which Kueue allows only while the job is suspended
            api.patch(workload.kind, name_of(job), {"metadata": {"labels": held}})
        patch |= workload.unsuspended()
    api.patch(workload.kind, name_of(job), patch)


def leave_queue(api: Api, workload: Workload, job: Object) -> bool:
    """Remove the job from the queue that does not exist. False if there is a default LocalQueue: Kueue refuses it."""
    try:
        api.with_patience(WEBHOOK_SECONDS).patch(
            workload.kind, name_of(job), {"metadata": {"labels": {QUEUE_NAME: None}}}
        )
    except ApiError as refused:
        if "default queue" in refused.message:
            return False
        raise
    return True


@dataclass
class Queue:
    """What Kueue says about a released job of ``workload`` that waits for admission."""

    api: Api
    workload: Workload
    _kueue: str | None = None

    def why_waiting(self, job: Object) -> str | None:
        """Kueue's reason; None if Kueue has made no Workload for the job."""
        try:
            found = self.find(job)
        except NotAllowed:  # roles of an earlier chart
            return "not allowed to read Kueue's reason"
        if found is None:
            return None
        conditions = {one["type"]: one for one in found.get("status", {}).get("conditions") or []}
        for kind in ("QuotaReserved", "Admitted"):
            one = conditions.get(kind)
            if one is None or one["status"] != "True":
                return str((one or {}).get("message") or f"no condition {kind} yet")
        return "admitted, but not started yet"

    def find(self, job: Object) -> Object | None:
        """The Workload of the job; None if there is none, or Kueue is not installed."""
        self._kueue = self._kueue or kueue_api(self.api)
        return workload_of_kueue(self.api, self._kueue, job["metadata"]["uid"]) if self._kueue else None

    def why_not_managed(self, seconds: float) -> str:
        """Why Kueue has made no Workload for so long, and what to do: the job would stay suspended forever."""
        if self._kueue is None:
            return "Kueue is not installed, so nothing admits the job. Install it, or set kueue.queueName to ''"
        return (
            f"Kueue made no Workload for the {self.workload.name} within {seconds:.0f} s: its integration"
            f" {self.workload.integration} is off (from Kueue 0.19 on, PyTorchJob's is by default), or Kueue does not"
            " manage this namespace. Add it to integrations.frameworks in Kueue's configuration and restart Kueue, or"
            " set kueue.queueName to ''"
        )
