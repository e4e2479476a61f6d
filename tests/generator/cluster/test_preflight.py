"""preflight with a fake API server: all findings at once, each with a fix, and never a Secret's value."""

from __future__ import annotations

import base64
import time
from typing import Any

import pytest

from generator.cluster.fake_api import NAMESPACE, FakeApi, now
from genvalues.cluster.api import Api, connect
from genvalues.cluster.config import ClusterConfig
from genvalues.cluster.preflight import PreflightTimings, preflight
from genvalues.common.findings import Finding

Object = dict[str, Any]
QUICK = PreflightTimings(interval=0.02, claim=0.2, operator=0.3, workload=0.3)
TOKEN = base64.b64encode(b"hf_secret_value").decode()
ENFORCED = "pod-security.kubernetes.io/enforce"
INSTANCE_TYPE = "node.kubernetes.io/instance-type"


def mark_probe(fake: FakeApi) -> None:
    """Act as a running operator."""
    fake.after.append(
        ("create", "pytorchjobs", lambda item: fake.set_condition("pytorchjobs", item["metadata"]["name"], "Suspended"))
    )


def node(
    name: str, *, instance: str = "ml.trn1.32xlarge", neuron: int = 16, efa: int = 8, ready: str = "True"
) -> Object:
    allocatable = {"cpu": "119", "aws.amazon.com/neuron": str(neuron), "vpc.amazonaws.com/efa": str(efa)}
    return {
        "metadata": {"name": name, "labels": {INSTANCE_TYPE: instance}},
        "spec": {},
        "status": {"allocatable": allocatable, "conditions": [{"type": "Ready", "status": ready}]},
    }


def claim(
    phase: str = "Bound", *, storage_class: str = "fsx-sc", modes: tuple[str, ...] = ("ReadWriteMany",)
) -> Object:
    return {
        "metadata": {"name": "demo-workspace"},
        "spec": {"accessModes": list(modes), "storageClassName": storage_class},
        "status": {"phase": phase, "capacity": {"storage": "1200Gi"}},
    }


def namespace(level: str) -> Object:
    """A namespace that enforces this Pod Security level; empty: none."""
    return {"metadata": {"name": NAMESPACE, "labels": {ENFORCED: level} if level else {}}}


def add_event(fake: FakeApi, about: Object, reason: str, message: str, *, at: str = "") -> None:
    meta = about["metadata"]
    involved = {"name": meta["name"], "uid": meta["uid"]}
    event = {"reason": reason, "message": message, "lastTimestamp": at or now(), "involvedObject": involved}
    fake.add("events", {"metadata": {"name": f"event-{len(fake.objects)}"}, **event})


@pytest.fixture
def ready(fake: FakeApi) -> FakeApi:
    """A cluster with everything the release needs."""
    mark_probe(fake)
    fake.add("persistentvolumeclaims", claim())
    fake.add("secrets", {"metadata": {"name": "hf-token"}, "data": {"token": TOKEN}})
    fake.add("namespaces", namespace("baseline"))
    for name in ("node-1", "node-2"):
        fake.add("nodes", node(name))
    fake.add("storageclasses", {"metadata": {"name": "fsx-sc"}, "provisioner": "fsx.csi.aws.com"})
    return fake


def check(api: Api, config: ClusterConfig) -> list[Finding]:
    return preflight(api, config, QUICK)


def problems(api: Api, config: ClusterConfig) -> list[Finding]:
    return [finding for finding in check(api, config) if finding.level != "ok"]


def one_problem(api: Api, config: ClusterConfig) -> Finding:
    found = problems(api, config)
    assert len(found) == 1, [str(finding) for finding in found]
    return found[0]


def again(fake: FakeApi, plural: str, item: Object) -> Object:
    fake.remove(plural, item["metadata"]["name"])
    return fake.add(plural, item)


def test_a_cluster_with_everything_has_no_problem(ready: FakeApi, api: Api, config: ClusterConfig) -> None:
    findings = check(api, config)
    assert {finding.level for finding in findings} == {"ok"}
    assert len(findings) == 6
    assert ready.names("pytorchjobs") == [], "the probe is deleted"


