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
from genvalues.cluster.preflight import PreflightTimings, preflight
from genvalues.common.dicts import merge
from genvalues.common.findings import Finding
from genvalues.common.helm import render
from genvalues.inputs.chart import BESIDE_THE_SOURCES as CHART
from genvalues.ops.preflight import cluster_checks as outside
from genvalues.ops.preflight.cluster_checks import check_cluster

QUICK = PreflightTimings(interval=0.02, claim=0.2, operator=0.3)
TRN1 = yaml.safe_load((CHART.parent / "values" / "trn1.values.yaml").read_text())
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
    return [finding for finding in check(values) if finding.level != "ok"]


def changed(**storage: Any) -> dict[str, Any]:
    return merge(TRN1, {"storage": storage})


def test_the_configuration_is_read_from_the_rendered_chart(objects: list[dict[str, Any]]) -> None:
    config = outside.config_of(objects)
    assert (config.release, config.namespace, config.claim.name) == (RELEASE, NAMESPACE, CLAIM)
    assert config.claim.managed and config.secret and config.secret.name == "hf-token"
    assert config.job.devices == {"aws.amazon.com/neuron": 16, "vpc.amazonaws.com/efa": 8}


def test_before_the_first_install_a_missing_claim_that_install_creates_is_ok(ready: FakeApi) -> None:
    assert [str(finding) for finding in check()] == [
        "ok           training operator: installed, and reconciles PyTorchJobs",
        f"ok           claim {CLAIM}: does not exist yet: install creates it",
        "ok           storage class fsx-sc: provisioner fsx.csi.aws.com",
        f"ok           namespace {NAMESPACE}: enforces Pod Security baseline,"
        " which allows storage-prepare to run as root",
        "ok           secret hf-token: has key token",
        "ok           aws.amazon.com/neuron: 16 on each of 1 nodes of type ml.trn1.32xlarge",
        "ok           vpc.amazonaws.com/efa: 8 on each of 1 nodes of type ml.trn1.32xlarge",
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
    inside = preflight(connect(NAMESPACE), outside.config_of(objects), QUICK)
    assert check() == inside
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
    assert unseen == ["training operator", "storage class fsx-sc", "pod security", "Hugging Face token", "devices"]
    assert all("cannot" in finding.found for finding in found if finding.level == "not checked")


def test_the_commands_of_fixes_use_the_same_context(ready: FakeApi) -> None:
    ready.remove("secrets", "hf-token")
    [missing] = [finding for finding in check(context="fake") if finding.level == "error"]
    assert missing.fix.startswith(f"kubectl --context fake -n {NAMESPACE} create secret generic hf-token")
    finding = Finding("error", "x", "y", "kubectl get crds; helm upgrade x CHART   # kubectl config get-contexts")
    fix = "kubectl --context prod get crds; helm --kube-context prod upgrade x CHART   # kubectl config get-contexts"
    assert outside.in_context(finding, "prod").fix == fix
    assert outside.in_context(finding, None) is finding


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
    from genvalues.cluster.api import Api, NotAllowed

    def refuse(self: Api, *_: Any, **__: Any) -> None:
        raise NotAllowed(401, "Unauthorized")

    monkeypatch.setattr(Api, "get", refuse)
    [found] = check()
    assert found.level == "not checked" and "401" in found.found and "aws eks update-kubeconfig" in found.fix


def test_offline_is_a_finding_for_every_check() -> None:
    found = check_cluster(CHART, TRN1, RELEASE, offline=True)
    assert len(found) == 7 and {finding.found for finding in found} == {"--offline"}
