"""Check whether the cluster is ready for this release: all findings at once, each with a fix, within 30 seconds.

The preflight pod mounts neither the claim nor the Secret, so it starts and reports them when they are missing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from genvalues.accelerators.instances import HYPERPOD, NEURON
from genvalues.accelerators.neuron_software import driver_of_node, mismatch
from genvalues.cluster import kinds
from genvalues.cluster.api import Api, whole_number
from genvalues.cluster.config import ClusterConfig, SecretReference
from genvalues.cluster.kinds import ApiError, NotAllowed, Object, ServerAway
from genvalues.cluster.objects import condition, labels_of, last_seen, name_of, phase_of
from genvalues.cluster.queueing import kueue_api, workload_of_kueue
from genvalues.cluster.workloads.probe import PROBES, Probe, metadata, probe_of
from genvalues.common.findings import Finding
from genvalues.common.neuron_files import runtime_version

DRIVER = "Neuron driver"  # subject of its findings
OTHER_RUNTIME = (
    "genvalues image push finetune.yaml --neuron-runtime 2.33.10.0   # or use other nodes: docs/neuron-xla.md#drivers"
)
BUDGET_SECONDS = 25.0  # findings come within 30 s; the Job's deadline of 600 s is for pulling its image
INSTANCE_TYPE = "node.kubernetes.io/instance-type"
RESTART_KUEUE = "kubectl -n kueue-system rollout restart deployment kueue-controller-manager"
ENFORCED = "pod-security.kubernetes.io/enforce"
NODE_HEALTH = "sagemaker.amazonaws.com/node-health-status"
DEVICE_PLUGINS = {
    NEURON: "helm upgrade --install neuron-helm-chart oci://public.ecr.aws/neuron/neuron-helm-chart",
    "vpc.amazonaws.com/efa": "helm upgrade --install aws-efa-k8s-device-plugin aws-efa-k8s-device-plugin"
    " --repo https://aws.github.io/eks-charts -n kube-system",
}


@dataclass(frozen=True)
class PreflightTimings:
    """How long the checks wait for controllers, in seconds."""

    interval: float = 1.0  # between two looks
    claim: float = 17.0  # a running provisioner has emitted an event by then; for static volumes see check_storage
    operator: float = 10.0  # a running operator sets a condition on a new job within one second
    workload: float = 15.0  # Kueue makes a Workload within one second, on a busy node within six (measured)


Check = Callable[[Api, ClusterConfig, PreflightTimings], list[Finding]]


def preflight(
    api: Api,
    config: ClusterConfig,
    timings: PreflightTimings = PreflightTimings(),
    checks: Mapping[str, Check] | None = None,
) -> list[Finding]:
    """Run the checks (default: CHECKS) in parallel and return all findings, in the order of the checks."""
    wanted = CHECKS if checks is None else checks
    with ThreadPoolExecutor(len(wanted)) as pool:
        found = pool.map(lambda subject: run_check(subject, wanted[subject], api, config, timings), wanted)
        return [finding for findings in found for finding in findings]


def run_check(subject: str, check: Check, api: Api, config: ClusterConfig, timings: PreflightTimings) -> list[Finding]:
    """Run one check. If it is not allowed to read, or gets no answer, the finding is "not checked"."""
    try:
        return check(api, config, timings)
    except NotAllowed as error:
        look = "auth whoami" if error.status == 401 else f"-n {api.namespace} get rolebindings -o wide"
        return [Finding("not checked", subject, error.message, f"kubectl {look}")]
    except ServerAway as error:
        return [Finding("not checked", subject, error.message, "kubectl get --raw /readyz", unanswered=True)]
    except ApiError as error:
        return [Finding("not checked", subject, f"the API server returned {error.status}: {error.message}")]


def check_operator(api: Api, config: ClusterConfig, timings: PreflightTimings) -> list[Finding]:
    """Check that the kind of the workload exists and that its controller reconciles it.

    The controller may run in a namespace that this account cannot read. So the check creates a suspended job, which
    never gets a pod: a running controller sets a condition on it within a second.
    """
    probe = probe_of(config)
    if not probe.is_served(api):
        return [not_served(api, config, probe)]
    try:
        name = probe.create(api, config, "preflight")
        seen = wait_until(lambda: is_reconciled(api, probe, name), timings.operator, timings.interval)
    except ServerAway as error:
        if "webhook" not in error.message:
            raise
        if "kueue" in error.message:
            return [Finding("error", probe.subject, f"Kueue's webhook does not answer: {error.message}", RESTART_KUEUE)]
        seen = False
    except NotAllowed as error:
        found = f"{probe.workload.name} is served; cannot test the operator: {error.message}"
        return [Finding("not checked", probe.subject, found)]
    finally:
        delete_probe(api, probe, config, "preflight")
    if seen:
        return [Finding("ok", probe.subject, f"installed, and reconciles {probe.workload.name}s")]
    found = f"{probe.workload.name} is served, but no operator reconciled a test job within {timings.operator:.0f} s"
    return [Finding("error", probe.subject, found, probe.restart)]


def not_served(api: Api, config: ClusterConfig, probe: Probe) -> Finding:
    """The finding for a workload that the cluster lacks. If it has the other one, the fix is to use that."""
    found = f"not installed: the API server does not serve {probe.workload.name}"
    other = next(other for other in PROBES if other is not probe)
    if not other.is_served(api):
        return Finding("error", probe.subject, found, probe.install)
    fix = (
        f"helm upgrade --install {config.release} CHART -n {config.namespace} --reset-then-reuse-values"
        f" --set workload={other.workload.setting}   # in an inputs file: workload: {other.workload.setting}"
    )
    return Finding("error", probe.subject, f"{found}, but {other.workload.name} of {other.subject}", fix)


def is_reconciled(api: Api, probe: Probe, name: str) -> bool:
    job = api.get(probe.workload.kind, name)
    return bool(job and job.get("status", {}).get("conditions"))


def delete_probe(api: Api, probe: Probe, config: ClusterConfig, purpose: str) -> None:
    """Delete the probe. If that fails, cleanup or the next preflight deletes it."""
    with suppress(ApiError):
        probe.workload.delete(api, metadata(config, purpose)["name"])


def check_storage(api: Api, config: ClusterConfig, timings: PreflightTimings) -> list[Finding]:
    """Check the claim, and its storage class while it has no volume.

    The check does not wait the 10 minutes that a new FSx file system takes: the stages that mount the claim wait for it
    anyway, and hold no Trainium node meanwhile. It waits ``timings.claim``, because a static volume that is created
    together with its claim is often bound only at the volume controller's next resync, 15 s later (measured).
    """
    claim = api.get(kinds.CLAIMS, config.claim.name)
    if claim is None:
        return [missing_claim(api, config)]
    events: list[Object] = []
    deadline = time.monotonic() + timings.claim
    while not is_settled(claim, events) and time.monotonic() < deadline:
        time.sleep(timings.interval)
        claim = api.get(kinds.CLAIMS, config.claim.name)
        if claim is None:
            return [missing_claim(api, config)]
        events = events_of(api, claim)
    findings = [judge_claim(claim, events, config)]
    storage_class = claim["spec"].get("storageClassName")
    if storage_class and phase_of(claim) == "Pending":
        findings.append(check_storage_class(api, config, storage_class))
    return findings


def missing_claim(api: Api, config: ClusterConfig) -> Finding:
    subject = f"claim {config.claim.name}"
    found = f"PersistentVolumeClaim not found in namespace {config.namespace}"
    if config.claim.managed:
        fix = (
            f"helm upgrade {config.release} CHART -n {config.namespace} --reset-then-reuse-values   # creates it again"
        )
        return Finding("error", subject, found, fix)
    try:
        names = sorted(name_of(claim) for claim in api.list(kinds.CLAIMS))
    except NotAllowed:
        names = []
    there = f" (existing claims: {', '.join(names)})" if names else ""
    return Finding(
        "error", subject, found + there, f"kubectl -n {config.namespace} get pvc   # then set storage.existingClaim"
    )


def is_settled(claim: Object, events: list[Object]) -> bool:
    """Whether waiting longer cannot change the finding.

    Neither a provisioning failure nor its start is final: a volume may follow the one, and a failure the other.
    """
    return phase_of(claim) != "Pending" or any(event["reason"] == "WaitForFirstConsumer" for event in events)


def events_of(api: Api, item: Object) -> list[Object]:
    """The events of this object (by uid, so not of an earlier one of the same name), latest first."""
    meta = item["metadata"]
    fields = f"involvedObject.name={meta['name']},involvedObject.uid={meta['uid']}"
    found = api.list(kinds.EVENTS, fields=fields)
    # Times are in whole seconds: of a start and a failure in the same second, the failure is later.
    return sorted(found, key=lambda event: (last_seen(event), event["reason"] == "ProvisioningFailed"), reverse=True)


def judge_claim(claim: Object, events: list[Object], config: ClusterConfig) -> Finding:
    subject = f"claim {name_of(claim)}"
    describe = f"kubectl -n {config.namespace} describe pvc {name_of(claim)}"
    if claim["metadata"].get("deletionTimestamp"):
        return Finding("error", subject, "is being deleted", describe)
    if phase_of(claim) == "Lost":
        return Finding(
            "error", subject, f"Lost: its volume {claim['spec'].get('volumeName', '')} no longer exists", describe
        )
    if problem := judge_access(claim, config):
        return problem
    if phase_of(claim) == "Bound":
        size = claim.get("status", {}).get("capacity", {}).get("storage", "")
        return Finding("ok", subject, f"Bound {size}".rstrip())
    return judge_pending(subject, claim, events, describe)


def judge_access(claim: Object, config: ClusterConfig) -> Finding | None:
    modes = set(claim["spec"].get("accessModes") or [])
    if "ReadWriteMany" in modes:
        return None
    subject = f"claim {name_of(claim)}"
    found = f"access mode {', '.join(sorted(modes)) or 'none'}"
    fix = "genvalues write finetune.yaml -o values.yaml   # with storage that supports ReadWriteMany, e.g. kind: fsx"
    if config.job.nodes > 1 or not modes & {"ReadWriteOnce"}:
        return Finding(
            "error", subject, f"{found}: {config.job.nodes} nodes and the gate must mount it at the same time", fix
        )
    if phase_of(claim) == "Bound":
        return Finding(
            "warning", subject, f"Bound, {found}: every stage must run on the node that mounts the volume", fix
        )
    return None


def judge_pending(subject: str, claim: Object, events: list[Object], describe: str) -> Finding:
    # Kubernetes repeats "ExternalProvisioning" until a provisioner handles the claim, so prefer any other event.
    informative = [event for event in events if event["reason"] != "ExternalProvisioning"]
    latest = next(iter(informative or events), None)
    if latest is None and (volume := claim["spec"].get("volumeName")):
        found = f"Pending: not yet bound to its volume {volume}; the next stage waits for it"
        return Finding("warning", subject, found, f"kubectl describe pv {volume}")
    if latest is None:
        return Finding("warning", subject, "Pending; no events yet", describe)
    reason, message = latest["reason"], " ".join(latest.get("message", "").split())
    if reason == "WaitForFirstConsumer":
        return Finding("ok", subject, "Pending until its first pod starts (volumeBindingMode WaitForFirstConsumer)")
    # The FSx driver takes about 10 minutes. Meanwhile its calls time out and are retried.
    if reason == "Provisioning" or (reason == "ProvisioningFailed" and "DeadlineExceeded" in message):
        found = "Pending: its volume is being created (about 10 minutes for FSx); the next stage waits for it"
        return Finding("warning", subject, found, f"{describe}   # give helm a longer --timeout")
    if reason == "ExternalProvisioning":
        storage_class = claim["spec"].get("storageClassName", "")
        found = f"Pending: no provisioner handles it: {message}"
        return Finding("error", subject, found, f"kubectl get csidrivers; kubectl get storageclass {storage_class}")
    return Finding("error", subject, f"Pending: {reason}: {message}", describe)


def check_storage_class(api: Api, config: ClusterConfig, name: str) -> Finding:
    subject = f"storage class {name}"
    if not config.cluster_scoped_reads:
        return not_read(subject, f"kubectl get storageclass {name}")
    found = api.get(kinds.STORAGE_CLASSES, name)
    if found is None:
        return Finding("error", subject, "not found", "kubectl get storageclass   # then set storage.storageClass")
    return Finding("ok", subject, f"provisioner {found.get('provisioner')}")


def not_read(subject: str, look: str) -> Finding:
    """What a release without the ClusterRole of preflight says of a cluster-scoped object."""
    found = f"rbac.clusterScopedReads is false. Check: {look}"
    return Finding("not checked", subject, found)


def check_pod_security(api: Api, config: ClusterConfig, timings: PreflightTimings) -> list[Finding]:
    """Check that the namespace admits storage-prepare's pod, which runs as root: only `restricted` rejects it.

    Otherwise the rejection would be only an event of the Job, which fails at its deadline 40 minutes later.
    """
    if not config.storage_prepare:
        return []
    subject = f"namespace {config.namespace}"
    namespace = api.get(kinds.NAMESPACES, config.namespace)
    level = labels_of(namespace).get(ENFORCED) if namespace else None
    if level == "restricted":
        found = "enforces Pod Security restricted, which rejects the pod of storage-prepare because it runs as root"
        relabel = f"kubectl label namespace {config.namespace} {ENFORCED}=baseline --overwrite"
        disable = "if the stages' user already owns the volume's root folder, set storage.prepare.enabled: false"
        return [Finding("error", subject, found, f"{relabel}   # or, {disable}")]
    if level:
        return [Finding("ok", subject, f"enforces Pod Security {level}, which allows storage-prepare to run as root")]
    return [Finding("ok", subject, "no label enforces Pod Security")]


def check_secret(api: Api, config: ClusterConfig, timings: PreflightTimings) -> list[Finding]:
    """Check that the Secrets exist and have the keys: the token's, and those of publish and monitoring."""
    others = [finding for wanted in config.other_secrets for finding in check_one_secret(api, config, wanted)]
    if config.secret is None:
        return [Finding("ok", "Hugging Face token", "none configured"), *others]
    return [*check_one_secret(api, config, config.secret), *others]