def test_everything_missing_is_found_at_once_with_fixes_within_seconds(
    fake: FakeApi, api: Api, config: ClusterConfig
) -> None:
    fake.crds = set()
    fake.add("nodes", node("node-1", neuron=0, efa=0))
    started = time.monotonic()
    errors = [finding for finding in check(api, config) if finding.level == "error"]
    assert time.monotonic() - started < 5
    assert [finding.subject for finding in errors] == [
        "training operator",
        "claim demo-workspace",
        "secret hf-token",
        "nodes ml.trn1.32xlarge",
        "aws.amazon.com/neuron",
        "vpc.amazonaws.com/efa",
    ]
    assert all(finding.fix for finding in errors)
    assert "device plugin is not running" in errors[4].found and "neuron-helm-chart" in errors[4].fix


def test_an_operator_that_is_not_running_is_an_error_although_its_crd_exists(
    ready: FakeApi, api: Api, config: ClusterConfig
) -> None:
    ready.after.clear()
    finding = one_problem(api, config)
    assert (finding.level, finding.subject) == ("error", "training operator")
    assert "no operator reconciled" in finding.found
    assert ready.names("pytorchjobs") == []


def test_an_operator_whose_webhook_does_not_answer_is_an_error(ready: FakeApi, config: ClusterConfig) -> None:
    ready.failing["create"] = 'failed calling webhook "validator.pytorchjob": connection refused'
    impatient = connect(NAMESPACE, patience=0.1, interval=0.02)
    assert (one_problem(impatient, config).level, one_problem(impatient, config).subject) == (
        "error",
        "training operator",
    )


def test_the_probe_is_suspended_so_it_never_gets_a_pod(ready: FakeApi, api: Api, config: ClusterConfig) -> None:
    probes: list[Object] = []
    ready.after.append(("create", "pytorchjobs", probes.append))
    check(api, config)
    assert [probe["spec"]["runPolicy"]["suspend"] for probe in probes] == [True]


def test_a_wrong_claim_name_lists_the_existing_claims(ready: FakeApi, api: Api, values: Object) -> None:
    values["claim"] = {"name": "wrokspace", "managed": False}
    finding = one_problem(api, ClusterConfig.model_validate(values))
    assert finding.level == "error"
    assert "(existing claims: demo-workspace)" in finding.found


def test_a_claim_that_waits_for_its_first_consumer_is_ok(ready: FakeApi, api: Api, config: ClusterConfig) -> None:
    pending = again(ready, "persistentvolumeclaims", claim("Pending"))
    add_event(ready, pending, "WaitForFirstConsumer", "waiting for first consumer to be created before binding")
    assert problems(api, config) == []


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        ("Provisioning", "External provisioner is provisioning volume for claim"),
        ("ProvisioningFailed", "rpc error: code = DeadlineExceeded desc = context deadline exceeded"),
    ],
)
def test_an_fsx_claim_that_is_being_provisioned_is_no_error(
    ready: FakeApi, api: Api, config: ClusterConfig, reason: str, message: str
) -> None:
    pending = again(ready, "persistentvolumeclaims", claim("Pending"))
    add_event(ready, pending, reason, message, at="2025-01-01T00:00:00Z")
    add_event(ready, pending, "ExternalProvisioning", "Waiting for a volume")  # an event that Kubernetes repeats
    finding = one_problem(api, config)
    assert finding.level == "warning"
    assert "10 minutes" in finding.found


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        ("ProvisioningFailed", 'storageclass.storage.k8s.io "fsx-sc" not found'),
        ("FailedBinding", "no persistent volumes available for this claim and no storage class is set"),
        ("ExternalProvisioning", "Waiting for a volume to be created by the external provisioner 'fsx.csi.aws.com'"),
    ],
)
def test_a_claim_that_stays_pending_is_an_error_with_reason_and_fix(
    ready: FakeApi, api: Api, config: ClusterConfig, reason: str, message: str
) -> None:
    pending = again(ready, "persistentvolumeclaims", claim("Pending"))
    add_event(ready, pending, reason, message)
    finding = one_problem(api, config)
    assert finding.level == "error"
    assert message in finding.found and finding.fix.startswith("kubectl")


