"""TrainJob, trainer.kubeflow.org/v1alpha1: Kubeflow Trainer v2.

A TrainJob makes a JobSet of its name, which makes the Indexed Job NAME-node-0, which makes the pods. Their template is
in a TrainingRuntime, which the chart gives the TrainJob's name. Trainer's webhook refuses updates of a TrainJob without
a runtime; a finalizer of Trainer keeps a deleted runtime until no TrainJob uses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from genvalues.cluster.kinds import TRAIN_JOBS, TRAINING_RUNTIMES, ApiError, Object
from genvalues.cluster.objects import annotations_of, moment, name_of
from genvalues.cluster.workloads.workload import DEFAULT_GRACE_PERIOD, Workload

if TYPE_CHECKING:  # genvalues local needs no Kubernetes client
    from genvalues.cluster.api import Api

WEBHOOK_SECONDS = 10.0
# Annotations of the chart: a TrainJob has no fields for them.
RETRIES, GRACE_PERIOD = "llama-lora/retries", "llama-lora/grace-period-seconds"


class TrainJob(Workload):
    setting = "trainjob"
    name = "TrainJob"
    kind = TRAIN_JOBS
    job_label = "jobset.sigs.k8s.io/jobset-name"
    success = "Complete"  # when every worker has succeeded
    integration = "trainer.kubeflow.org/trainjob"
    operator = "Kubeflow Trainer"

    def is_suspended(self, job: Object) -> bool:
        return bool(job["spec"].get("suspend"))

    def unsuspended(self) -> Object:
        return {"spec": {"suspend": False}}

    def workers(self, job: Object) -> int:
        return int(job["spec"]["trainer"]["numNodes"])

    def processes(self, job: Object) -> int:
        return int(job["spec"]["trainer"]["numProcPerNode"])

    def retries(self, job: Object) -> int:
        return int(annotations_of(job).get(RETRIES, 0))

    def grace_period(self, job: Object) -> float:
        return float(annotations_of(job).get(GRACE_PERIOD, DEFAULT_GRACE_PERIOD))

    def started(self, job: Object) -> float:
        """The status has no startTime. The condition Suspended turns to False when the job starts."""
        conditions = job.get("status", {}).get("conditions") or []
        resumed = [one for one in conditions if one["type"] == "Suspended" and one["status"] == "False"]
        return moment(resumed[0].get("lastTransitionTime")) if resumed else 0.0

    def worker_template(self, job: Object, rendered: Sequence[Object]) -> Object:
        named = job["spec"]["runtimeRef"]["name"]
        [runtime] = [item for item in rendered if item["kind"] == "TrainingRuntime" and name_of(item) == named]
        template: Object = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
        return template

    def stop(self, api: Api, name: str) -> None:
        """Suspend it first: Trainer creates the JobSet of a TrainJob that is being deleted again, and the Job
        controller a pod in place of one that is being deleted.
        """
        with suppress(ApiError):  # Trainer's webhook does not answer: its controller creates nothing either
            api.with_patience(WEBHOOK_SECONDS).patch(self.kind, name, {"spec": {"suspend": True}})
        super().stop(api, name)
        api.delete(TRAINING_RUNTIMES, name)

    def delete(self, api: Api, name: str) -> None:
        super().delete(api, name)
        api.delete(TRAINING_RUNTIMES, name)

    def delete_leftovers(self, api: Api, selector: str) -> list[str]:
        """Runtimes whose TrainJob was never created or is gone; those in use stay until it is."""
        names = [name_of(runtime) for runtime in api.list(TRAINING_RUNTIMES, labels=selector)]
        for name in names:
            api.delete(TRAINING_RUNTIMES, name)
        return [f"trainingruntime/{name}" for name in names]
