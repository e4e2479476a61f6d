"""A suspended job of each workload, with which preflight tests the controllers that are to run compile and train.

It never gets a pod: it is created suspended, and is in a queue of Kueue that does not exist. Kueue (0.17) makes a
Workload for a job in such a queue, and never admits it. Without the label, Kueue would put the job into the namespace's
LocalQueue ``default``, if there is one, and start it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from genvalues.cluster.api import PYTORCH_JOBS, Api, Kind, Object
from genvalues.cluster.config import ClusterConfig
from genvalues.cluster.objects import COMPONENT, INSTANCE, QUEUE_NAME, STAGE

TRAINER = "apis/trainer.kubeflow.org/v1alpha1"
TRAIN_JOBS, TRAINING_RUNTIMES = Kind(TRAINER, "trainjobs"), Kind(TRAINER, "trainingruntimes")
NO_QUEUE = "llama-lora-preflight-no-queue"
CONTAINER = {"image": "suspended.invalid/never-pulled"}
OPERATOR = "https://github.com/kubeflow/training-operator.git/manifests/overlays/standalone?ref=v1.8.1"
TRAINER_V2 = "https://github.com/kubeflow/trainer.git/manifests/overlays/manager?ref=v2.0.0"


class Probe(ABC):
    """The suspended job of a workload, and what a finding about its controller says."""

    setting: ClassVar[str]  # value of the setting workload
    title: ClassVar[str]  # the kind of the job
    kind: ClassVar[Kind]
    integration: ClassVar[str]  # in Kueue's configuration
    subject: ClassVar[str]  # the controller
    install: ClassVar[str]
    restart: ClassVar[str]

    @abstractmethod
    def objects(self, meta: Object) -> list[tuple[Kind, Object]]:
        """The objects to create, in order: the job is the last one."""

    def is_served(self, api: Api) -> bool:
        served = api.discover(self.kind.api) or {"resources": []}
        return any(resource["name"] == self.kind.plural for resource in served["resources"])

    def create(self, api: Api, config: ClusterConfig, purpose: str) -> str:
        """Create the job, and what it needs. Returns its name."""
        meta = metadata(config, purpose)
        self.delete(api, meta["name"])  # left by a preflight that was killed
        for kind, item in self.objects(meta):
            api.create(kind, item)
        return str(meta["name"])

    def delete(self, api: Api, name: str) -> None:
        for kind, _ in reversed(self.objects({"name": name})):
            api.delete(kind, name)


class PyTorchJobProbe(Probe):
    setting = "pytorchjob"
    title = "PyTorchJob"
    kind = PYTORCH_JOBS
    integration = "kubeflow.org/pytorchjob"
    subject = "training operator"
    install = f'kubectl apply --server-side -k "{OPERATOR}"'
    restart = "kubectl -n kubeflow rollout restart deployment training-operator"

    def objects(self, meta: Object) -> list[tuple[Kind, Object]]:
        template = {"spec": {"containers": [{"name": "pytorch", **CONTAINER}]}}
        worker = {"replicas": 1, "restartPolicy": "Never", "template": template}
        spec = {"runPolicy": {"suspend": True}, "pytorchReplicaSpecs": {"Worker": worker}}
        return [(self.kind, {"apiVersion": "kubeflow.org/v1", "kind": self.title, "metadata": meta, "spec": spec})]


class TrainJobProbe(Probe):
    """Trainer's webhook refuses a TrainJob without a runtime, so the probe brings one."""

    setting = "trainjob"
    title = "TrainJob"
    kind = TRAIN_JOBS
    integration = "trainer.kubeflow.org/trainjob"
    subject = "Kubeflow Trainer"
    install = f'kubectl apply --server-side -k "{TRAINER_V2}"'
    restart = "kubectl -n kubeflow-system rollout restart deployment kubeflow-trainer-controller-manager"

    def objects(self, meta: Object) -> list[tuple[Kind, Object]]:
        api, runtime_kind = TRAINER.removeprefix("apis/"), "TrainingRuntime"
        # The names are those of Trainer: it finds the trainer's container by them.
        pod = {"spec": {"restartPolicy": "Never", "containers": [{"name": "node", **CONTAINER}]}}
        labels = {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
        job = {"name": "node", "template": {"metadata": {"labels": labels}, "spec": {"template": pod}}}
        policy = {"numNodes": 1, "torch": {"numProcPerNode": 1}}
        runtime = {"mlPolicy": policy, "template": {"spec": {"replicatedJobs": [job]}}}
        reference = {"apiGroup": api.partition("/")[0], "kind": runtime_kind, "name": meta["name"]}
        own = {key: value for key, value in meta.items() if key != "labels"}
        labels_of_runtime = {key: value for key, value in meta.get("labels", {}).items() if key != QUEUE_NAME}
        return [
            (
                TRAINING_RUNTIMES,
                {
                    "apiVersion": api,
                    "kind": runtime_kind,
                    "metadata": {**own, "labels": {**labels_of_runtime, "trainer.kubeflow.org/framework": "torch"}},
                    "spec": runtime,
                },
            ),
            (
                self.kind,
                {
                    "apiVersion": api,
                    "kind": self.title,
                    "metadata": meta,
                    "spec": {"suspend": True, "runtimeRef": reference},
                },
            ),
        ]


PROBES: tuple[Probe, ...] = (PyTorchJobProbe(), TrainJobProbe())


def probe_of(config: ClusterConfig) -> Probe:
    return next(probe for probe in PROBES if probe.setting == config.workload)


def metadata(config: ClusterConfig, purpose: str) -> Object:
    return {
        "name": f"{config.fullname}-{purpose}-{config.revision}",
        "labels": {INSTANCE: config.release, COMPONENT: "preflight", QUEUE_NAME: NO_QUEUE},
        "annotations": {STAGE: "preflight"},
    }