def test_events_of_an_earlier_claim_of_the_same_name_do_not_count(
    ready: FakeApi, api: Api, config: ClusterConfig
) -> None:
    add_event(ready, ready.objects["persistentvolumeclaims", "demo-workspace"], "ProvisioningFailed", "old")
    again(ready, "persistentvolumeclaims", claim("Pending"))
    assert one_problem(api, config).level == "warning"


def test_a_claim_that_is_not_yet_bound_to_its_static_volume_is_a_warning(
    ready: FakeApi, api: Api, config: ClusterConfig
) -> None:
    """Kubernetes emits no event for it."""
    pending = claim("Pending", storage_class="")
    pending["spec"]["volumeName"] = "fsx"
    again(ready, "persistentvolumeclaims", pending)
    finding = one_problem(api, config)
    assert finding.level == "warning"
    assert "Pending" in finding.found and "volume fsx" in finding.found
    assert finding.fix == "kubectl describe pv fsx"


def test_a_claim_that_is_bound_during_the_check_is_ok(ready: FakeApi, api: Api, config: ClusterConfig) -> None:
    pending = again(ready, "persistentvolumeclaims", claim("Pending"))
    add_event(ready, pending, "FailedBinding", "no persistent volumes available")

    def bind(_: Object) -> None:
        if sum(path.endswith("/demo-workspace") for path in ready.paths) == 3:
            ready.merge("persistentvolumeclaims", "demo-workspace", {"status": {"phase": "Bound"}})

    ready.after.append(("get", "persistentvolumeclaims", bind))
    assert problems(api, config) == []


def test_a_namespace_that_rejects_storage_prepares_pod_is_an_error_with_both_fixes(
    ready: FakeApi, api: Api, config: ClusterConfig
) -> None:
    again(ready, "namespaces", namespace("restricted"))
    finding = one_problem(api, config)
    assert (finding.level, finding.subject) == ("error", f"namespace {NAMESPACE}")
    assert finding.fix.startswith(f"kubectl label namespace {NAMESPACE} {ENFORCED}=baseline --overwrite ")
    assert "storage.prepare.enabled: false" in finding.fix


@pytest.mark.parametrize(("level", "part"), [("baseline", "baseline"), ("privileged", "privileged"), ("", "no label")])
def test_a_namespace_that_admits_storage_prepares_pod_is_ok(
    ready: FakeApi, api: Api, config: ClusterConfig, level: str, part: str
) -> None:
    again(ready, "namespaces", namespace(level))
    [finding] = [one for one in check(api, config) if one.subject.startswith("namespace")]
    assert finding.level == "ok" and part in finding.found


def test_without_storage_prepare_the_namespace_is_not_read(ready: FakeApi, api: Api, values: Object) -> None:
    values["storagePrepare"] = False
    again(ready, "namespaces", namespace("restricted"))
    assert problems(api, ClusterConfig.model_validate(values)) == []
    assert ("get", "namespaces") not in ready.requests


def test_a_storage_class_that_does_not_exist_is_an_error(ready: FakeApi, api: Api, config: ClusterConfig) -> None:
    ready.remove("storageclasses", "fsx-sc")
    pending = again(ready, "persistentvolumeclaims", claim("Pending"))
    add_event(ready, pending, "ProvisioningFailed", 'storageclass.storage.k8s.io "fsx-sc" not found')
    assert [(finding.level, finding.subject) for finding in problems(api, config)] == [
        ("error", "claim demo-workspace"),
        ("error", "storage class fsx-sc"),
    ]


@pytest.mark.parametrize(
    ("nodes", "modes", "level"),
    [(2, "ReadWriteOnce", "error"), (1, "ReadWriteOnce", "warning"), (1, "ReadWriteOncePod", "error")],
)
def test_a_claim_that_not_every_pod_can_mount_is_reported(
    ready: FakeApi, api: Api, values: Object, nodes: int, modes: str, level: str
) -> None:
    values["job"]["nodes"] = nodes
    again(ready, "persistentvolumeclaims", claim(modes=(modes,)))
    assert one_problem(api, ClusterConfig.model_validate(values)).level == level


def test_a_secret_without_the_key_lists_its_keys_and_no_value(ready: FakeApi, api: Api, config: ClusterConfig) -> None:
    again(ready, "secrets", {"metadata": {"name": "hf-token"}, "data": {"HF_TOKEN": TOKEN}})
    finding = one_problem(api, config)
    assert "HF_TOKEN" in finding.found
    everything = "\n".join(map(str, check(api, config)))
    assert TOKEN not in everything and "hf_secret_value" not in everything


