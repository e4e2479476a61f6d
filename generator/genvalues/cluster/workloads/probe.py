"""A suspended job of each workload, with which preflight tests the controllers that are to run compile and train.

It never gets a pod: it is created suspended, and is in a queue of Kueue that does not exist. Kueue (0.17) makes a
Workload for a job in such a queue, and never admits it. Without the label, Kueue would put the job into the namespace's
LocalQueue ``default``, if there is one, and start it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from genvalues.cluster.api import Api
from genvalues.cluster.config import ClusterConfig
from genvalues.cluster.kinds import PYTORCH_JOBS, TRAIN_JOBS, TRAINING_RUNTIMES, Kind, Object
from genvalues.cluster.objects import COMPONENT, INSTANCE, QUEUE_NAME, STAGE
from genvalues.cluster.workloads.pytorchjob import PyTorchJob
from genvalues.cluster.workloads.trainjob import TrainJob
from genvalues.cluster.workloads.workload import Workload
from genvalues.common.dicts import get

NO_QUEUE = "llama-lora-preflight-no-queue"
CONTAINER = {"image": "suspended.invalid/never-pulled"}
OPERATOR = "https://github.com/kubeflow/training-operator.git/manifests/overlays/standalone?ref=v1.8.1"
TRAINER_V2 = "https://github.com/kubeflow/trainer.git/manifests/overlays/manager?ref=v2.2.0"


@dataclass(frozen=True)
class Probe:
    """The suspended job of a workload, and what a finding about its controller says."""

    workload: Workload
    objects: Callable[[Object], list[tuple[Kind, Object]]]  # to create in this order; takes their metadata
    subject: str  # the controller
    install: str
    restart: str

    def is_served(self, api: Api) -> bool:
        kind = self.workload.kind
        resources = get(api.discover(kind.api), "resources", list) or []
        return any(get(resource, "name", str) == kind.plural for resource in resources)

    def create(self, api: Api, config: ClusterConfig, purpose: str) -> str:
        """Create the job, and what it needs. Returns its name."""
        meta = metadata(config, purpose)
        self.workload.delete(api, meta["name"])  # left by a preflight that was killed
        for kind, item in self.objects(meta):
            api.create(kind, item)
        return str(meta["name"])


def pytorchjob(meta: Object) -> list[tuple[Kind, Object]]:
    template = {"spec": {"containers": [{"name": "pytorch", **CONTAINER}]}}
    worker = {"replicas": 1, "restartPolicy": "Never", "template": template}
    spec = {"runPolicy": {"suspend": True}, "pytorchReplicaSpecs": {"Worker": worker}}
    return [of_kind(PYTORCH_JOBS, "PyTorchJob", meta, spec)]


def trainjob(meta: Object) -> list[tuple[Kind, Object]]:
    """Trainer's webhook refuses a TrainJob without a runtime, so the probe brings one."""
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
        of_kind(TRAINING_RUNTIMES, "TrainingRuntime", runtime_meta, runtime),
        of_kind(TRAIN_JOBS, "TrainJob", meta, spec),
    ]


def of_kind(kind: Kind, name: str, meta: Object, spec: Object) -> tuple[Kind, Object]:
    return kind, {"apiVersion": kind.api.removeprefix("apis/"), "kind": name, "metadata": meta, "spec": spec}


PROBES = (
    Probe(
        *(PyTorchJob(), pytorchjob, "training operator"),
        install=f'kubectl apply --server-side -k "{OPERATOR}"',
        restart="kubectl -n kubeflow rollout restart deployment training-operator",
    ),
    Probe(
        *(TrainJob(), trainjob, "Kubeflow Trainer"),
        install=f'kubectl apply --server-side -k "{TRAINER_V2}"',
        restart="kubectl -n kubeflow-system rollout restart deployment kubeflow-trainer-controller-manager",
    ),
)


def probe_of(config: ClusterConfig) -> Probe:
    return next(probe for probe in PROBES if probe.workload.setting == config.workload)


def metadata(config: ClusterConfig, purpose: str) -> Object:
    return {
        "name": f"{config.fullname}-{purpose}-{config.revision}",
        "labels": {INSTANCE: config.release, COMPONENT: "preflight", QUEUE_NAME: NO_QUEUE},
        "annotations": {STAGE: "preflight"},
    }
