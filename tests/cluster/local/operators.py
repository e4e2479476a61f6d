"""The Kubeflow training operator, from its own manifests in the Go module."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

import yaml

from . import images
from .binaries import OPERATORS, module_folder
from .node import kubectl

MODULE = "github.com/kubeflow/training-operator"
NAMESPACE = "kubeflow"


def install(minor: str) -> None:
    """Install this version of the operator, or replace another one, and wait until it runs."""
    kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", text=manifests(minor))
    kubectl("-n", NAMESPACE, "rollout", "status", "deployment/training-operator", "--timeout=120s")


def manifests(minor: str) -> str:
    """The manifests with the image of the tests. Webhooks and CRDs are unchanged."""
    source = module_folder(MODULE, OPERATORS[minor]) / "manifests"
    with tempfile.TemporaryDirectory() as folder:  # a copy: the module cache is read-only
        overlay = Path(folder)
        subprocess.run(["cp", "-r", f"{source}/.", folder], check=True)
        subprocess.run(["chmod", "-R", "u+w", folder], check=True)
        built = kubectl("kustomize", overlay / "overlays/standalone")
    objects = [item for item in yaml.safe_load_all(built) if item]
    for item in objects:
        if item["kind"] == "Deployment":
            item["spec"]["strategy"] = {"type": "Recreate"}
            container = item["spec"]["template"]["spec"]["containers"][0]
            container |= {"image": images.operator(minor), "imagePullPolicy": "IfNotPresent"}
    return yaml.safe_dump_all(objects)