@pytest.mark.parametrize(
    ("wanted", "data", "level", "words"),
    [
        ({"name": "writes", "key": "token"}, None, "error", "not found in namespace"),
        ({"name": "writes", "key": "token"}, {"other": TOKEN}, "error", "key token is missing"),
        ({"name": "writes", "key": "token"}, {"token": TOKEN}, "ok", "has key token"),
        ({"name": "keys", "key": ""}, {"WANDB_API_KEY": TOKEN}, "ok", "WANDB_API_KEY"),
        ({"name": "keys", "key": ""}, None, "error", "not found in namespace"),
    ],
)
def test_the_secrets_of_publish_and_monitoring_are_checked(
    ready: FakeApi, api: Api, values: Object, wanted: Object, data: Object | None, level: str, words: str
) -> None:
    if data is not None:
        ready.add("secrets", {"metadata": {"name": wanted["name"]}, "data": data})
    values["otherSecrets"] = [wanted]
    found = preflight(api, ClusterConfig.model_validate(values), QUICK)
    [one] = [finding for finding in found if finding.subject == f"secret {wanted['name']}"]
    assert one.level == level and words in one.found
    assert TOKEN not in str(found)


def test_without_a_secret_no_permission_to_read_secrets_is_needed(ready: FakeApi, api: Api, values: Object) -> None:
    values["secret"] = None
    assert problems(api, ClusterConfig.model_validate(values)) == []
    assert ("get", "secrets") not in ready.requests


def test_without_cluster_scoped_reads_nodes_are_not_checked_and_not_requested(
    ready: FakeApi, api: Api, values: Object
) -> None:
    values["clusterScopedReads"] = False
    pending = again(ready, "persistentvolumeclaims", claim("Pending"))
    add_event(ready, pending, "WaitForFirstConsumer", "waiting")
    found = problems(api, ClusterConfig.model_validate(values))
    assert [(finding.level, finding.subject) for finding in found] == [
        ("not checked", "storage class fsx-sc"),
        ("not checked", "devices"),
    ]
    assert not {resource for _, resource in ready.requests} & {"nodes", "storageclasses.storage.k8s.io"}


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> str:
    """The image has the Neuron runtime of backend xla."""
    monkeypatch.setattr("genvalues.cluster.preflight.runtime_version", lambda: "2.28.23.0")
    return "2.28.23.0"


def on_ec2(fake: FakeApi, values: Object, *os_images: str) -> ClusterConfig:
    """Nodes of trn1.32xlarge with these operating systems."""
    values["job"]["instance"] = "trn1.32xlarge"
    for number, os_image in enumerate(os_images, 1):
        made = node(f"node-{number}", instance="trn1.32xlarge")
        made["status"]["nodeInfo"] = {"osImage": os_image, "kernelVersion": "6.12.94-123.180.amzn2023.x86_64"}
        again(fake, "nodes", made)
    return ClusterConfig.model_validate(values)


def test_nodes_whose_ami_has_a_driver_that_refuses_the_images_runtime_are_a_warning(
    ready: FakeApi, api: Api, values: Object, runtime: str
) -> None:
    config = on_ec2(ready, values, "Amazon Linux 2023.12.20260622", "Amazon Linux 2023.12.20260710")
    finding = one_problem(api, config)
    assert (finding.level, finding.subject) == ("warning", "Neuron driver")
    for words in ("1 of 2 nodes", "driver 2.29", "runtime 2.33", runtime, "v20260625"):
        assert words in finding.found
    assert "--neuron-runtime 2.33" in finding.fix


def test_nodes_whose_ami_has_a_driver_that_accepts_the_runtime_are_ok(
    ready: FakeApi, api: Api, values: Object, runtime: str
) -> None:
    config = on_ec2(ready, values, "Amazon Linux 2023.12.20260622", "Amazon Linux 2023.11.20260413")
    [finding] = [one for one in check(api, config) if one.subject == "Neuron driver"]
    assert finding.level == "ok" and "2.27, 2.28" in finding.found


