"""The chart's preflight from outside the cluster: the same checks with the same findings, before there is a release.

The stage reads its configuration from a ConfigMap. These checks read it from the chart, rendered with the run's values.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genvalues.accelerators.neuron_software import release_of_sdk
from genvalues.cluster import kinds
from genvalues.cluster import preflight as stage
from genvalues.cluster.api import Api, connect
from genvalues.cluster.config import ClusterConfig
from genvalues.cluster.kinds import CHECK_ADDRESS, ApiError, NotAllowed, Object, ServerAway
from genvalues.cluster.preflight import PreflightTimings
from genvalues.cluster.workloads.probe import probe_of
from genvalues.common.dicts import get
from genvalues.common.errors import UserError
from genvalues.common.findings import Finding
from genvalues.common.helm import render
from genvalues.common.rendered_yaml import load_rendered
from genvalues.ops.preflight.node_images import check_driver_from_outside
from genvalues.ops.registries import TAG

PATIENCE_SECONDS = 8.0
SDK = re.compile(r"-sdk(\d+\.\d+\.\d+)-")  # in the tags of AWS's containers
DEFAULT_CLASS = "storageclass.kubernetes.io/is-default-class"
WITHOUT_NAMESPACE = (
    "training operator",
    "storage",
    "Hugging Face token",
    "devices",
    stage.DRIVER,
)  # useful before it exists


def check_cluster(
    chart: Path,
    values: dict[str, Any],
    release: str,
    namespace: str | None = None,
    context: str | None = None,
    offline: bool = False,
    timings: PreflightTimings | None = None,
) -> list[Finding]:
    """All findings about the cluster. A cluster that cannot be reached is one finding.

    Raises UserError if Helm cannot render the chart.
    """
    if offline:
        return [Finding("not checked", subject, "--offline") for subject in stage.CHECKS]
    deadline = time.monotonic() + stage.BUDGET_SECONDS
    try:
        api = connect(namespace, context=context, patience=PATIENCE_SECONDS, interval=1.0, deadline=deadline)
    except UserError as error:
        look = f"kubectl config get-contexts{f' {context}' if context else ''}"
        return [Finding("not checked", "cluster", error.what, f"{look}   # or KUBECONFIG=FILE", unanswered=True)]
    try:
        namespace_exists = api.get(kinds.NAMESPACES, api.namespace) is not None
    except ServerAway as error:
        return [in_context(Finding("not checked", "cluster", error.message, "kubectl cluster-info", True), context)]
    except ApiError as error:
        if error.status == 401:
            log_in = "kubectl auth whoami   # on EKS: aws eks update-kubeconfig --name CLUSTER, and AWS credentials"
            return [in_context(Finding("not checked", "cluster", "you are not logged in (401)", log_in), context)]
        if error.status < 400:  # a redirect, e.g. to a login page
            found = f"{error.message}. {CHECK_ADDRESS}"
            return [in_context(Finding("not checked", "cluster", found, "kubectl cluster-info"), context)]
        namespace_exists = True  # not allowed to read it: the checks find out
    objects = render(chart, release, values, api.namespace)
    runtime = expected_runtime(values)
    findings = check_for_objects(api, objects, namespace_exists, timings or PreflightTimings(), runtime)
    return [in_context(finding, context) for finding in findings]


def expected_runtime(values: dict[str, Any]) -> str:
    """The Neuron runtime of the default base image; empty if the backend has none.

    An image that was built with another runtime says so where it runs: in the stages preflight, compile and train.
    """
    sdk = SDK.search(TAG) if get(values, "backend", str) == "xla" else None
    release = release_of_sdk(sdk[1]) if sdk else None
    return release.runtime if release else ""


def check_for_objects(
    api: Api, objects: list[Object], namespace_exists: bool, timings: PreflightTimings, runtime: str = ""
) -> list[Finding]:
    """The findings for a release that consists of these objects. ``runtime``: the image's Neuron runtime, if known."""
    # The caller's own permissions count here, not those that the release gives its stage.
    config = config_of(objects).model_copy(update={"cluster_scoped_reads": True})
    checks: dict[str, stage.Check] = {
        **stage.CHECKS,
        "storage": lambda api, config, timings: check_storage_before_install(api, config, timings, objects),
        stage.DRIVER: lambda api, config, _: check_driver_from_outside(api, config, runtime),
    }
    if namespace_exists:
        return stage.preflight(api, config, timings, checks)
    create = f"kubectl create namespace {api.namespace}"
    if config.storage_prepare:
        create += f" && kubectl label namespace {api.namespace} {stage.ENFORCED}=baseline"
    missing = Finding("error", f"namespace {api.namespace}", "not found", create)
    remaining: Mapping[str, stage.Check] = {
        subject: check_operator_installed if subject == "training operator" else checks[subject]
        for subject in WITHOUT_NAMESPACE
    }
    return [missing, *stage.preflight(api, config, timings, remaining)]


