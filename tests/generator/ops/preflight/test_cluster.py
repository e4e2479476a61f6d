"""The chart's preflight from outside the cluster: the same checks and findings before a release exists."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from generator.cluster.fake_api import NAMESPACE, FakeApi, serving
from generator.cluster.test_preflight import claim, mark_probe, namespace, node
from genvalues.cluster.api import connect
from genvalues.cluster.preflight import CHECKS, PreflightTimings, preflight
from genvalues.common.dicts import merge
from genvalues.common.findings import Finding
from genvalues.common.helm import render
from genvalues.inputs.chart import BESIDE_THE_SOURCES as CHART
from genvalues.ops.aws import AwsClients, Denied
from genvalues.ops.preflight import cluster_checks as outside
from genvalues.ops.preflight import node_images
from genvalues.ops.preflight.cluster_checks import check_cluster

QUICK = PreflightTimings(interval=0.02, claim=0.2, operator=0.3, workload=0.3)
TRN1 = yaml.safe_load((CHART.parent / "values" / "trn1.values.yaml").read_text())
DRIVER = ["Neuron driver"]
CLAIM, RELEASE = "llama-lora-workspace", "llama-lora"


@pytest.fixture(scope="module")
def objects() -> list[dict[str, Any]]:
    return render(CHART, RELEASE, TRN1, NAMESPACE)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeApi]:
    with serving(tmp_path) as (server, kubeconfig):
        monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
        yield server


@pytest.fixture
def ready(fake: FakeApi) -> FakeApi:
    """A cluster with everything that a first install needs. It has no claim, which install creates."""
    mark_probe(fake)
    fake.add("secrets", {"metadata": {"name": "hf-token"}, "data": {"token": "aGZfeA=="}})
    fake.add("namespaces", namespace("baseline"))
    fake.add("nodes", node("node-1"))
    fake.add("storageclasses", {"metadata": {"name": "fsx-sc"}, "provisioner": "fsx.csi.aws.com"})
    return fake


@pytest.fixture(autouse=True)
def rendered_once(monkeypatch: pytest.MonkeyPatch, objects: list[dict[str, Any]]) -> None:
    """Render the chart once for all tests with the same values: Helm takes half a second."""

    def once(chart: Path, release: str, values: dict[str, Any], namespace: str) -> list[dict[str, Any]]:
        if values == TRN1:
            return copy.deepcopy(objects)
        return render(chart, release, values, namespace)

    monkeypatch.setattr(outside, "render", once)


def check(values: dict[str, Any] = TRN1, context: str | None = None) -> list[Finding]:
    return check_cluster(CHART, values, RELEASE, NAMESPACE, context, timings=QUICK)


def problems(values: dict[str, Any] = TRN1) -> list[Finding]:
    """Without the driver of HyperPod's nodes, which nothing in the cluster tells."""
    return [finding for finding in check(values) if finding.level != "ok" and finding.subject != "Neuron driver"]


def changed(**storage: Any) -> dict[str, Any]:
    return merge(TRN1, {"storage": storage})


def test_the_configuration_is_read_from_the_rendered_chart(objects: list[dict[str, Any]]) -> None:
    config = outside.config_of(objects)
    assert (config.release, config.namespace, config.claim.name) == (RELEASE, NAMESPACE, CLAIM)
    assert config.claim.managed and config.secret and config.secret.name == "hf-token"
    assert config.job.devices == {"aws.amazon.com/neuron": 16, "vpc.amazonaws.com/efa": 8}