@pytest.mark.parametrize("os_image", ["Bottlerocket (EKS Auto, Standard) 2026.10.1 (aws-k8s-1.34)", "Amazon Linux 2"])
def test_an_unknown_driver_is_not_checked_and_the_command_shows_it(
    ready: FakeApi, api: Api, values: Object, runtime: str, os_image: str
) -> None:
    finding = one_problem(api, on_ec2(ready, values, os_image, os_image))
    assert (finding.level, finding.subject) == ("not checked", "Neuron driver")
    assert "/sys/module/neuron/version" in finding.fix and "node/node-1" in finding.fix


def test_hyperpods_amis_have_drivers_of_their_own(
    ready: FakeApi, api: Api, config: ClusterConfig, runtime: str
) -> None:
    for name in ("node-1", "node-2"):
        ready.merge("nodes", name, {"status": {"nodeInfo": {"osImage": "Amazon Linux 2023.12.20260710"}}})
    assert one_problem(api, config).level == "not checked"


def test_without_cluster_scoped_reads_the_driver_is_not_checked(
    ready: FakeApi, api: Api, values: Object, runtime: str
) -> None:
    values["clusterScopedReads"] = False
    found = {one.subject: one for one in problems(api, ClusterConfig.model_validate(values))}
    assert found.keys() == {"devices", "Neuron driver"}
    assert "rbac.clusterScopedReads" in found["Neuron driver"].found
    assert ("list", "nodes") not in ready.requests


def test_no_node_of_the_type_is_a_warning_because_an_unchanged_upgrade_needs_none(
    ready: FakeApi, api: Api, config: ClusterConfig
) -> None:
    for name in ("node-1", "node-2"):
        ready.remove("nodes", name)
    assert one_problem(api, config).level == "warning"


def test_an_instance_type_without_hyperpods_prefix_is_reported(ready: FakeApi, api: Api, config: ClusterConfig) -> None:
    for name in ("node-1", "node-2"):
        again(ready, "nodes", node(name, instance="trn1.32xlarge"))
    finding = one_problem(api, config)
    assert finding.level == "error"
    assert "instance=trn1.32xlarge" in finding.fix


def test_too_few_nodes_that_can_take_pods_is_an_error(ready: FakeApi, api: Api, config: ClusterConfig) -> None:
    ready.merge("nodes", "node-2", {"spec": {"unschedulable": True}})
    finding = one_problem(api, config)
    assert finding.level == "error" and finding.found.startswith("1 of 2 ")
    config.job.devices["aws.amazon.com/neuron"], config.job.devices["vpc.amazonaws.com/efa"] = 8, 4
    assert not problems(api, config), "half a node is enough for a worker"
    ready.merge("nodes", "node-1", {"status": {"allocatable": {"aws.amazon.com/neuron": "0"}}})
    assert one_problem(api, config).subject == "aws.amazon.com/neuron", "one finding, without one for the nodes"
    ready.merge("nodes", "node-1", {"status": {"allocatable": {"aws.amazon.com/neuron": "16"}}})
    config.job.devices["aws.amazon.com/neuron"] = 16
    ready.merge("nodes", "node-2", {"metadata": {"labels": {"karpenter.sh/nodepool": "trn"}}})
    assert one_problem(api, config).level == "warning", "an autoscaler adds them"


def test_a_node_that_hyperpod_replaces_is_not_counted(ready: FakeApi, api: Api, config: ClusterConfig) -> None:
    health = {"sagemaker.amazonaws.com/node-health-status": "UnschedulablePendingReplacement"}
    ready.merge("nodes", "node-2", {"metadata": {"labels": health}})
    assert "1 of 2" in one_problem(api, config).found


def test_too_few_devices_on_a_node_report_how_many_nodes_have_enough(
    ready: FakeApi, api: Api, config: ClusterConfig
) -> None:
    again(ready, "nodes", node("node-2", neuron=15))
    finding = one_problem(api, config)
    assert (finding.level, finding.subject) == ("error", "aws.amazon.com/neuron")
    assert "1 of 2 have that" in finding.found


