"""The space of one test: a namespace, a volume, releases of the chart, and the history of their objects.

Every wait has a time limit, and shows the state of the namespace when it fails.
"""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from kubernetes import client, config, watch

from chart.manifests import CHART, Object, Values, merged
from cluster.local import binaries, images
from cluster.local.node import INSTANCE_TYPE
from genvalues.cluster import api
from genvalues.cluster.kinds import CLAIMS, JOBS, NAMESPACES, PODS, PYTORCH_JOBS, TRAIN_JOBS, TRAINING_RUNTIMES, Kind
from genvalues.cluster.objects import (
    INSTANCE,
    annotations_of,
    component_of,
    condition,
    is_over,
    labels_of,
    name_of,
)
from genvalues.cluster.workloads import job_of
from helm_binaries import helm_binary

Found = TypeVar("Found")

# Seconds for whatever is not promised to take less: several times what a busy machine needs. Only a failure takes them.
PATIENCE = 600.0
NEURON, EFA = "aws.amazon.com/neuron", "vpc.amazonaws.com/efa"
STAGE = "llama-lora/stage"
CLAIM = "work"
TRAINER_IMAGE = os.environ.get("TRAINER_IMAGE") or images.trainer()
STAND_IN_IMAGE = os.environ.get("STAND_IN_IMAGE") or images.stand_in()
STORAGE_CLASS = os.environ.get("STORAGE_CLASS") or "folder"
HELMS = (3, 4)
KINDS = {
    "pod": PODS,
    "job": JOBS,
    "pytorchjob": PYTORCH_JOBS,
    "trainjob": TRAIN_JOBS,
    "trainingruntime": TRAINING_RUNTIMES,
    "pvc": CLAIMS,
    "pv": Kind("api/v1", "persistentvolumes", namespaced=False),
    "configmap": Kind("api/v1", "configmaps"),
    "secret": Kind("api/v1", "secrets"),
    "serviceaccount": Kind("api/v1", "serviceaccounts"),
    "role": Kind("apis/rbac.authorization.k8s.io/v1", "roles"),
    "rolebinding": Kind("apis/rbac.authorization.k8s.io/v1", "rolebindings"),
}
KINDS |= {f"{name}s": kind for name, kind in KINDS.items()}
CLUSTER_WIDE = [
    Kind("apis/rbac.authorization.k8s.io/v1", plural, namespaced=False)
    for plural in ("clusterroles", "clusterrolebindings")
]

RESOURCES = {"requests": {"cpu": "10m", "memory": "32Mi"}, "limits": {"cpu": 2, "memory": "4Gi"}}
# Two workers. Several tests share the node: each takes few of its devices.
SMALL: Values = {
    "model": {"path": "/workspace/model"},
    "dataset": {
        "source": "/workspace/rows.jsonl",
        "format": "instruction",
        "columns": {"instruction": "q", "output": "a"},
    },
    "instance": INSTANCE_TYPE,
    "devices": {NEURON: 1, EFA: 1},
    "parallelism": {"nodes": 2},
    "sharedMemory": "64Mi",
    "storage": {"existingClaim": CLAIM, "prepare": {"enabled": False}},
    "stageDefaults": {"resources": RESOURCES},
    "rbac": {"clusterScopedReads": True},  # the findings of preflight about nodes and storage classes
    "stages": {
        stage: {"resources": RESOURCES}
        for stage in ("tokenize", "compile", "train", "consolidate", "merge", "evaluate")
    },
}


def helm_program(major: int) -> Path:
    """Helm 3 is built with the node's programs: the tests can be collected where no node ever ran."""
    return helm_binary(4) if major == 4 else binaries.program("helm3")


def image(name: str) -> Values:
    repository, _, tag = name.rpartition(":")
    return {"image": {"repository": repository, "tag": tag}}