def test_before_the_first_install_a_missing_claim_that_install_creates_is_ok(ready: FakeApi) -> None:
    assert [str(finding).partition("\n")[0] for finding in check()] == [
        "ok           training operator: installed, and reconciles PyTorchJobs",
        f"ok           claim {CLAIM}: does not exist yet: install creates it",
        "ok           storage class fsx-sc: provisioner fsx.csi.aws.com",
        f"ok           namespace {NAMESPACE}: enforces Pod Security baseline,"
        " which allows storage-prepare to run as root",
        "ok           secret hf-token: has key token",
        "ok           aws.amazon.com/neuron: 16 on each of 1 nodes of type ml.trn1.32xlarge",
        "ok           vpc.amazonaws.com/efa: 8 on each of 1 nodes of type ml.trn1.32xlarge",
        "not checked  Neuron driver: unknown on 1 of 1 nodes; the image has Neuron runtime 2.28.19.0",
    ]
    assert ready.names("pytorchjobs") == [], "the probe is gone"


def test_the_name_of_the_probe_differs_from_that_of_every_revision_of_the_stage(ready: FakeApi) -> None:
    check()
    assert any(path.endswith(f"/pytorchjobs/{RELEASE}-preflight-0") for path in ready.paths), ready.paths


def test_findings_are_equal_to_those_of_the_stage(ready: FakeApi, objects: list[dict[str, Any]]) -> None:
    """Compared with the stage's own code and ConfigMap on the same cluster."""
    there = merge(claim("Bound"), {"metadata": {"name": CLAIM}})
    ready.add("persistentvolumeclaims", there)
    ready.remove("secrets", "hf-token")
    config = outside.config_of(objects).model_copy(update={"cluster_scoped_reads": True})
    inside = preflight(connect(NAMESPACE), config, QUICK)
    assert [finding for finding in check() if finding.subject != "Neuron driver"] == inside
    assert any(finding.subject == f"claim {CLAIM}" and finding.found == "Bound 1200Gi" for finding in inside)


def test_a_missing_storage_class_is_an_error_before_a_claim_waits_for_it(ready: FakeApi) -> None:
    ready.remove("storageclasses", "fsx-sc")
    [found] = problems()
    assert (found.level, found.subject) == ("error", "storage class fsx-sc")
    own = {"createStorageClass": True, "subnetId": "subnet-01234567", "securityGroupIds": ["sg-01234567"]}
    assert problems(changed(fsx=own)) == [], "the release creates its own class"
    static = {"fileSystemId": "fs-0123456789abcdef0", "dnsName": "fs-0123456789abcdef0.fsx.x", "mountName": "fsx"}
    assert problems(changed(kind="fsx-static", storageClass="", static=static)) == [], (
        "the claim is bound to a static volume"
    )


def test_a_claim_without_a_class_is_an_error_if_there_is_no_default_class(ready: FakeApi) -> None:
    generic = changed(kind="generic", storageClass="", size="100Gi")
    [found] = problems(generic)
    assert found.level == "error" and "the cluster has no default class" in found.found
    default = {"storageclass.kubernetes.io/is-default-class": "true"}
    ready.add("storageclasses", {"metadata": {"name": "local", "annotations": default}, "provisioner": "x"})
    assert problems(generic) == []


def test_a_missing_existing_claim_is_an_error(ready: FakeApi) -> None:
    [found] = problems(changed(existingClaim="nowhere"))
    assert found.level == "error" and found.fix.startswith(f"kubectl -n {NAMESPACE} get pvc")


def test_a_missing_namespace_is_an_error_and_the_checks_that_need_none_are_made(ready: FakeApi) -> None:
    ready.remove("namespaces", NAMESPACE)
    ready.remove("secrets", "hf-token")
    found = {finding.subject: finding for finding in check()}
    missing = found[f"namespace {NAMESPACE}"]
    assert (missing.level, missing.found) == ("error", "not found")
    assert missing.fix.startswith(f"kubectl create namespace {NAMESPACE} && kubectl label namespace {NAMESPACE} ")
    assert found["secret hf-token"].level == "error"
    assert found["training operator"].level == "not checked", "a test job needs the namespace"
    assert found[f"claim {CLAIM}"].level == found["aws.amazon.com/neuron"].level == "ok"
    assert ("create", "pytorchjobs.kubeflow.org") not in ready.requests