@pytest.mark.parametrize(("hard", "used", "level"), [("16", "0", "error"), ("48", "32", "warning")])
def test_a_quota_that_is_too_small_is_reported(
    ready: FakeApi, api: Api, config: ClusterConfig, hard: str, used: str, level: str
) -> None:
    key = "requests.aws.amazon.com/neuron"
    ready.add("resourcequotas", {"metadata": {"name": "trn"}, "status": {"hard": {key: hard}, "used": {key: used}}})
    assert one_problem(api, config).level == level


@pytest.mark.parametrize(("hard", "used"), [("1k", "968"), ("1Ki", "0"), ("2e3", "1"), ("40000m", "0")])
def test_quotas_are_parsed_as_kubernetes_quantities(
    ready: FakeApi, api: Api, config: ClusterConfig, hard: str, used: str
) -> None:
    key = "requests.aws.amazon.com/neuron"
    ready.add("resourcequotas", {"metadata": {"name": "trn"}, "status": {"hard": {key: hard}, "used": {key: used}}})
    assert problems(api, config) == []


# --- Kueue


class Kueue:
    """Acts as Kueue: makes a Workload for each job in a queue, whether the queue exists or not."""

    def __init__(self, fake: FakeApi, *kinds: str) -> None:
        self.fake = fake
        self.jobs: list[Object] = []
        fake.crds |= {"localqueues"}
        for plural in kinds:
            fake.after.append(("create", plural, self.add_workload))

    def add_workload(self, job: Object) -> None:
        self.jobs.append(job)
        meta = job["metadata"]
        assert meta["labels"]["kueue.x-k8s.io/queue-name"]
        labels = {"kueue.x-k8s.io/job-uid": meta["uid"]}
        self.fake.add("workloads", {"metadata": {"name": f"pytorchjob-{meta['name']}", "labels": labels}})

    def add_queue(self, name: str, *, active: str = "True", reason: str = "Ready") -> None:
        state = {"type": "Active", "status": active, "reason": reason, "message": "Can't submit new workloads"}
        spec = {"clusterQueue": "accelerators"}
        self.fake.add("localqueues", {"metadata": {"name": name}, "spec": spec, "status": {"conditions": [state]}})

    def add_cluster_queue(self, *resources: str) -> None:
        spec = {"resourceGroups": [{"coveredResources": ["cpu", *resources]}]}
        self.fake.add("clusterqueues", {"metadata": {"name": "accelerators"}, "spec": spec})


@pytest.fixture
def in_queue(values: Object) -> Object:
    values["job"] |= {"queueName": "trn", "priorityClass": "high"}
    return values


@pytest.fixture
def kueue(ready: FakeApi) -> Kueue:
    """Kueue with the queue and the priority class, which manages PyTorchJobs."""
    kueue = Kueue(ready, "pytorchjobs")
    kueue.add_queue("trn")
    kueue.add_cluster_queue("aws.amazon.com/neuron", "vpc.amazonaws.com/efa")
    ready.add("workloadpriorityclasses", {"metadata": {"name": "high"}, "value": 1000})
    return kueue


def test_a_queue_that_kueue_admits_jobs_from_is_ok(ready: FakeApi, kueue: Kueue, api: Api, in_queue: Object) -> None:
    found = {one.subject: one for one in check(api, ClusterConfig.model_validate(in_queue))}
    assert {one.level for one in found.values()} == {"ok"}
    assert {"queue trn", "ClusterQueue accelerators", "Kueue for PyTorchJob", "priority class high"} <= found.keys()
    assert ready.names("pytorchjobs") == [], "the probes are deleted"


def test_without_kueue_a_queue_is_an_error(ready: FakeApi, api: Api, in_queue: Object) -> None:
    assert "not installed" in one_problem(api, ClusterConfig.model_validate(in_queue)).found


def test_a_missing_queue_is_an_error(ready: FakeApi, kueue: Kueue, api: Api, in_queue: Object) -> None:
    ready.remove("localqueues", "trn")
    finding = one_problem(api, ClusterConfig.model_validate(in_queue))
    assert (finding.level, finding.subject) == ("error", "queue trn") and "LocalQueue not found" in finding.found


@pytest.mark.parametrize("queue", ["trn", ""])
def test_the_queue_of_the_stages_on_cpu_nodes_must_exist_too(
    ready: FakeApi, kueue: Kueue, api: Api, in_queue: Object, queue: str
) -> None:
    in_queue["job"] |= {"queueName": queue, "cpuQueueName": "cpu"}
    finding = one_problem(api, ClusterConfig.model_validate(in_queue))
    assert (finding.level, finding.subject) == ("error", "queue cpu")
    kueue.add_queue("cpu")
    assert problems(api, ClusterConfig.model_validate(in_queue)) == []


