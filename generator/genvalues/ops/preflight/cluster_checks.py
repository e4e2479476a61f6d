"""The chart's preflight from outside: the same checks in the same words, before there is a release.

What the stage reads from its ConfigMap is read here from the chart, rendered for these values.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from genvalues.cluster import api as kinds
from genvalues.cluster import preflight as inside
from genvalues.cluster.api import Api, ApiError, NotAllowed, Object, ServerAway, connect
from genvalues.cluster.config import ClusterConfig
from genvalues.cluster.preflight import PreflightTimings
from genvalues.common.errors import UserError
from genvalues.common.findings import Finding

PATIENCE_SECONDS = 8.0
DEFAULT_CLASS = "storageclass.kubernetes.io/is-default-class"
# Of a namespace that is not there these have something to say all the same.
WITHOUT_NAMESPACE = ("training operator", "storage", "Hugging Face token", "devices")


def check_cluster(
    chart: Path,
    values: dict[str, Any],
    release: str,
    namespace: str | None = None,
    context: str | None = None,
    offline: bool = False,
    pace: PreflightTimings | None = None,
) -> list[Finding]:
    """Raises UserError where Helm cannot render the chart. A cluster that is away is one finding."""
    if offline:
        return [Finding("not checked", subject, "--offline") for subject in inside.CHECKS]
    deadline = time.monotonic() + inside.BUDGET_SECONDS
    try:
        api = connect(namespace, context=context, patience=PATIENCE_SECONDS, interval=1.0, deadline=deadline)
    except UserError as error:
        look = f"kubectl config get-contexts{f' {context}' if context else ''}"
        return [Finding("not checked", "cluster", error.what, f"{look}   # or KUBECONFIG=FILE", unanswered=True)]
    try:
        there = namespace_is_there(api)
    except ServerAway as error:
        return [in_context(Finding("not checked", "cluster", error.message, "kubectl cluster-info", True), context)]
    except ApiError as error:
        if error.status == 401:
            log_in = "kubectl auth whoami   # on EKS: aws eks update-kubeconfig --name CLUSTER, and AWS credentials"
            return [in_context(Finding("not checked", "cluster", "does not know who you are (401)", log_in), context)]
        there = True  # not allowed to read it: the checks show
    objects = rendered(chart, release, values, api.namespace)
    return [in_context(finding, context) for finding in from_outside(api, objects, there, pace or PreflightTimings())]


def namespace_is_there(api: Api) -> bool:
    return api.get(kinds.NAMESPACES, api.namespace) is not None


def rendered(chart: Path, release: str, values: dict[str, Any], namespace: str) -> list[Object]:
    from genvalues.common.helm import render

    return render(chart, release, values, namespace)


def from_outside(api: Api, objects: list[Object], namespace_there: bool, pace: PreflightTimings) -> list[Finding]:
    """All findings about the cluster, of a release that these objects are of."""
    config = config_of(objects)
    checks: dict[str, inside.Check] = {
        **inside.CHECKS,
        "storage": lambda api, config, pace: check_storage(api, config, pace, objects),
    }
    if namespace_there:
        return inside.preflight(api, config, pace, checks)
    create = f"kubectl create namespace {api.namespace}"
    if config.storage_prepare:
        create += f" && kubectl label namespace {api.namespace} {inside.ENFORCED}=baseline"
    found = Finding("error", f"namespace {api.namespace}", "there is no such namespace", create)
    left: Mapping[str, inside.Check] = {
        subject: check_kind if subject == "training operator" else checks[subject] for subject in WITHOUT_NAMESPACE
    }
    return [found, *inside.preflight(api, config, pace, left)]


def config_of(objects: list[Object]) -> ClusterConfig:
    """cluster.yaml, as the chart's ConfigMap has it. Its revision is none that Helm gives, so that the probe here has
    another name than the stage's, which may be at work on the same cluster."""
    for item in objects:
        text = (item.get("data") or {}).get("cluster.yaml") if item.get("kind") == "ConfigMap" else None
        if text:
            return ClusterConfig.model_validate({**yaml.safe_load(text), "revision": 0})
    raise UserError("has no ConfigMap with cluster.yaml", where="the chart", fix="Give the chart of this version.")


def check_storage(api: Api, config: ClusterConfig, pace: PreflightTimings, objects: list[Object]) -> list[Finding]:
    """The claim as the stage sees it; one that install makes, and that is not there yet, by what will provide it."""
    if not config.claim.managed or api.get(kinds.CLAIMS, config.claim.name) is not None:
        return inside.check_storage(api, config, pace)
    made = Finding("ok", f"claim {config.claim.name}", "is not there yet: install makes it")
    claim = next((one for one in objects if one.get("kind") == "PersistentVolumeClaim"), {})
    spec = claim.get("spec") or {}
    ours = {one["metadata"]["name"] for one in objects if one.get("kind") == "StorageClass"}
    name = spec.get("storageClassName")
    if spec.get("volumeName") or name in ours:
        return [made]
    try:
        return [made, inside.check_storage_class(api, config, name) if name else check_default_class(api, config)]
    except NotAllowed as error:
        subject = f"storage class {name}" if name else "storage class"
        return [made, Finding("not checked", subject, error.message, "kubectl get storageclass")]


def check_default_class(api: Api, config: ClusterConfig) -> Finding:
    subject = "storage class"
    if not config.cluster_scoped_reads:
        return inside.not_read(subject, "kubectl get storageclass")
    classes = api.list(kinds.STORAGE_CLASSES)
    default = [one for one in classes if (one["metadata"].get("annotations") or {}).get(DEFAULT_CLASS) == "true"]
    if not default:
        found = "the claim names none, and the cluster has no default"
        return Finding("error", subject, found, "kubectl get storageclass   # then storage.storageClass")
    return Finding("ok", subject, f"{default[0]['metadata']['name']}, the default")


def check_kind(api: Api, config: ClusterConfig, pace: PreflightTimings) -> list[Finding]:
    """The operator's kind alone: without the namespace there is no place for a test job."""
    subject = "training operator"
    if not inside.serves_pytorchjob(api):
        return [Finding("error", subject, "the API server does not know the kind PyTorchJob", inside.INSTALL_OPERATOR)]
    found = f"the kind PyTorchJob is known; whether it runs can be tried in namespace {api.namespace} alone"
    return [Finding("not checked", subject, found, f"kubectl create namespace {api.namespace}")]


def in_context(finding: Finding, context: str | None) -> Finding:
    """The same finding, its kubectl and Helm commands for the cluster that was asked."""
    if not context:
        return finding
    fix = re.sub(r"\bkubectl (?!config )", f"kubectl --context {context} ", finding.fix)
    fix = re.sub(r"\bhelm (?=upgrade|install)", f"helm --kube-context {context} ", fix)
    return Finding(finding.level, finding.subject, finding.found, fix, finding.unanswered)
