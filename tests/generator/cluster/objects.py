"""Objects as the chart, the operator and the kubelet create them."""

from __future__ import annotations

import base64
import gzip
import json
from typing import Any

from generator.cluster.fake_api import FakeApi, now

Object = dict[str, Any]
RUN = "mine-0123456789abcdef"  # the run label of the tests' release


def pytorch_job(
    name: str,
    stage: str = "train",
    *,
    workers: int = 2,
    release: str = "demo",
    run: str = RUN,
    fingerprint: str = "",
) -> Object:
    """Suspended as the chart creates it, or released by a gate for ``fingerprint``."""
    annotations = {"llama-lora/stage": stage} | ({"llama-lora/fingerprint": fingerprint} if fingerprint else {})
    return {
        "kind": "PyTorchJob",
        "metadata": {"name": name, "labels": labels(release, stage, run), "annotations": annotations},
        "spec": {
            "runPolicy": {"suspend": not fingerprint, "backoffLimit": 1 + workers},  # the chart's for one retry
            "pytorchReplicaSpecs": {"Worker": {"replicas": workers, "restartPolicy": "OnFailure"}},
        },
    }


def train_job(name: str, stage: str = "train", *, workers: int = 2, fingerprint: str = "") -> Object:
    """The TrainJob of release demo, as the chart creates it or released by a gate for ``fingerprint``."""
    annotations = {
        "llama-lora/stage": stage,
        "llama-lora/retries": "1",
        "llama-lora/grace-period-seconds": "120",
        **({"llama-lora/fingerprint": fingerprint} if fingerprint else {}),
    }
    return {
        "kind": "TrainJob",
        "metadata": {"name": name, "labels": labels("demo", stage, RUN), "annotations": annotations},
        "spec": {
            "suspend": not fingerprint,
            "runtimeRef": {"kind": "TrainingRuntime", "name": name},
            "trainer": {"numNodes": workers, "numProcPerNode": 2},
        },
    }


def labels(release: str, component: str, run: str) -> dict[str, str]:
    return {
        "app.kubernetes.io/instance": release,
        "app.kubernetes.io/component": component,
        "llama-lora/run": run,
    }


def job(name: str, stage: str, *, release: str = "demo", run: str = RUN) -> Object:
    return {
        "metadata": {"name": name, "labels": labels(release, stage, run), "annotations": {"llama-lora/stage": stage}},
        "spec": {"activeDeadlineSeconds": 3600},
        "status": {"active": 1},
    }


def helm_record(status: str, *, revision: int = 1, release: str = "demo") -> Object:
    """The Secret of a Helm revision, with the part of its content that matters here."""
    info = {"first_deployed": "2026-01-01T00:00:00Z", "status": status, "description": "Preparing"}
    content = {"name": release, "info": info, "config": {"lr": 2e-5}, "manifest": "größer: <1>", "version": revision}
    packed = base64.b64encode(gzip.compress(json.dumps(content).encode()))
    labels = {"owner": "helm", "name": release, "status": status, "version": str(revision)}
    return {
        "metadata": {"name": f"sh.helm.release.v1.{release}.v{revision}", "labels": labels},
        "type": "helm.sh/release.v1",
        "data": {"release": base64.b64encode(packed).decode()},
    }


def in_config_map(record: Object) -> Object:
    """The same record, as Helm stores it in a ConfigMap."""
    content = base64.b64decode(record["data"]["release"]).decode()
    return {"metadata": record["metadata"], "data": {"release": content}}


def content_of(record: Object) -> Object:
    """The content of a record: a Secret, or a ConfigMap, which has no base64 of its own."""
    packed = base64.b64decode(record["data"]["release"])
    if record.get("type") == "helm.sh/release.v1":
        packed = base64.b64decode(packed)
    return dict(json.loads(gzip.decompress(packed)))


def pod(name: str, owner: Object, kind: str, *, phase: str = "Running", container: str = "pytorch") -> Object:
    state: Object = (
        {"running": {"startedAt": now()}} if phase == "Running" else {"waiting": {"reason": "ContainerCreating"}}
    )
    meta = {"name": name, "labels": dict(owner["metadata"]["labels"])}
    meta["ownerReferences"] = [{"kind": kind, "name": owner["metadata"]["name"], "uid": owner["metadata"]["uid"]}]
    if kind == "PyTorchJob":
        meta["labels"]["training.kubeflow.org/job-name"] = owner["metadata"]["name"]
    if kind == "TrainJob":  # its pods belong to the Job of its JobSet
        meta["labels"]["jobset.sigs.k8s.io/jobset-name"] = owner["metadata"]["name"]
        meta["ownerReferences"][0].update(kind="Job", name=f"{owner['metadata']['name']}-node-0")
    return {
        "metadata": meta,
        "spec": {"nodeName": "node-1"},
        "status": {"phase": phase, "containerStatuses": [{"name": container, "state": state, "restartCount": 0}]},
    }


class Operator:
    """Acts as the training operator, or Trainer v2 (``plural`` trainjobs), and the kubelets for one job."""

    def __init__(self, fake: FakeApi, name: str, plural: str = "pytorchjobs") -> None:
        self.fake = fake
        self.name = name
        self.plural = plural

    def worker(self, index: int) -> str:
        return f"{self.name}-worker-{index}" if self.plural == "pytorchjobs" else f"{self.name}-node-0-{index}-x1y2z"

    def start(self, workers: int = 2) -> None:
        owner = self.fake.get(self.plural, self.name)
        assert owner
        for index in range(workers):
            self.fake.add("pods", pod(self.worker(index), owner, owner["kind"]))
        if self.plural == "pytorchjobs":  # a TrainJob has no such condition
            self.fake.set_condition("pytorchjobs", self.name, "Running", "PyTorchJob is running.")

    def write(self, index: int, *lines: str) -> None:
        self.fake.logs.setdefault(self.worker(index), []).extend(lines)

    def end_worker(self, index: int, code: int, reason: str = "") -> None:
        over = {"exitCode": code, "reason": reason or ("Error" if code else "Completed"), "finishedAt": now()}
        status = {"name": "pytorch", "state": {"terminated": over}, "restartCount": 0}
        phase = "Failed" if code else "Succeeded"
        self.fake.merge("pods", self.worker(index), {"status": {"phase": phase, "containerStatuses": [status]}})

    def restart_worker(self, index: int, code: int, *, put_off: bool = False) -> None:
        """Restart the container in place, or with ``put_off`` wait in back-off; its last exit is in lastState."""
        last = {"terminated": {"exitCode": code, "reason": "Error", "finishedAt": now()}}
        state = {"waiting": {"reason": "CrashLoopBackOff"}} if put_off else {"running": {"startedAt": now()}}
        status = {"name": "pytorch", "state": state, "lastState": last, "restartCount": 1}
        self.fake.merge("pods", self.worker(index), {"status": {"containerStatuses": [status]}})

    def succeed(self) -> None:
        success = "Succeeded" if self.plural == "pytorchjobs" else "Complete"
        self.fake.set_condition(self.plural, self.name, success, "jobset completed successfully")

    def fail(self, message: str = "1 Worker replica(s) failed.") -> None:
        """As the operator does: with the condition it deletes the pods, and so their logs, at once."""
        self.fake.set_condition(self.plural, self.name, "Failed", message)
        for name in self.fake.names("pods"):
            if name.startswith(f"{self.name}-"):
                self.fake.remove("pods", name)
