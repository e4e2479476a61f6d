"""The training operators, Trainer with JobSet, and Kueue: from the manifests and charts in their Go modules.

CRDs, permissions and webhooks are unchanged, but for Kueue's webhooks, which select the namespaces of its tests.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from helm_binaries import helm_binary

from . import images
from .binaries import (
    JOBSET_MODULE,
    JOBSETS,
    KUEUE,
    KUEUE_MODULE,
    OPERATORS,
    TRAINER_MODULE,
    TRAINERS,
    module_folder,
)
from .node import kubectl

Objects = list[dict[str, Any]]

MODULE = "github.com/kubeflow/training-operator"
# Webhooks that some versions lack, and so do not answer.
WEBHOOKS = [
    ("ValidatingWebhookConfiguration", "validator.training-operator.kubeflow.org"),
    ("MutatingWebhookConfiguration", "defaulter.trainer.kubeflow.org"),
]
NAMESPACE = "kubeflow"
NAMESPACES = [NAMESPACE, "jobset-system", "kubeflow-system"]  # without Kueue's
OF_TRAINER = {
    "2.0": ("trainer-2.0/trainer-controller-manager", "trainer-2.0/jobset"),
    "2.2": ("kueue/trainer-controller-manager", "jobset"),
}
# Kueue's webhooks reject jobs and pods while it restarts: those of other namespaces do not ask it.
USES_KUEUE = {"tests.llama-lora/kueue": "yes"}
FRAMEWORKS = ["batch/job", "jobset.x-k8s.io/jobset", "kubeflow.org/pytorchjob", "trainer.kubeflow.org/trainjob"]
IN_A_NAMESPACE = {"ConfigMap", "Deployment", "Role", "RoleBinding", "Secret", "Service", "ServiceAccount"}
USER = 65532  # the images of the tests set none, as theirs do


def install_all() -> None:
    """Install the newest of each in parallel."""
    apply_operator("1.9")
    apply_trainer("2.2")
    apply_kueue(FRAMEWORKS)
    wait_for(*NAMESPACES, "kueue-system")


def install(minor: str) -> None:
    """Install this version of the training operator, or replace another one, and wait until it runs."""
    apply_operator(minor)
    wait_for(NAMESPACE)


def install_trainer(minor: str) -> None:
    apply_trainer(minor)
    wait_for("jobset-system", "kubeflow-system")


def install_kueue(frameworks: Collection[str]) -> None:
    """Install Kueue with these integrations, and wait until it runs."""
    apply_kueue(frameworks)
    wait_for("kueue-system")


def apply_operator(minor: str) -> None:
    source = module_folder(MODULE, OPERATORS[minor]) / "manifests"
    with writable(source) as folder:
        objects = loaded(kubectl("kustomize", folder / "overlays/standalone"))
    replace_webhook(WEBHOOKS[0], objects)
    apply(NAMESPACE, objects, images.manager(f"training-operator-{minor}"))


def apply_trainer(minor: str) -> None:
    """With JobSet, which the chart has as a dependency in a registry."""
    of_trainer, of_jobset = (images.manager(name) for name in OF_TRAINER[minor])
    jobset = module_folder(JOBSET_MODULE, JOBSETS[minor]) / "charts/jobset"
    apply("jobset-system", rendered(jobset, "jobset", "jobset-system"), of_jobset)
    with writable(module_folder(TRAINER_MODULE, TRAINERS[minor]) / "charts/kubeflow-trainer") as chart:
        file = chart / "Chart.yaml"
        file.write_text(file.read_text().partition("\ndependencies:")[0])
        objects = rendered(chart, "trainer", "kubeflow-system", "--set", "jobset.install=false")
    replace_webhook(WEBHOOKS[1], objects)
    apply("kubeflow-system", objects, of_trainer)


def apply_kueue(frameworks: Collection[str]) -> None:
    chart = module_folder(KUEUE_MODULE, KUEUE) / "charts/kueue"
    objects = rendered(chart, "kueue", "kueue-system", "--set", "enableKueueViz=false,controllerManager.replicas=1")
    # While Kueue restarts, its API service would not answer, and discovery would fail: that of Helm, too.
    objects = [item for item in objects if item["kind"] != "APIService"]
    for item in objects:
        for webhook in item.get("webhooks", []) if item["kind"].endswith("WebhookConfiguration") else []:
            if not any("kueue.x-k8s.io" in rule["apiGroups"] for rule in webhook["rules"]):
                webhook["namespaceSelector"] = {"matchLabels": USES_KUEUE}
        if item["metadata"]["name"] == "kueue-manager-config":
            [(name, text)] = item["data"].items()
            settings = yaml.safe_load(text)
            settings["integrations"]["frameworks"] = list(frameworks)
            item["data"][name] = yaml.safe_dump(settings)
    apply("kueue-system", objects, images.manager("kueue/kueue"))


def replace_webhook(webhook: tuple[str, str], objects: Objects) -> None:
    """Delete this webhook of another version if the objects do not have it."""
    if webhook not in [(item["kind"], item["metadata"]["name"]) for item in objects]:
        kubectl("delete", *webhook, "--ignore-not-found")


def apply(namespace: str, objects: Objects, image: str) -> None:
    """Apply the objects with an image of the tests, and with settings for one replica on a small node."""
    kubectl("create", "namespace", namespace, check=False)
    settings = ""
    for item in objects:
        if item["kind"] == "ConfigMap":  # a manager that restarts would wait for the lease of the one before
            item["data"] = {name: no_election(text) for name, text in item["data"].items()}
            settings += str(item["data"])
    for item in objects:
        if item["kind"] == "Deployment":
            item["spec"]["strategy"] = {"type": "Recreate"}
            template = item["spec"]["template"]
            annotations = template["metadata"].setdefault("annotations", {})
            annotations["tests.llama-lora/settings"] = hashlib.sha256(settings.encode()).hexdigest()[:12]
            template["spec"]["securityContext"] = {**template["spec"].get("securityContext", {}), "runAsUser": USER}
            [container] = template["spec"]["containers"]
            container |= {"image": image, "imagePullPolicy": "IfNotPresent"}
            container["resources"] = {"requests": {"cpu": "10m", "memory": "32Mi"}}
            if "readinessProbe" in container:
                container["readinessProbe"] |= {"initialDelaySeconds": 1, "periodSeconds": 1}
        if item["kind"] in IN_A_NAMESPACE:
            item["metadata"].setdefault("namespace", namespace)
    everything = json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})
    kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", text=everything)


def no_election(text: str) -> str:
    return text.replace("leaderElect: true", "leaderElect: false")


def wait_for(*namespaces: str) -> None:
    for namespace in namespaces:
        kubectl("--namespace", namespace, "rollout", "status", "deployment", "--timeout=180s")


def rendered(chart: Path, name: str, namespace: str, *options: str) -> Objects:
    command = [helm_binary(4), "template", name, chart, "--namespace", namespace, "--include-crds", *options]
    return loaded(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def loaded(text: str) -> Objects:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # CRDs are megabytes
    return [item for item in yaml.load_all(text, loader) if item]


@contextmanager
def writable(source: Path) -> Iterator[Path]:
    """A copy: the module cache is read-only."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(source, Path(folder) / source.name))
        subprocess.run(["chmod", "-R", "u+w", copy], check=True)
        yield copy