def stand_in(**scripts: str) -> Values:
    """Values with which stages run these shell scripts instead of their work. Other stages do nothing and succeed."""
    stages = {stage: {"extraEnv": {"STAND_IN": script}} for stage, script in scripts.items()}
    return merged(SMALL, image(STAND_IN_IMAGE), {"stages": stages})


def inputs_file(folder: Path, values: Values, mode: str) -> Path:
    """An inputs file for these values, but for the instance, which is the CPU. Values without an input key go to
    chartValues."""
    written = {
        "name": "llama",
        "mode": mode,
        "model": values["model"],
        "dataset": values["dataset"],
        "instance": "cpu",
        "nodes": values["parallelism"]["nodes"],
        "cpu": {"processes": 1},
        "chartValues": {
            key: value for key, value in values.items() if key not in {"model", "dataset", "instance", "parallelism"}
        },
    }
    file = folder / "finetune.yaml"
    file.write_text(json.dumps(written, indent=2))  # JSON is YAML, without aliases, which genvalues rejects
    return file


@dataclass
class Ended:
    """The result of a command."""

    status: int
    output: str
    seconds: float


class Client:
    """A Helm client that runs in parallel with the test."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the client runs
        self._began = time.monotonic()
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._output,
            start_new_session=True,
        )

    def wait(self, seconds: float = PATIENCE) -> Ended:
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still runs after {seconds:.0f} s:\n{self.output}") from None
        return Ended(self.process.returncode, self.output, time.monotonic() - self._began)

    @property
    def output(self) -> str:
        self._output.seek(0)
        return self._output.read()

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        """Kill the process group, Helm included, as when a laptop loses power."""
        if self.is_alive():
            os.killpg(self.process.pid, how)
        self.process.wait(PATIENCE)


@dataclass(frozen=True)
class Sighting:
    at: float  # time.monotonic()
    change: str  # ADDED, MODIFIED or DELETED
    item: Object


class History:
    """Every state of the jobs and pods of a namespace, in the order in which the API server reported them."""

    def __init__(self, namespace: str) -> None:
        self.sightings: list[Sighting] = []
        self._namespace = namespace
        self._over = threading.Event()
        core, batch, custom = client.CoreV1Api(), client.BatchV1Api(), client.CustomObjectsApi()
        self._lists: list[tuple[Callable[..., Any], tuple[str, ...]]] = [
            (core.list_namespaced_pod, (namespace,)),
            (batch.list_namespaced_job, (namespace,)),
            (custom.list_namespaced_custom_object, ("kubeflow.org", "v1", namespace, "pytorchjobs")),
            (custom.list_namespaced_custom_object, ("trainer.kubeflow.org", "v1alpha1", namespace, "trainjobs")),
        ]
        for listing, arguments in self._lists:
            threading.Thread(target=self._follow, args=(listing, arguments), daemon=True).start()

    def _follow(self, listing: Callable[..., Any], arguments: tuple[str, ...]) -> None:
        serialize = client.ApiClient().sanitize_for_serialization
        while not self._over.is_set():
            try:
                for change in watch.Watch().stream(listing, *arguments, timeout_seconds=30):
                    item = serialize(change["raw_object"])
                    self.sightings.append(Sighting(time.monotonic(), change["type"], item))
                    if self._over.is_set():
                        return
            except Exception:  # the API server is stopped, or the kind is not installed: some tests do that
                self._over.wait(0.3)

    def close(self) -> None:
        self._over.set()

    def pods(self, **labels: str) -> list[Object]:
        """Every pod that existed, in its last state."""
        pods = (one.item for one in list(self.sightings) if one.item.get("kind") == "Pod")
        latest = {pod["metadata"]["uid"]: pod for pod in pods}
        return [pod for pod in latest.values() if labels.items() <= labels_of(pod).items()]

    def made_since(self, moment: float) -> list[Sighting]:
        """The first event of each new object. (Each new watch repeats ADDED.)"""
        first: dict[str, Sighting] = {}
        for one in list(self.sightings):
            first.setdefault(one.item["metadata"]["uid"], one)
        return [one for one in first.values() if one.at > moment]

    def trainings_at_once(self) -> int:
        """The largest number of jobs of train that had a running container at the same time."""
        most, working = 0, dict[str, str]()
        for one in list(self.sightings):
            if one.item.get("kind") == "Pod" and component_of(one.item) == "train":
                statuses = one.item["status"].get("containerStatuses", [])
                runs = one.change != "DELETED" and any("running" in (each.get("state") or {}) for each in statuses)
                working.pop(one.item["metadata"]["uid"], None)
                working |= {one.item["metadata"]["uid"]: job_of(one.item)} if runs else {}
                most = max(most, len(set(working.values())))
        return most

    def first(self, what: Callable[[Object], bool]) -> float | None:
        """The time at which an object first had a state."""
        return next((one.at for one in list(self.sightings) if what(one.item)), None)

    def first_version(self, what: Callable[[Object], bool]) -> int | None:
        """The same as a resource version (etcd's revision), which orders objects of all kinds. Each kind has its own
        watch, and on a busy machine their events arrive out of order."""
        return next(
            (int(one.item["metadata"]["resourceVersion"]) for one in list(self.sightings) if what(one.item)), None
        )


class Volume:
    """The files of the claim, read through a pod that mounts it. Works on any cluster."""

    POD = "files"

    def __init__(self, space: Space) -> None:
        self.space = space

    def create(self, storage_class: str = STORAGE_CLASS, modes: tuple[str, ...] = ("ReadWriteMany",)) -> None:
        self.space.api.create(CLAIMS, claim(CLAIM, storage_class, modes))

    def pod(self) -> str:
        """The pod; created again after a drain has evicted it."""
        found = self.space.get("pod", self.POD)
        if found is not None and (is_over(found) or "deletionTimestamp" in found["metadata"]):
            self.space.kubectl("delete", "pod", self.POD, "--ignore-not-found", "--grace-period=1")
            found = None
        if found is None:
            self.space.api.create(PODS, files_pod(self.POD))
        if found is None or not condition(found, "Ready"):
            self.space.wait(f"the pod {self.POD}", lambda: condition(self.space.get("pod", self.POD) or {}, "Ready"))
        return self.POD

    def run(self, script: str, check: bool = True) -> str:
        return self.space.kubectl("exec", self.pod(), "--", "sh", "-c", script, check=check)

    def read(self, path: str) -> str:
        return self.run(f"cat {path}")

    def manifest(self, run: str, stage: str) -> Object:
        found: Object = json.loads(self.read(f"runs/{run}/stages/{stage}.json"))
        return found

    def exists(self, path: str) -> bool:
        return self.run(f"test -e {path} && echo yes || true").strip() == "yes"

    def copy_in(self, *files: Path) -> None:
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as tar:
            for file in files:
                tar.add(file, arcname=file.name)
        command = [*self.space.base, "exec", "-i", self.pod(), "--", "tar", "-xf", "-", "--no-same-owner"]
        subprocess.run(command, input=archive.getvalue(), check=True, capture_output=True)

    def copy_out(self, path: str, folder: Path) -> Path:
        """The path of a file in a folder of the volume."""
        tar_out = ["tar", "-cf", "-", "-C", str(Path(path).parent), Path(path).name]
        done = subprocess.run([*self.space.base, "exec", self.pod(), "--", *tar_out], check=True, capture_output=True)
        with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
            tar.extractall(folder, filter="data")
        return folder / Path(path).name


class Space:
    """A namespace for one test that enforces Pod Security `restricted`. Its API is asked from this process: a kubectl
    for each question takes a sixth of a second of a core."""

    living: ClassVar[list[Space]] = []  # shown when a test fails

    def __init__(self, name: str, enforce: str = "restricted") -> None:
        self.name = name
        self.base = ["kubectl", "--namespace", name]
        self.api = api.connect(name, patience=5)
        labels = {"pod-security.kubernetes.io/enforce": enforce}
        self.api.create(NAMESPACES, {"metadata": {"name": name, "labels": labels}})
        self.wait("the default service account", lambda: self.get("serviceaccount", "default"))
        self.history = History(name)
        self.volume = Volume(self)
        self.clients: list[Client] = []
        Space.living.append(self)

    def remove(self) -> None:
        """Delete everything, including cluster-scoped objects, without grace periods."""
        Space.living.remove(self)
        for one in self.clients:
            one.kill()
        self.history.close()
        for kind in CLUSTER_WIDE:
            for name in map(name_of, self.api.list(kind)):
                if name.startswith(f"{self.name}."):
                    self.api.delete(kind, name)
        at_once = ["--wait=false", "--grace-period=0", "--force"]
        self.kubectl("delete", "pytorchjobs,trainjobs,jobs,pods", "--all", *at_once, check=False)
        self.api.delete(NAMESPACES, self.name)

    # --- objects

    def kubectl(self, *arguments: str, check: bool = True, text: str | None = None) -> str:
        done = run([*self.base, *arguments], text=text)
        assert not check or done.status == 0, f"kubectl {' '.join(arguments)}: {done.output}"
        return done.output

    def apply(self, *objects: Object) -> None:
        self.kubectl("apply", "-f", "-", text=yaml.safe_dump_all(objects))

    def get(self, kind: str, name: str) -> Object | None:
        """An object, or None."""
        return self.api.get(KINDS[kind], name)

    def list(self, kind: str, selector: str = "") -> list[Object]:
        return self.api.list(KINDS[kind], labels=selector)

    def pods(self, release: str, component: str = "") -> list[Object]:
        """The objects of a release that have not ended."""
        selector = f"{INSTANCE}={release}" + (f",app.kubernetes.io/component={component}" if component else "")
        return [pod for pod in self.list("pods", selector) if not is_over(pod)]

    def log(self, what: str, *options: str) -> str:
        return self.kubectl("logs", what, *options, check=False)

    # --- waiting

    def wait(
        self, what: str, happens: Callable[[], Found | None], seconds: float = PATIENCE, interval: float = 0.5
    ) -> Found:
        """Wait until ``happens`` returns a true value, and return it."""
        ends = time.monotonic() + seconds
        while True:
            if found := happens():
                return found
            if time.monotonic() > ends:
                raise AssertionError(f"{what}: not within {seconds:.0f} s\n{self.describe()}")
            time.sleep(interval)

    def wait_for_training(self, release: str, workers: int = 2, stage: str = "train") -> list[Object]:
        """The running worker pods of a stage, once all of them run."""

        def all_run() -> list[Object] | None:
            running = [pod for pod in self.pods(release, stage) if pod["status"].get("phase") == "Running"]
            return running if len(running) == workers else None

        return self.wait(f"{workers} {stage} pods of {release}", all_run)

    def never(self, what: str, happens: Callable[[], object], seconds: float) -> None:
        """Check that ``happens`` stays false for ``seconds``."""
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            assert not happens(), f"{what}\n{self.describe()}"
            time.sleep(0.5)

    def describe(self) -> str:
        """The state of the namespace, for the report of a failed test."""
        parts = [self.kubectl("get", "pytorchjobs,trainjobs,jobs,pods,pvc", "-o", "wide", check=False)]
        parts += [self.kubectl("get", "events", "--sort-by=.lastTimestamp", check=False)[-4000:]]
        for pod in self.list("pods"):
            log = self.kubectl("logs", name_of(pod), "--all-containers", "--tail=15", check=False)
            parts.append(f"--- {name_of(pod)} ({pod['status'].get('phase')})\n{log}")
        parts += [f"--- client\n{one.output[-3000:]}" for one in self.clients]
        return "\n".join(parts)

    # --- releases

    def release(self, helm: int = 3, name: str = "llama", chart: Path = CHART) -> Release:
        return Release(self, helm, name, chart)


class Release:
    """One release, managed with one version of Helm."""

    def __init__(self, space: Space, helm: int, name: str, chart: Path) -> None:
        self.space = space
        self.name = name
        self.helm = helm
        self.chart = chart

    @property
    def instance(self) -> str:
        return f"{INSTANCE}={self.name}"

    def command(self, *arguments: str) -> list[str]:
        return [str(helm_program(self.helm)), *arguments, "--namespace", self.space.name]

    def __call__(self, *arguments: str, seconds: float = PATIENCE) -> Ended:
        """Run Helm and wait for it."""
        return self.start(*arguments).wait(seconds)

    def start(self, *arguments: str) -> Client:
        started = Client(self.command(*arguments), dict(os.environ))
        self.space.clients.append(started)
        return started

    @contextmanager
    def values_file(self, values: Values) -> Iterator[str]:
        with tempfile.NamedTemporaryFile("w", suffix=".yaml", delete=False) as file:  # read later
            yaml.safe_dump(values, file)
        yield file.name

    def install(self, values: Values, *options: str, status: int | None = 0, seconds: float = PATIENCE) -> Ended:
        return self._checked(self.start_install(values, *options).wait(seconds), status)

    def upgrade(self, values: Values, *options: str, status: int | None = 0, seconds: float = PATIENCE) -> Ended:
        return self._checked(self.start_upgrade(values, *options).wait(seconds), status)

    def start_install(self, values: Values, *options: str) -> Client:
        return self._start("install", values, *options)

    def start_upgrade(self, values: Values, *options: str) -> Client:
        return self._start("upgrade", values, *options)

    def _start(self, verb: str, values: Values, *options: str) -> Client:
        with self.values_file(values) as file:
            return self.start(verb, self.name, str(self.chart), "--values", file, "--timeout", "20m", *options)

    def uninstall(self) -> None:
        self._checked(self("uninstall", self.name, "--timeout", "3m"), 0)

    def _checked(self, ended: Ended, status: int | None) -> Ended:
        if status is not None and ended.status != status:
            raise AssertionError(f"helm ended with {ended.status}:\n{ended.output}\n{self.space.describe()}")
        return ended

    @property
    def state(self) -> str:
        """Helm's status: deployed, failed, pending-install, ..."""
        shown = self("status", self.name, "--output", "json")
        return json.loads(shown.output)["info"]["status"] if shown.status == 0 else "none"


# --- reading


BEFORE = {
    "tokenize": ["preflight"],
    "compile-gate": ["tokenize"],
    "compile": ["tokenize"],
    "train-gate": ["compile", "compile-gate"],
    "train": ["compile", "compile-gate"],
    "consolidate": ["train", "train-gate"],
    "merge": ["consolidate"],
    "evaluate": ["merge"],
}


def stages_in_order(history: History, without: Collection[str] = ()) -> None:
    """Check that no pod of a stage existed before the stages before it had succeeded, job and gate."""

    def first_pod(stage: str) -> int | None:
        return history.first_version(lambda item: item["kind"] == "Pod" and is_stage(item, stage))

    def end(stage: str) -> int | None:
        return history.first_version(lambda item: item["kind"] != "Pod" and is_stage(item, stage) and succeeded(item))

    for stage, stages_before in BEFORE.items():
        for before in stages_before if stage not in without else ():
            made, ended = first_pod(stage), end(before)
            assert made is not None and ended is not None, f"{stage} or {before} was not there"
            assert made >= ended, f"a pod of {stage} was there before {before} had succeeded"


def asking_for_neuron(space: Space, began: float) -> set[str]:
    """The stages that created a pod with devices since."""
    made = [one.item for one in space.history.made_since(began)]
    pods = [item for item in made if item["kind"] == "Pod" and (holds(item, NEURON) or holds(item, EFA))]
    return {component_of(pod) for pod in pods}


def seconds_of_jobs(space: Space, began: float) -> dict[str, float]:
    """Seconds from creation to success of each stage's Job that was created since."""
    jobs = [one for one in space.history.made_since(began) if one.item["kind"] == "Job"]
    made = [one for one in jobs if component_of(one.item)]  # a TrainJob has one of its own
    sightings = list(space.history.sightings)
    ended = {one.item["metadata"]["uid"]: one.at for one in reversed(sightings) if succeeded(one.item)}
    seconds = {component_of(one.item): ended[one.item["metadata"]["uid"]] - one.at for one in made}
    return {stage: took for stage, took in seconds.items() if not stage.startswith("cleanup")}


def skipping(space: Space, upgrade: Callable[[], object], within: float = 5.0, times: int = 3) -> dict[str, float]:
    """Seconds that each stage's Job takes when nothing has changed: the minimum over several upgrades, or fewer if all
    are fast enough. The minimum leaves out what else the machine was doing."""
    quickest: dict[str, float] = {}
    for _ in range(times):
        began = time.monotonic()
        upgrade()
        for stage, took in seconds_of_jobs(space, began).items():
            quickest[stage] = min(took, quickest.get(stage, took))
        if all(seconds <= within for seconds in quickest.values()):
            break
    return quickest


def is_stage(item: Object, stage: str) -> bool:
    return annotations_of(item).get(STAGE) == stage or labels_of(item).get("app.kubernetes.io/component") == stage


def succeeded(job: Object) -> bool:
    return bool(condition(job, "Complete") or condition(job, "Succeeded"))


def holds(pod: Object, resource: str) -> int:
    """The number of devices that the pod's containers request."""
    limits = (container.get("resources", {}).get("limits", {}) for container in pod["spec"]["containers"])
    return sum(int(limit.get(resource, 0)) for limit in limits)


def node_of(pod: Object) -> str:
    return str(pod["spec"]["nodeName"])


def uids(pods: list[Object]) -> set[str]:
    return {pod["metadata"]["uid"] for pod in pods}


@contextmanager
def node_labels(labels: dict[str, str | None]) -> Iterator[None]:
    """Give every node these labels for a while, or take them away (None)."""
    before = json.loads(run(["kubectl", "get", "nodes", "-o", "json"]).output)["items"] if labels else []

    def label(node: str, wanted: dict[str, str | None]) -> None:
        changes = [f"{key}-" if value is None else f"{key}={value}" for key, value in wanted.items()]
        labelled = run(["kubectl", "label", "node", node, "--overwrite", *changes])
        assert labelled.status == 0, labelled.output

    try:
        for node in before:
            label(name_of(node), labels)
        yield
    finally:
        for node in before:
            label(name_of(node), {key: labels_of(node).get(key) for key in labels})


def run(command: list[str], text: str | None = None) -> Ended:
    began = time.monotonic()
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False, timeout=600)
    output = done.stdout if done.returncode == 0 else done.stdout + done.stderr
    return Ended(done.returncode, output, time.monotonic() - began)


def claim(name: str, storage_class: str, modes: tuple[str, ...]) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": name},
        "spec": {
            "accessModes": list(modes),
            "resources": {"requests": {"storage": "1Gi"}},
            "storageClassName": storage_class,
        },
    }


def files_pod(name: str, claim_name: str = CLAIM) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name},
        "spec": {
            "terminationGracePeriodSeconds": 1,
            "automountServiceAccountToken": False,
            "securityContext": {"runAsNonRoot": True, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [
                {
                    "name": "files",
                    "image": STAND_IN_IMAGE,
                    "command": ["sleep", "infinity"],
                    "workingDir": "/workspace",
                    "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                    "volumeMounts": [{"name": "work", "mountPath": "/workspace"}],
                }
            ],
            "volumes": [{"name": "work", "persistentVolumeClaim": {"claimName": claim_name}}],
        },
    }


def connect() -> None:
    config.load_kube_config()