@pytest.mark.parametrize("reason", ["ClusterQueueDoesNotExist", "ClusterQueueIsInactive", "Stopped"])
def test_a_queue_that_is_not_active_is_an_error(
    ready: FakeApi, kueue: Kueue, api: Api, in_queue: Object, reason: str
) -> None:
    ready.remove("localqueues", "trn")
    kueue.add_queue("trn", active="False", reason=reason)
    finding = one_problem(api, ClusterConfig.model_validate(in_queue))
    assert finding.level == "error" and reason in finding.found and "clusterqueue accelerators" in finding.fix


def test_a_cluster_queue_without_quota_for_the_devices_is_a_warning(
    ready: FakeApi, kueue: Kueue, api: Api, in_queue: Object
) -> None:
    ready.remove("clusterqueues", "accelerators")
    kueue.add_cluster_queue("aws.amazon.com/neuron")
    finding = one_problem(api, ClusterConfig.model_validate(in_queue))
    assert finding.level == "warning" and "vpc.amazonaws.com/efa" in finding.found
    assert "neuron" not in finding.found


def test_a_missing_priority_class_is_an_error(ready: FakeApi, kueue: Kueue, api: Api, in_queue: Object) -> None:
    ready.remove("workloadpriorityclasses", "high")
    finding = one_problem(api, ClusterConfig.model_validate(in_queue))
    assert (finding.level, finding.subject) == ("error", "priority class high")


def test_without_cluster_scoped_reads_kueues_cluster_scoped_objects_are_not_checked(
    ready: FakeApi, kueue: Kueue, api: Api, in_queue: Object
) -> None:
    in_queue["clusterScopedReads"] = False
    unseen = {one.subject for one in problems(api, ClusterConfig.model_validate(in_queue))}
    assert unseen == {"devices", "ClusterQueue accelerators", "priority class high"}
    asked = {resource for _, resource in ready.requests if "kueue" in resource}
    assert asked == {"localqueues.kueue.x-k8s.io", "workloads.kueue.x-k8s.io"}


def test_kueue_without_the_integration_is_an_error_that_names_it(
    ready: FakeApi, kueue: Kueue, api: Api, in_queue: Object
) -> None:
    """As Kueue 0.19 does by default: no Workload, no event, and the job stays suspended forever."""
    ready.after = [one for one in ready.after if one[2] != kueue.add_workload]
    finding = one_problem(api, ClusterConfig.model_validate(in_queue))
    assert (finding.level, finding.subject) == ("error", "Kueue for PyTorchJob")
    assert "kubeflow.org/pytorchjob" in finding.fix and "integrations.frameworks" in finding.fix
    assert ready.names("pytorchjobs") == []


