"""PyTorchJob, kubeflow.org/v1: the Kubeflow training operator, also called Trainer v1."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from genvalues.cluster.kinds import PYTORCH_JOBS, Object
from genvalues.cluster.objects import moment, name_of
from genvalues.cluster.workloads.workload import DEFAULT_GRACE_PERIOD, Workload

if TYPE_CHECKING:  # genvalues local needs no Kubernetes client
    from genvalues.cluster.api import Api

OVERDUE = "llama-lora/seconds-overdue"  # annotation that makes the operator reconcile a job past its deadline


class PyTorchJob(Workload):
    setting = "pytorchjob"
    name = "PyTorchJob"
    kind = PYTORCH_JOBS
    job_label = "training.kubeflow.org/job-name"
    success = "Succeeded"  # with an elasticPolicy as soon as one worker has succeeded
    integration = "kubeflow.org/pytorchjob"
    operator = "the training operator"

    def is_suspended(self, job: Object) -> bool:
        return bool(job["spec"].get("runPolicy", {}).get("suspend"))

    def unsuspended(self) -> Object:
        return {"spec": {"runPolicy": {"suspend": False}}}

    def workers(self, job: Object) -> int:
        return int(worker_of(job).get("replicas", 1))

    def processes(self, job: Object) -> int:
        return int(job["spec"].get("nprocPerNode", 1))

    def retries(self, job: Object) -> int:
        """The chart sets runPolicy.backoffLimit to the retries of all workers together plus one."""
        return max(0, (job["spec"]["runPolicy"].get("backoffLimit", 1) - 1) // self.workers(job))

    def grace_period(self, job: Object) -> float:
        template = worker_of(job).get("template", {}).get("spec", {})
        return float(template.get("terminationGracePeriodSeconds", DEFAULT_GRACE_PERIOD))

    def started(self, job: Object) -> float:
        return moment(job.get("status", {}).get("startTime"))

    def worker_template(self, job: Object, rendered: Sequence[Object]) -> Object:
        template: Object = worker_of(job)["template"]
        return template

    def enforce_deadline(self, api: Api, job: Object) -> None:
        """The operator checks activeDeadlineSeconds only when the job changes, so change it."""
        if (overdue := self.seconds_overdue(job)) > 0:
            api.patch(self.kind, name_of(job), {"metadata": {"annotations": {OVERDUE: f"{overdue:.1f}"}}})

    def seconds_overdue(self, job: Object) -> float:
        """Seconds that the job has been active beyond its activeDeadlineSeconds. Suspended time does not count."""
        limit, since = job["spec"]["runPolicy"].get("activeDeadlineSeconds"), self.started(job)
        if limit is None or not since or self.is_suspended(job):
            return 0.0
        return time.time() - since - float(limit)


def worker_of(job: Object) -> dict[str, Any]:
    worker: dict[str, Any] = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    return worker
