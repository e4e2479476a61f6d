"""The APIs that compile and train run as, behind one interface. Nothing else knows their fields."""

from __future__ import annotations

from genvalues.cluster.kinds import Object
from genvalues.cluster.objects import FINGERPRINT, annotations_of, is_being_deleted, labels_of
from genvalues.cluster.workloads.pytorchjob import PyTorchJob
from genvalues.cluster.workloads.trainjob import TrainJob
from genvalues.cluster.workloads.workload import Workload

WORKLOADS: tuple[Workload, ...] = (PyTorchJob(), TrainJob())
NAMES = tuple(workload.name for workload in WORKLOADS)  # kinds
PARTS = ("TrainingRuntime",)  # kinds of what belongs to a job


def workload_for(setting: str) -> Workload:
    """The API that the setting workload names."""
    return next(workload for workload in WORKLOADS if workload.setting == setting)


def workload_of(job: Object) -> Workload:
    """The API of a job. The API server sends the kind of custom resources with each object."""
    return next(workload for workload in WORKLOADS if workload.name == job["kind"])


def is_released(job: Object) -> bool:
    """Whether a gate has released it."""
    return FINGERPRINT in annotations_of(job)


def is_suspended(job: Object) -> bool:
    return workload_of(job).is_suspended(job)


def is_finished(job: Object) -> bool:
    """Whether it has succeeded, or failed for good."""
    return workload_of(job).is_finished(job)


def is_active(job: Object) -> bool:
    """Neither finished nor being deleted. A deleted job stays until its workers have ended."""
    return not is_finished(job) and not is_being_deleted(job)


def is_running(job: Object) -> bool:
    """Whether a gate has released it, and it has not ended: it has pods, or gets them."""
    return is_released(job) and is_active(job)


def workers_of(job: Object) -> int:
    return workload_of(job).workers(job)


def job_of(pod: Object) -> str:
    """The name of the job that a worker pod belongs to; empty for other pods."""
    labels = labels_of(pod)
    return next((labels[workload.job_label] for workload in WORKLOADS if workload.job_label in labels), "")


def is_worker(pod: Object) -> bool:
    """Whether it is a worker of a job. Other pods of a run use no accelerator node."""
    return job_of(pod) != ""
