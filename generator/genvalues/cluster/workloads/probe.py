"""A suspended job of each workload, with which preflight tests the controllers that are to run compile and train.

It never gets a pod: it is created suspended, and is in a queue of Kueue that does not exist. Kueue (0.17) makes a
Workload for a job in such a queue, and never admits it. Without the label, Kueue would put the job into the namespace's
LocalQueue ``default``, if there is one, and start it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from genvalues.cluster.api import TRAINING_RUNTIMES, Api, Kind, Object
from genvalues.cluster.config import ClusterConfig
from genvalues.cluster.objects import COMPONENT, INSTANCE, QUEUE_NAME, STAGE
from genvalues.cluster.workloads.pytorchjob import PyTorchJob
from genvalues.cluster.workloads.trainjob import TrainJob
from genvalues.cluster.workloads.workload import Workload

NO_QUEUE = "llama-lora-preflight-no-queue"
CONTAINER = {"image": "suspended.invalid/never-pulled"}
OPERATOR = "https://github.com/kubeflow/training-operator.git/manifests/overlays/standalone?ref=v1.8.1"
TRAINER_V2 = "https://github.com/kubeflow/trainer.git/manifests/overlays/manager?ref=v2.2.0"


class Probe(ABC):
    """The suspended job of a workload, and what a finding about its controller says."""

    workload: ClassVar[Workload]
    subject: ClassVar[str]  # the controller
    install: ClassVar[str]
    restart: ClassVar[str]

    @abstractmethod
    def objects(self, meta: Object) -> list[tuple[Kind, Object]]:
        """The objects to create, in order: the job is the last one."""

    def is_served(self, api: Api) -> bool:
        kind = self.workload.kind
        served = api.discover(kind.api) or {"resources": []}
        return any(resource["name"] == kind.plural for resource in served["resources"])

    def create(self, api: Api, config: ClusterConfig, purpose: str) -> str:
        """Create the job, and what it needs. Returns its name."""
        meta = metadata(config, purpose)
        self.workload.delete(api, meta["name"])  # left by a preflight that was killed
        for kind, item in self.objects(meta):
            api.create(kind, item)
        return str(meta["name"])


class PyTorchJobProbe(Probe):
    workload = PyTorchJob()
    subject = "training operator"
    install = f'kubectl apply --server-side -k "{OPERATOR}"'
    restart = "kubectl -n kubeflow rollout restart deployment training-operator"

    def objects(self, meta: Object) -> list[tuple[Kind, Object]]:
        template = {"spec": {"containers": [{"name": "pytorch", **CONTAINER}]}}
        worker = {"replicas": 1, "restartPolicy": "Never", "template": template}
        spec = {"runPolicy": {"suspend": True}, "pytorchReplicaSpecs": {"Worker": worker}}
        return [(self.workload.kind, of_kind(self.workload.kind, self.workload.name, meta, spec))]


class TrainJobProbe(Probe):
    """Trainer's webhook refuses a TrainJob without a runtime, so the probe brings one."""

    workload = TrainJob()
    subject = "Kubeflow Trainer"
    install = f'kubectl apply --server-side -k "{TRAINER_V2}"'
    restart = "kubectl -n kubeflow-system rollout restart deployment kubeflow-trainer-controller-manager"

    def objects(self, meta: Object) -> list[tuple[Kind, Object]]:
        # Trainer finds the trainer's container by these names.
        pod = {"spec": {"restartPolicy": "Never", "containers": [{"name": "node", **CONTAINER}]}}
        ancestor = {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}}
        job = {"name": "node", "template": {"metadata": ancestor, "spec": {"template": pod}}}
        policy = {"numNodes": 1, "torch": {"numProcPerNode": 1}}
        runtime = {"mlPolicy": policy, "template": {"spec": {"replicatedJobs": [job]}}}
        labels = {key: value for key, value in meta["labels"].items() if key != QUEUE_NAME}
        runtime_meta = {**meta, "labels": {**labels, "trainer.kubeflow.org/framework": "torch"}}
        reference = {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": meta["name"]}
        spec = {"suspend": True, "runtimeRef": reference}
        return [
            (TRAINING_RUNTIMES, of_kind(TRAINING_RUNTIMES, reference["kind"], runtime_meta, runtime)),
            (self.workload.kind, of_kind(self.workload.kind, self.workload.name, meta, spec)),
        ]


def of_kind(kind: Kind, name: str, meta: Object, spec: Object) -> Object:
    return {"apiVersion": kind.api.removeprefix("apis/"), "kind": name, "metadata": meta, "spec": spec}


PROBES: tuple[Probe, ...] = (PyTorchJobProbe(), TrainJobProbe())


def probe_of(config: ClusterConfig) -> Probe:
    return next(probe for probe in PROBES if probe.workload.setting == config.workload)


def metadata(config: ClusterConfig, purpose: str) -> Object:
    return {
        "name": f"{config.fullname}-{purpose}-{config.revision}",
        "labels": {INSTANCE: config.release, COMPONENT: "preflight", QUEUE_NAME: NO_QUEUE},
        "annotations": {STAGE: "preflight"},
    }