def test_a_missing_secret_is_an_error_with_the_command_that_creates_it(ready: FakeApi) -> None:
    ready.remove("secrets", "hf-token")
    [found] = problems()
    assert found.level == "error"
    assert found.fix == f"kubectl -n {NAMESPACE} create secret generic hf-token --from-file=token=/dev/stdin"


def test_what_the_user_is_not_allowed_to_read_is_not_checked(ready: FakeApi) -> None:
    ready.forbidden = {
        *(("get", "namespaces"), ("get", "secrets"), ("list", "nodes"), ("get", "storageclasses.storage.k8s.io")),
        ("create", "pytorchjobs.kubeflow.org"),
    }
    found = check()
    assert {finding.level for finding in found} == {"ok", "not checked"}
    unseen = [finding.subject for finding in found if finding.level == "not checked"]
    assert unseen == [
        "training operator",
        "storage class fsx-sc",
        "pod security",
        "Hugging Face token",
        "devices",
        *DRIVER,
    ]
    assert all("cannot" in finding.found for finding in found if finding.level == "not checked")


def test_the_commands_of_fixes_use_the_same_context(ready: FakeApi) -> None:
    ready.remove("secrets", "hf-token")
    [missing] = [finding for finding in check(context="fake") if finding.level == "error"]
    assert missing.fix.startswith(f"kubectl --context fake -n {NAMESPACE} create secret generic hf-token")
    finding = Finding("error", "x", "y", "kubectl get crds; helm upgrade x CHART   # kubectl config get-contexts")
    fix = "kubectl --context prod get crds; helm --kube-context prod upgrade x CHART   # kubectl config get-contexts"
    assert outside.in_context(finding, "prod").fix == fix
    assert outside.in_context(finding, None) is finding


def test_the_callers_own_permissions_count_and_not_those_of_the_release(ready: FakeApi) -> None:
    """The release creates no ClusterRole, so its stage would read neither."""
    assert not outside.config_of(render(CHART, RELEASE, TRN1, NAMESPACE)).cluster_scoped_reads
    check()
    assert {("list", "nodes"), ("get", "storageclasses.storage.k8s.io")} <= set(ready.requests)


# --- the drivers of the nodes

EC2 = merge(TRN1, {"instance": "trn1.32xlarge", "hyperpod": {"autoResume": False}})