def config_of(objects: list[Object]) -> ClusterConfig:
    """The stage's configuration, from the rendered ConfigMap.

    Revision 0, which Helm never assigns, gives the probe a name that differs from the stage's: both can run at once.
    """
    for item in objects:
        text = (item.get("data") or {}).get("cluster.yaml") if item.get("kind") == "ConfigMap" else None
        if text:
            return ClusterConfig.model_validate({**load_rendered(text), "revision": 0})
    fix = "Use the chart of the same version as genvalues."
    raise UserError("has no ConfigMap with cluster.yaml", where="the chart", fix=fix)


def check_storage_before_install(
    api: Api, config: ClusterConfig, timings: PreflightTimings, objects: list[Object]
) -> list[Finding]:
    """The claim, as the stage checks it. For a claim that install will create: what provisions it."""
    if not config.claim.managed or api.get(kinds.CLAIMS, config.claim.name) is not None:
        return stage.check_storage(api, config, timings)
    created = Finding("ok", f"claim {config.claim.name}", "does not exist yet: install creates it")
    claim = next((one for one in objects if one.get("kind") == "PersistentVolumeClaim"), {})
    spec = claim.get("spec") or {}
    in_chart = {one["metadata"]["name"] for one in objects if one.get("kind") == "StorageClass"}
    name = spec.get("storageClassName")
    if spec.get("volumeName") or name in in_chart:
        return [created]
    try:
        return [created, stage.check_storage_class(api, config, name) if name else check_default_class(api)]
    except NotAllowed as error:
        subject = f"storage class {name}" if name else "storage class"
        return [created, Finding("not checked", subject, error.message, "kubectl get storageclass")]


def check_default_class(api: Api) -> Finding:
    subject = "storage class"
    classes = api.list(kinds.STORAGE_CLASSES)
    default = [one for one in classes if (one["metadata"].get("annotations") or {}).get(DEFAULT_CLASS) == "true"]
    if not default:
        found = "the claim names none, and the cluster has no default class"
        return Finding("error", subject, found, "kubectl get storageclass   # then storage.storageClass")
    return Finding("ok", subject, f"{default[0]['metadata']['name']}, the default")


def check_operator_installed(api: Api, config: ClusterConfig, timings: PreflightTimings) -> list[Finding]:
    """Whether the API has the workload's kind. Without a namespace, no probe can show that its controller runs."""
    probe = probe_of(config)
    if not probe.is_served(api):
        return [stage.not_served(api, config, probe)]
    found = (
        f"{probe.workload.name} is served; whether the operator runs can only be tested in namespace {api.namespace}"
    )
    return [Finding("not checked", probe.subject, found, f"kubectl create namespace {api.namespace}")]


def in_context(finding: Finding, context: str | None) -> Finding:
    """The finding with the context added to its kubectl and Helm commands."""
    if not context:
        return finding
    fix = re.sub(r"\bkubectl (?!config )", f"kubectl --context {context} ", finding.fix)
    fix = re.sub(r"\bhelm (?=upgrade|install)", f"helm --kube-context {context} ", fix)
    return Finding(finding.level, finding.subject, finding.found, fix, finding.unanswered)