def check_one_secret(api: Api, config: ClusterConfig, wanted: SecretReference) -> list[Finding]:
    """Check one Secret: that it exists, and has the key that is asked for, if any. Its values are never printed."""
    subject = f"secret {wanted.name}"
    value = f"--from-file={wanted.key or 'NAME'}=/dev/stdin"
    create = f"kubectl -n {config.namespace} create secret generic {wanted.name} {value}"
    secret = api.get(kinds.SECRETS, wanted.name)
    if secret is None:
        return [Finding("error", subject, f"Secret not found in namespace {config.namespace}", create)]
    data = secret.get("data") or {}
    if not wanted.key:
        return [Finding("ok", subject, f"has the keys {', '.join(sorted(data)) or '(none)'}")]
    if not data.get(wanted.key):
        has = f"existing keys: {', '.join(sorted(data))}" if data else "the Secret has no keys"
        state = "is empty" if wanted.key in data else f"is missing ({has})"
        again = f"kubectl -n {config.namespace} delete secret {wanted.name}; {create}"
        return [Finding("error", subject, f"key {wanted.key} {state}", again)]
    return [Finding("ok", subject, f"has key {wanted.key}")]


def check_devices(api: Api, config: ClusterConfig, timings: PreflightTimings) -> list[Finding]:
    job = config.job
    if not job.devices:
        return [Finding("ok", "devices", "none requested")]
    if not config.cluster_scoped_reads:
        return [not_read("devices", f"kubectl get nodes -l {INSTANCE_TYPE}={job.instance} -o yaml")]
    bare = job.instance.removeprefix(HYPERPOD)
    other = bare if job.instance != bare else f"{HYPERPOD}{bare}"
    nodes = api.list(kinds.NODES, labels=f"{INSTANCE_TYPE} in ({job.instance},{other})")
    return judge_nodes([node for node in nodes if labels_of(node)[INSTANCE_TYPE] == job.instance], nodes, config)