def test_no_probe_is_in_a_queue_that_can_admit_it(ready: FakeApi, kueue: Kueue, api: Api, in_queue: Object) -> None:
    """Not in the release's queue, and by its label not in the namespace's LocalQueue "default" either."""
    probes: list[Object] = []
    ready.after.append(("create", "pytorchjobs", probes.append))
    check(api, ClusterConfig.model_validate(in_queue))
    in_queue["job"]["queueName"] = ""
    check(api, ClusterConfig.model_validate(in_queue))
    queues = [probe["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] for probe in probes]
    assert len(queues) == 3 and not set(queues) & {"", "trn", "default"}
    assert all(probe["spec"]["runPolicy"]["suspend"] for probe in probes)


def test_kueues_webhook_that_does_not_answer_is_not_blamed_on_the_operator(
    ready: FakeApi, kueue: Kueue, in_queue: Object
) -> None:
    service = "https://kueue-webhook-service.kueue-system.svc:443/mutate-kubeflow-org-v1-pytorchjob"
    ready.failing["create"] = f'failed calling webhook "mpytorchjob.kb.io": failed to call webhook: Post "{service}"'
    impatient = connect(NAMESPACE, patience=0.1, interval=0.02)
    found = {one.subject: one for one in problems(impatient, ClusterConfig.model_validate(in_queue))}
    assert "Kueue's webhook" in found["training operator"].found and "kueue-system" in found["training operator"].fix
    assert found["Kueue for PyTorchJob"].level == "not checked"


# --- workload: trainjob


@pytest.fixture
def with_trainer(ready: FakeApi, values: Object) -> FakeApi:
    """A cluster with Kubeflow Trainer v2 alone, and a release that uses it."""
    values["workload"] = "trainjob"
    ready.crds = {"trainjobs", "trainingruntimes"}
    ready.after = [
        ("create", "trainjobs", lambda item: ready.set_condition("trainjobs", item["metadata"]["name"], "Suspended"))
    ]
    return ready


def test_the_probe_of_a_trainjob_is_suspended_and_brings_its_runtime(
    with_trainer: FakeApi, api: Api, values: Object
) -> None:
    probes: list[Object] = []
    runtimes: list[str] = []
    with_trainer.after.insert(
        0, ("create", "trainjobs", lambda item: runtimes.extend(with_trainer.names("trainingruntimes")))
    )
    with_trainer.after.append(("create", "trainjobs", probes.append))
    findings = check(api, ClusterConfig.model_validate(values))
    assert {one.level for one in findings} == {"ok"}
    assert findings[0].subject == "Kubeflow Trainer" and "TrainJobs" in findings[0].found
    [probe] = probes
    assert probe["spec"]["suspend"] is True and [probe["spec"]["runtimeRef"]["name"]] == runtimes
    assert probe["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    assert with_trainer.names("trainjobs") == with_trainer.names("trainingruntimes") == []


def test_a_trainer_that_does_not_run_is_an_error(with_trainer: FakeApi, api: Api, values: Object) -> None:
    with_trainer.after.clear()
    finding = one_problem(api, ClusterConfig.model_validate(values))
    assert (finding.level, finding.subject) == ("error", "Kubeflow Trainer")
    assert "kubeflow-trainer-controller-manager" in finding.fix


def test_kueue_is_tested_with_the_kind_of_the_workload(with_trainer: FakeApi, api: Api, values: Object) -> None:
    values["job"]["queueName"] = "trn"
    Kueue(with_trainer).add_queue("trn")
    values["job"]["devices"] = {}
    finding = one_problem(api, ClusterConfig.model_validate(values))
    assert finding.subject == "Kueue for TrainJob" and "trainer.kubeflow.org/trainjob" in finding.fix


@pytest.mark.parametrize(
    ("workload", "served", "other"),
    [("pytorchjob", "trainjobs", "workload=trainjob"), ("trainjob", "pytorchjobs", "workload=pytorchjob")],
)
def test_where_only_the_other_api_is_served_the_fix_is_the_other_workload(
    ready: FakeApi, api: Api, values: Object, workload: str, served: str, other: str
) -> None:
    values["workload"] = workload
    ready.crds = {served}
    finding = one_problem(api, ClusterConfig.model_validate(values))
    assert finding.level == "error" and "not installed" in finding.found
    assert f"--set {other}" in finding.fix and finding.fix.startswith("helm upgrade --install demo ")
    ready.crds = set()
    finding = one_problem(api, ClusterConfig.model_validate(values))
    assert finding.fix.startswith("kubectl apply") and "workload=" not in finding.fix


def test_what_rbac_forbids_is_not_checked_and_the_rest_is(ready: FakeApi, api: Api, config: ClusterConfig) -> None:
    ready.forbidden |= {("get", "secrets"), ("get", "namespaces"), ("create", "pytorchjobs.kubeflow.org")}
    assert [(finding.level, finding.subject) for finding in problems(api, config)] == [
        ("not checked", "training operator"),
        ("not checked", "pod security"),
        ("not checked", "Hugging Face token"),
    ]


def test_an_unavailable_api_server_ends_within_the_deadline_and_is_unanswered(
    ready: FakeApi, config: ClusterConfig
) -> None:
    ready.away = True
    started = time.monotonic()
    hurried = connect(NAMESPACE, patience=60.0, interval=0.05, deadline=time.monotonic() + 0.5)
    findings = check(hurried, config)
    assert time.monotonic() - started < 3
    assert all(finding.unanswered for finding in findings)
