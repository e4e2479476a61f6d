"""A run of the pipeline that tests control: what Helm, the controllers, the gate and the kubelets write to Helm's
record and to the API, for the objects that the chart renders."""

from __future__ import annotations

import json
from typing import Any

from chart.manifests import MINIMAL, Values, merged, render
from generator.cluster.fake_api import FakeApi, now
from generator.cluster.fake_api import merged as api_merged
from generator.ops.release.fake_helm import FakeHelm
from genvalues.cluster.objects import annotations_of, name_of
from genvalues.cluster.workloads import NAMES, workload_of

Object = dict[str, Any]
VALUES: Values = merged(
    MINIMAL, {"huggingFace": {"tokenSecret": "hf-token"}, "parallelism": {"nodes": 2, "dataParallelSize": 4}}
)


def is_hook(item: Object, stage: str, kind: str) -> bool:
    return annotations_of(item).get("llama-lora/stage") == stage and item["kind"] == kind


class Run:
    """The release ``name``; in mode attached by default."""

    def __init__(self, fake: FakeApi, helm: FakeHelm, *, name: str = "demo", values: Values | None = None) -> None:
        self.fake, self.helm, self.name = fake, helm, name
        self.values = merged(VALUES, values or {})
        self.objects = render(self.values, release=name, namespace="team-a")
        self.phases: dict[str, str] = {}
        self.status = "pending-install"
        self.revision = 1
        self.updated = "2026-01-01T00:00:00.5Z"
        self.record()

    def record(self) -> None:
        self.helm.has(
            self.objects,
            name=self.name,
            status=self.status,
            revision=self.revision,
            updated=self.updated,
            phases=self.phases,
            values=self.values,
            all_values=self.values,
        )

    def ends(self, status: str) -> None:
        """The Helm client has ended."""
        self.status = status
        self.record()

    def hook(self, stage: str, kind: str = "Job") -> Object:
        """The rendered object of a stage, a gate or the runner."""
        return next(item for item in self.objects if is_hook(item, stage, kind))

    def begin(self, stage: str) -> str:
        """Create the stage's Job and its running pod; returns the pod's name."""
        item = self.hook(stage)
        name = name_of(item)
        self.fake.remove("jobs", name)
        self.phases[name] = "Running"
        self.record()
        job = self.fake.add("jobs", {**item, "status": {"startTime": now(), "active": 1}})
        return self.add_pod(f"{name}-x1", job, container=stage)

    def add_pod(
        self, name: str, owner: Object, *, container: str, node: str = "node-1", limits: Object | None = None
    ) -> str:
        labels = {**owner["metadata"]["labels"]}
        kind = owner["kind"]
        if kind == "PyTorchJob":
            labels["training.kubeflow.org/job-name"] = name_of(owner)
        if kind == "TrainJob":
            labels["jobset.sigs.k8s.io/jobset-name"] = name_of(owner)
        reference = {"kind": kind, "name": name_of(owner), "uid": owner["metadata"]["uid"]}
        state = {"running": {"startedAt": now()}}
        self.fake.add(
            "pods",
            {
                "metadata": {"name": name, "labels": labels, "ownerReferences": [reference]},
                "spec": {"nodeName": node, "containers": [{"name": container, "resources": {"limits": limits or {}}}]},
                "status": {
                    "phase": "Running",
                    "containerStatuses": [{"name": container, "state": state, "restartCount": 0}],
                },
            },
        )
        return name

    def release_workers(self, stage: str = "train", *, revision: int = 1, fingerprint: str = "f1") -> list[str]:
        """Release the PyTorchJob or TrainJob and run its two workers, each on its own node."""
        item = next(found for kind in NAMES for found in self.objects if is_hook(found, stage, kind))
        workload = workload_of(item)
        self.phases[name_of(item)] = "Succeeded"
        self.record()
        name = f"{name_of(item).rsplit('-', 1)[0]}-{revision}"
        annotations = {**annotations_of(item), "llama-lora/fingerprint": fingerprint}
        resumed = {"type": "Suspended", "status": "False", "lastTransitionTime": now()}
        job = self.fake.add(
            workload.kind.plural,
            {
                **api_merged(item, workload.unsuspended()),
                "metadata": {**item["metadata"], "name": name, "annotations": annotations},
                "status": {"startTime": now(), "conditions": [{"type": "Running", "status": "True"}, resumed]},
            },
        )
        limits = {"cpu": "1", "aws.amazon.com/neuron": "16"}
        return [
            self.add_pod(f"{name}-worker-{index}", job, container="pytorch", node=f"node-{index}", limits=limits)
            for index in range(2)
        ]

    def annotate(self, job: str, **annotations: Object) -> None:
        text = {f"llama-lora/{name}": json.dumps(value) for name, value in annotations.items()}
        self.fake.merge("pytorchjobs", job, {"metadata": {"annotations": text}})

    def end_pod(self, pod: str, code: int) -> None:
        item = self.fake.get("pods", pod)
        assert item
        over = {"exitCode": code, "reason": "Error" if code else "Completed", "finishedAt": now()}
        status = {**item["status"]["containerStatuses"][0], "state": {"terminated": over}}
        phase = "Failed" if code else "Succeeded"
        self.fake.merge("pods", pod, {"status": {"phase": phase, "containerStatuses": [status]}})

    def end(self, stage: str, *log: str, code: int = 0, reason: str = "") -> None:
        """End the stage's pod and its Job."""
        name = name_of(self.hook(stage))
        pod = f"{name}-x1"
        self.fake.logs.setdefault(pod, []).extend(log)
        self.end_pod(pod, code)
        self.fake.merge("jobs", name, {"status": {"completionTime": now()}} if not code else {"status": {"failed": 1}})
        if code:
            reason = reason or ("PodFailurePolicy" if code == 2 else "BackoffLimitExceeded")
            self.fake.set_condition("jobs", name, "Failed", f"Container {stage} ended", reason)
        else:
            self.fake.set_condition("jobs", name, "Complete")
        self.phases[name] = "Failed" if code else "Succeeded"
        self.record()

    def through(self, *stages: str) -> None:
        """Run these stages successfully."""
        for stage in stages:
            self.begin(stage)
            self.end(stage, f"{stage}: done")

    def to_train(self) -> list[str]:
        """Run the pipeline until train runs; returns the names of its workers."""
        stages = {annotations_of(item).get("llama-lora/stage") for item in self.objects}
        self.through("preflight", *(["storage-prepare"] if "storage-prepare" in stages else []), "tokenize")
        for worker in self.release_workers("compile"):
            self.end_pod(worker, 0)
        self.fake.set_condition("pytorchjobs", f"{self.name}-compile-1", "Succeeded")
        self.through("compile-gate")
        workers = self.release_workers("train")
        self.begin("train-gate")
        return workers


class Outer(Run):
    """A release in mode detached, with a running runner."""

    def __init__(self, fake: FakeApi, helm: FakeHelm) -> None:
        super().__init__(fake, helm, values={"pipeline": {"mode": "detached"}})
        self.ends("deployed")
        item = self.hook("runner")
        job = fake.add("jobs", {**item, "status": {"startTime": now(), "active": 1}})
        self.pod = self.add_pod(f"{name_of(item)}-x1", job, container="runner")

    def inner(self) -> Run:
        """What the runner installs."""
        made = Run(self.fake, self.helm, name="demo-run")
        made.updated = "2099-01-01T00:00:00Z"  # after the runner's Job
        made.record()
        return made