def judge_nodes(nodes: list[Object], near: list[Object], config: ClusterConfig) -> list[Finding]:
    """``nodes`` have the requested instance type; ``near`` includes its variant with or without HyperPod's ``ml.``."""
    job = config.job
    look = f"kubectl get nodes -L {INSTANCE_TYPE}"
    subject = f"nodes {job.instance}"
    if not nodes and near:
        there = labels_of(near[0])[INSTANCE_TYPE]
        fix = "genvalues write finetune.yaml -o values.yaml --set instance=" + there
        return [Finding("error", subject, f"none, but {len(near)} of type {there}", fix)]
    if not nodes:
        # Not an error: a node group may be scaled to zero, and an unchanged upgrade needs no accelerator.
        found = f"none at the moment; train waits {config.train.unschedulable_timeout_seconds:.0f} s for an autoscaler"
        return [Finding("warning", subject, found, look)]
    usable = [node for node in nodes if is_usable(node)]
    findings = [judge_device(name, count, usable, config) for name, count in sorted(job.devices.items())]
    if sum(workers_that_fit(node, job.devices) for node in usable) < job.nodes and len(usable) < job.nodes:
        found = f"{len(usable)} of {len(nodes)} are ready and schedulable, {job.nodes} needed"
        grows = any("karpenter.sh/nodepool" in labels_of(node) for node in nodes)
        findings.insert(0, Finding("warning" if grows else "error", subject, found, look))
    return findings