class Aws:
    """EC2 and SSM with these answers, by operation; a missing one is not allowed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **answers: Any) -> None:
        self.asked: list[tuple[str, str]] = []

        def answer(clients: AwsClients, service: str, operation: str, **_: Any) -> Any:
            self.asked.append((clients.region, f"{service}:{operation}"))
            if operation not in answers:
                raise Denied("not allowed", where=service)
            return answers[operation]

        monkeypatch.setattr(AwsClients, "ask", answer)
        monkeypatch.setattr(AwsClients, "list", lambda self, *call, **more: iter(answer(self, *call[:2], **more)))
        monkeypatch.setattr(node_images, "default_region", lambda: "us-west-2")


def image_named(name: str) -> dict[str, Any]:
    return {"Images": [{"ImageId": "ami-1", "Name": name}]}


def ec2_node(fake: FakeApi, **labels: str) -> None:
    fake.remove("nodes", "node-1")
    made = node("node-1", instance="trn1.32xlarge")
    made["metadata"]["labels"] |= {"topology.kubernetes.io/region": "us-east-1", **labels}
    made["spec"]["providerID"] = "aws:///us-east-1b/i-0123456789abcdef0"
    made["status"]["nodeInfo"] = {"osImage": "Our Linux 1"}
    fake.add("nodes", made)


def driver_finding() -> Finding | None:
    return next((one for one in check(EC2) if one.subject == "Neuron driver"), None)


def test_the_driver_of_a_managed_node_group_is_that_of_its_ami(ready: FakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    ec2_node(ready, **{"eks.amazonaws.com/nodegroup-image": "ami-1"})
    aws = Aws(monkeypatch, describe_images=image_named("amazon-eks-node-al2023-x86_64-neuron-1.34-v20260714"))
    found = driver_finding()
    assert found and found.level == "warning" and "driver 2.29" in found.found
    assert aws.asked == [("us-east-1", "ec2:describe_images")]


def test_the_driver_of_karpenters_nodes_is_that_of_their_instances_ami(
    ready: FakeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    ec2_node(ready, **{"karpenter.sh/nodepool": "trainium"})
    instances = [{"Instances": [{"InstanceId": "i-0123456789abcdef0", "ImageId": "ami-1"}]}]
    name = "amazon-eks-node-al2023-x86_64-neuron-1.34-v20260625"
    Aws(monkeypatch, describe_instances=instances, describe_images=image_named(name))
    found = driver_finding()
    assert found and found.level == "ok" and "2.28" in found.found


def test_without_permission_to_ask_aws_the_driver_is_not_checked(
    ready: FakeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    ec2_node(ready)
    Aws(monkeypatch)
    found = driver_finding()
    assert found and found.level == "not checked"


def test_for_a_node_group_without_nodes_the_recommended_ami_is_judged(
    ready: FakeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready.remove("nodes", "node-1")
    ready.version = {"major": "1", "minor": "34+"}
    name = "amazon-eks-node-al2023-x86_64-neuron-1.34-v20261105"
    Aws(monkeypatch, get_parameter={"Parameter": {"Value": "ami-1"}}, describe_images=image_named(name))
    found = driver_finding()
    assert found and found.level == "warning" and "no node yet" in found.found and name in found.found
    Aws(monkeypatch)
    assert driver_finding() is None


def test_backend_native_brings_a_runtime_that_is_unknown_here(ready: FakeApi) -> None:
    assert outside.expected_runtime(TRN1) == "2.28.19.0"
    assert outside.expected_runtime({"backend": "native"}) == ""


# --- no cluster


def test_a_cluster_that_does_not_answer_is_one_finding(ready: FakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outside, "PATIENCE_SECONDS", 0.2)
    ready.away = True
    [found] = check()
    assert (found.level, found.subject, found.unanswered) == ("not checked", "cluster", True)
    assert "does not answer" in found.found and found.fix == "kubectl cluster-info"


def test_no_kubeconfig_and_no_such_context_are_one_finding(
    fake: FakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [found] = check(context="absent")
    assert found.unanswered and "absent" in found.found and found.fix.startswith("kubectl config get-contexts absent")
    for text in (None, "", "not: a kubeconfig", "{{{"):
        path = tmp_path / "invalid-kubeconfig"
        if text is not None:
            path.write_text(text)
        monkeypatch.setenv("KUBECONFIG", str(path))
        [found] = check()
        assert (found.level, found.unanswered) == ("not checked", True)
        assert found.fix.startswith("kubectl config get-contexts ")


def test_a_user_who_is_not_logged_in_gets_one_finding(ready: FakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    from genvalues.cluster.api import Api
    from genvalues.cluster.kinds import NotAllowed

    def refuse(self: Api, *_: Any, **__: Any) -> None:
        raise NotAllowed(401, "Unauthorized")

    monkeypatch.setattr(Api, "get", refuse)
    [found] = check()
    assert found.level == "not checked" and "401" in found.found and "aws eks update-kubeconfig" in found.fix


def test_a_redirect_is_one_finding_about_the_servers_address(ready: FakeApi) -> None:
    ready.nonsense = (302, "")
    [found] = check()
    assert found.level == "not checked" and "Check the server's address in the kubeconfig" in found.found


def test_offline_is_a_finding_for_every_check() -> None:
    found = check_cluster(CHART, TRN1, RELEASE, offline=True)
    assert len(found) == len(CHECKS) and {finding.found for finding in found} == {"--offline"}