def is_usable(node: Object) -> bool:
    healthy = labels_of(node).get(NODE_HEALTH, "Schedulable") == "Schedulable"
    return bool(condition(node, "Ready")) and not node["spec"].get("unschedulable") and healthy


def workers_that_fit(node: Object, devices: dict[str, int]) -> int:
    """How many workers fit on the node by its devices. Devices that it lacks are ignored: they have a finding each."""
    fit = [there // count for name, count in devices.items() if (there := allocatable(node, name))]
    return min(fit, default=1)


def allocatable(node: Object, resource: str) -> int:
    return whole_number((node.get("status", {}).get("allocatable") or {}).get(resource, 0))


def judge_device(resource: str, count: int, nodes: list[Object], config: ClusterConfig) -> Finding:
    most = max((allocatable(node, resource) for node in nodes), default=0)
    enough = sum(allocatable(node, resource) >= count for node in nodes)
    needed = min(config.job.nodes, len(nodes))  # too few nodes is one finding, not one for each device
    if enough >= needed and nodes:
        return Finding("ok", resource, f"{count} on each of {enough} nodes of type {config.job.instance}")
    if not nodes:
        return Finding("not checked", resource, f"no node of type {config.job.instance} is ready")
    if most == 0:
        found = f"no node of type {config.job.instance} offers it: its device plugin is not running"
        look = f"kubectl get nodes -l {INSTANCE_TYPE}={config.job.instance} -o yaml"
        return Finding("error", resource, found, DEVICE_PLUGINS.get(resource, look))
    found = (
        f"{count} per node needed on {config.job.nodes} nodes; {enough} of {len(nodes)} have that many (most: {most})"
    )
    fix = f"kubectl describe nodes -l {INSTANCE_TYPE}={config.job.instance}   # then change instance, nodes or devices"
    return Finding("error", resource, found, fix)


def check_driver_for(
    runtime: str, api: Api, config: ClusterConfig, driver_of: Callable[[Object], str]
) -> list[Finding]:
    """Check that the nodes' driver accepts the runtime of the image. Without a runtime there is nothing to compare.

    ``driver_of``: the driver of a node, empty if unknown. Without nodes there is no finding: check_devices says so.
    """
    if not runtime or NEURON not in config.job.devices:
        return []
    selector = f"{INSTANCE_TYPE}={config.job.instance}"
    if not config.cluster_scoped_reads:
        return [not_read(DRIVER, f"kubectl get nodes -l {selector} -o wide   # then docs/neuron-xla.md#drivers")]
    nodes = api.list(kinds.NODES, labels=selector)
    return judge_drivers({name_of(node): driver_of(node) for node in nodes}, runtime) if nodes else []


def driver_of(node: Object) -> str:
    """The Neuron driver of a node, as its operating system tells it; empty if unknown.

    Nothing that a node reports names the driver. HyperPod's AMIs have drivers of their own.
    """
    if labels_of(node).get(INSTANCE_TYPE, "").startswith(HYPERPOD):
        return ""
    return driver_of_node(str(node.get("status", {}).get("nodeInfo", {}).get("osImage", "")))


def judge_drivers(drivers: Mapping[str, str], runtime: str) -> list[Finding]:
    """``drivers``: the driver of each node, empty if unknown.

    A mismatch is a warning, because an AMI only suggests the driver; compile and train check it on their node.
    """
    refused = {node: wrong for node, driver in drivers.items() if (wrong := mismatch(driver, runtime))}
    if refused:
        node, (what, works) = next(iter(refused.items()))
        found = (
            f"{len(refused)} of {len(drivers)} nodes have driver {drivers[node]} by their AMI, which {what}; {works}"
        )
        return [Finding("warning", DRIVER, found, OTHER_RUNTIME)]
    if unknown := [node for node, driver in drivers.items() if not driver]:
        look = f"kubectl debug node/{unknown[0]} -it --image=busybox -- cat /sys/module/neuron/version"
        found = f"unknown on {len(unknown)} of {len(drivers)} nodes; the image has Neuron runtime {runtime}"
        return [Finding("not checked", DRIVER, found, f"{look}   # then docs/neuron-xla.md#drivers")]
    versions = ", ".join(sorted(set(drivers.values())))
    return [Finding("ok", DRIVER, f"{versions} by the nodes' AMI, which accepts the image's runtime {runtime}")]


def check_quota(api: Api, config: ClusterConfig, timings: PreflightTimings) -> list[Finding]:
    """Check that the namespace's quotas allow the requested devices."""
    if not config.job.devices:
        return []
    findings = []
    for quota in api.list(kinds.QUOTAS):
        status = quota.get("status", {})
        for resource, count in config.job.devices.items():
            key = f"requests.{resource}"
            if key not in (status.get("hard") or {}):
                continue
            hard = whole_number(status["hard"][key])
            used = whole_number((status.get("used") or {}).get(key, 0))
            findings.append(
                judge_resource_quota(name_of(quota), resource, hard, used, count * config.job.nodes, api.namespace)
            )
    return findings


def judge_resource_quota(quota: str, resource: str, hard: int, used: int, needed: int, namespace: str) -> Finding:
    subject = f"quota {quota}"
    look = f"kubectl -n {namespace} describe resourcequota {quota}"
    if needed > hard:
        return Finding("error", subject, f"allows {hard} {resource}, {needed} needed", look)
    if needed > hard - used:
        return Finding("warning", subject, f"{used} of {hard} {resource} in use now, {needed} needed", look)
    return Finding("ok", subject, f"{hard - used} {resource} free, {needed} needed")


def check_queue(api: Api, config: ClusterConfig, timings: PreflightTimings) -> list[Finding]:
    """Check that Kueue manages the workload, and that the queues and the priority class exist."""
    devices, cpu = config.job.queue_name, config.job.cpu_queue_name
    if not devices and not cpu:
        return []
    kueue = kueue_api(api)
    if kueue is None:
        fix = "kubectl get crds | grep kueue   # or set kueue.queueName and kueue.cpuQueueName: ''"
        return [Finding("error", f"queue {devices or cpu}", "Kueue is not installed", fix)]
    findings = check_local_queue(api, config, kueue, cpu, []) if cpu not in {"", devices} else []
    if not devices:
        return findings
    return [
        *check_local_queue(api, config, kueue, devices, [*config.job.devices]),
        *findings,
        check_integration(api, config, timings, kueue),
        *check_priority_class(api, config, kueue),
    ]


def check_local_queue(
    api: Api, config: ClusterConfig, kueue: str, name: str, resources: Sequence[str]
) -> list[Finding]:
    """The LocalQueue, whose condition also tells whether its ClusterQueue exists and is active."""
    subject, look = f"queue {name}", f"kubectl -n {config.namespace} describe localqueue {name}"
    queue = api.get(kinds.Kind(kueue, "localqueues"), name)
    if queue is None:
        found = f"LocalQueue not found in namespace {config.namespace}"
        return [Finding("error", subject, found, f"kubectl -n {config.namespace} get localqueues")]
    of_cluster = str(queue.get("spec", {}).get("clusterQueue", ""))
    states = queue.get("status", {}).get("conditions") or []
    inactive = [one for one in states if one["type"] == "Active" and one["status"] == "False"]
    if inactive:
        found = f"not active: {inactive[0].get('reason')}: {inactive[0].get('message', '')} (ClusterQueue {of_cluster})"
        return [Finding("error", subject, found, f"{look}; kubectl describe clusterqueue {of_cluster}")]
    ok = Finding("ok", subject, f"exists, of ClusterQueue {of_cluster}" if of_cluster else "exists")
    if not of_cluster or not resources:
        return [ok]
    return [ok, check_cluster_queue(api, config, kueue, of_cluster, resources)]


def check_cluster_queue(api: Api, config: ClusterConfig, kueue: str, name: str, resources: Sequence[str]) -> Finding:
    """Whether the ClusterQueue has quotas for these resources: without one Kueue never admits the job."""
    subject, look = f"ClusterQueue {name}", f"kubectl get clusterqueue {name} -o yaml"
    if not config.cluster_scoped_reads:
        return not_read(subject, look)
    try:
        queue = api.get(kinds.Kind(kueue, "clusterqueues", namespaced=False), name)
    except NotAllowed as error:
        return Finding("not checked", subject, error.message, look)
    groups = (queue or {}).get("spec", {}).get("resourceGroups") or []
    covered = {resource for group in groups for resource in group.get("coveredResources") or []}
    if lacking := [resource for resource in resources if resource not in covered]:
        found = f"has no quota for {', '.join(lacking)}; without one Kueue does not admit the job"
        fix = f"{look}   # then resourceGroups[].coveredResources, or excludeResourcePrefixes in Kueue's configuration"
        return Finding("warning", subject, found, fix)
    return Finding("ok", subject, f"has quotas for {', '.join(resources)}")


def check_integration(api: Api, config: ClusterConfig, timings: PreflightTimings, kueue: str) -> Finding:
    """Whether Kueue makes a Workload for a job of this kind. It leaves kinds alone whose integration is off (Kueue 0.19
    has PyTorchJob off by default): such a job stays suspended forever, without an event.
    """
    probe = probe_of(config)
    subject = f"Kueue for {probe.workload.name}"
    if not probe.is_served(api):
        return Finding("not checked", subject, f"the API server does not serve {probe.workload.name}")
    try:
        name = probe.create(api, config, "queue")
        uid = (api.get(probe.workload.kind, name) or {"metadata": {}})["metadata"].get("uid", "")
        made = wait_until(lambda: workload_of_kueue(api, kueue, uid) is not None, timings.workload, timings.interval)
    except (NotAllowed, ServerAway) as error:
        away = isinstance(error, ServerAway)
        return Finding("not checked", subject, f"cannot test it: {error.message}", unanswered=away)
    finally:
        delete_probe(api, probe, config, "queue")
    if made:
        return Finding("ok", subject, f"makes a Workload for a {probe.workload.name}")
    found = (
        f"made no Workload for a test {probe.workload.name} within {timings.workload:.0f} s, so the job would stay"
        " suspended: its integration is off, or Kueue does not manage this namespace, or is not running"
    )
    fix = (
        f"kubectl -n kueue-system edit configmap kueue-manager-config   # add {probe.workload.integration} to"
        f" integrations.frameworks, then {RESTART_KUEUE}; or set kueue.queueName: ''"
    )
    return Finding("error", subject, found, fix)


def check_priority_class(api: Api, config: ClusterConfig, kueue: str) -> list[Finding]:
    name = config.job.priority_class
    if not name:
        return []
    subject, look = f"priority class {name}", f"kubectl get workloadpriorityclass {name}"
    if not config.cluster_scoped_reads:
        return [not_read(subject, look)]
    try:
        found = api.get(kinds.Kind(kueue, "workloadpriorityclasses", namespaced=False), name)
    except NotAllowed as error:
        return [Finding("not checked", subject, error.message, look)]
    if found is None:
        fix = "kubectl get workloadpriorityclasses   # then set kueue.priorityClass"
        return [Finding("error", subject, "WorkloadPriorityClass not found", fix)]
    return [Finding("ok", subject, f"value {found.get('value')}")]


def wait_until(happens: Callable[[], bool], seconds: float, interval: float) -> bool:
    deadline = time.monotonic() + seconds
    while not happens():
        if time.monotonic() >= deadline:
            return False
        time.sleep(interval)
    return True


# Checks of the chart's preflight stage. `genvalues preflight` runs them too (ops/preflight/cluster_checks.py).
CHECKS: dict[str, Check] = {
    "training operator": check_operator,
    "storage": check_storage,
    "pod security": check_pod_security,
    "Hugging Face token": check_secret,
    "devices": check_devices,
    DRIVER: lambda api, config, _: check_driver_for(runtime_version(), api, config, driver_of),
    "quota": check_quota,
    "queue": check_queue,
}
