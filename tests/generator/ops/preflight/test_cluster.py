"""The cluster from outside: the chart's own checks in the chart's own words, of a release that is not there yet."""

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
from genvalues.inputs.chart import BESIDE_THE_SOURCES as CHART
from genvalues.ops.preflight import cluster_checks as outside
from genvalues.ops.preflight.cluster_checks import check_cluster, rendered

QUICK = PreflightTimings(interval=0.02, claim=0.2, operator=0.3)
TRN1 = yaml.safe_load((CHART.parent / "values" / "trn1.values.yaml").read_text())
CLAIM, RELEASE = "llama-lora-workspace", "llama-lora"


@pytest.fixture(scope="module")
def objects() -> list[dict[str, Any]]:
    return rendered(CHART, RELEASE, TRN1, NAMESPACE)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeApi]:
    with serving(tmp_path) as (server, kubeconfig):
        monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
        yield server


@pytest.fixture
def ready(fake: FakeApi) -> FakeApi:
    """A cluster with all that a first install needs: no claim, which that makes."""
    mark_probe(fake)
    fake.add("secrets", {"metadata": {"name": "hf-token"}, "data": {"token": "aGZfeA=="}})
    fake.add("namespaces", namespace("baseline"))
    fake.add("nodes", node("node-1"))
    fake.add("storageclasses", {"metadata": {"name": "fsx-sc"}, "provisioner": "fsx.csi.aws.com"})
    return fake


@pytest.fixture(autouse=True)
def rendered_once(monkeypatch: pytest.MonkeyPatch, objects: list[dict[str, Any]]) -> None:
    """Helm takes half a second; that it is asked for what was asked here is the first test's to show."""

    def once(chart: Path, release: str, values: dict[str, Any], namespace: str) -> list[dict[str, Any]]:
        if values == TRN1:
            return copy.deepcopy(objects)
        return rendered(chart, release, values, namespace)

    monkeypatch.setattr(outside, "rendered", once)


def check(values: dict[str, Any] = TRN1, context: str | None = None) -> list[Finding]:
    return check_cluster(CHART, values, RELEASE, NAMESPACE, context, pace=QUICK)


def problems(values: dict[str, Any] = TRN1) -> list[Finding]:
    return [finding for finding in check(values) if finding.level != "ok"]


def changed(**storage: Any) -> dict[str, Any]:
    return merge(TRN1, {"storage": storage})


def test_the_chart_tells_what_to_look_for(objects: list[dict[str, Any]]) -> None:
    config = outside.config_of(objects)
    assert (config.release, config.namespace, config.claim.name) == (RELEASE, NAMESPACE, CLAIM)
    assert config.claim.managed and config.secret and config.secret.name == "hf-token"
    assert config.job.devices == {"aws.amazon.com/neuron": 16, "vpc.amazonaws.com/efa": 8}


def test_before_the_first_install_a_claim_that_install_makes_is_right(ready: FakeApi) -> None:
    assert [str(finding) for finding in check()] == [
        "ok           training operator: installed, and reconciles PyTorchJobs",
        f"ok           claim {CLAIM}: is not there yet: install makes it",
        "ok           storage class fsx-sc: provisioner fsx.csi.aws.com",
        f"ok           namespace {NAMESPACE}: enforces Pod Security baseline,"
        " which allows storage-prepare to run as root",
        "ok           secret hf-token: has key token",
        "ok           aws.amazon.com/neuron: 16 on each of 1 nodes of type ml.trn1.32xlarge",
        "ok           vpc.amazonaws.com/efa: 8 on each of 1 nodes of type ml.trn1.32xlarge",
    ]
    assert ready.names("pytorchjobs") == [], "the probe is gone"


def test_the_probe_has_another_name_than_the_stages_of_any_revision(ready: FakeApi) -> None:
    check()
    assert any(path.endswith(f"/pytorchjobs/{RELEASE}-preflight-0") for path in ready.paths), ready.paths


def test_what_is_there_is_judged_by_the_same_code_in_the_same_words(
    ready: FakeApi, objects: list[dict[str, Any]]
) -> None:
    """The stage itself, with its own ConfigMap, on the same cluster."""
    there = merge(claim("Bound"), {"metadata": {"name": CLAIM}})
    ready.add("persistentvolumeclaims", there)
    ready.remove("secrets", "hf-token")
    inside = preflight(connect(NAMESPACE), outside.config_of(objects), QUICK)
    assert check() == inside
    assert any(finding.subject == f"claim {CLAIM}" and finding.found == "Bound 1200Gi" for finding in inside)


def test_a_storage_class_that_is_not_there_is_an_error_before_a_claim_waits_for_it(ready: FakeApi) -> None:
    ready.remove("storageclasses", "fsx-sc")
    [found] = problems()
    assert (found.level, found.subject) == ("error", "storage class fsx-sc")
    own = {"createStorageClass": True, "subnetId": "subnet-01234567", "securityGroupIds": ["sg-01234567"]}
    assert problems(changed(fsx=own)) == [], "the release makes its own"
    static = {"fileSystemId": "fs-0123456789abcdef0", "dnsName": "fs-0123456789abcdef0.fsx.x", "mountName": "fsx"}
    assert problems(changed(kind="fsx-static", storageClass="", static=static)) == [], "it has a volume of its own"


def test_without_a_default_class_a_claim_that_names_none_is_an_error(ready: FakeApi) -> None:
    generic = changed(kind="generic", storageClass="", size="100Gi")
    [found] = problems(generic)
    assert found.level == "error" and "the cluster has no default" in found.found
    default = {"storageclass.kubernetes.io/is-default-class": "true"}
    ready.add("storageclasses", {"metadata": {"name": "local", "annotations": default}, "provisioner": "x"})
    assert problems(generic) == []


def test_an_existing_claim_that_is_not_there_stays_an_error(ready: FakeApi) -> None:
    [found] = problems(changed(existingClaim="nowhere"))
    assert found.level == "error" and found.fix.startswith(f"kubectl -n {NAMESPACE} get pvc")


def test_a_namespace_that_is_not_there_is_an_error_with_all_else_that_can_be_said(ready: FakeApi) -> None:
    ready.remove("namespaces", NAMESPACE)
    ready.remove("secrets", "hf-token")
    found = {finding.subject: finding for finding in check()}
    missing = found[f"namespace {NAMESPACE}"]
    assert (missing.level, missing.found) == ("error", "there is no such namespace")
    assert missing.fix.startswith(f"kubectl create namespace {NAMESPACE} && kubectl label namespace {NAMESPACE} ")
    assert found["secret hf-token"].level == "error"
    assert found["training operator"].level == "not checked", "there is no place for a test job"
    assert found[f"claim {CLAIM}"].level == found["aws.amazon.com/neuron"].level == "ok"
    assert ("create", "pytorchjobs.kubeflow.org") not in ready.requests


def test_a_secret_that_is_not_there_is_an_error_with_the_command_that_makes_it(ready: FakeApi) -> None:
    ready.remove("secrets", "hf-token")
    [found] = problems()
    assert found.level == "error"
    assert found.fix == f"kubectl -n {NAMESPACE} create secret generic hf-token --from-literal=token=hf_..."


def test_a_user_who_may_see_little_has_the_rest_not_checked(ready: FakeApi) -> None:
    ready.forbidden = {
        *(("get", "namespaces"), ("get", "secrets"), ("list", "nodes"), ("get", "storageclasses.storage.k8s.io")),
        ("create", "pytorchjobs.kubeflow.org"),
    }
    found = check()
    assert {finding.level for finding in found} == {"ok", "not checked"}
    unseen = [finding.subject for finding in found if finding.level == "not checked"]
    assert unseen == ["training operator", "storage class fsx-sc", "pod security", "Hugging Face token", "devices"]
    assert all("cannot" in finding.found for finding in found if finding.level == "not checked")


def test_the_commands_are_for_the_cluster_that_was_asked(ready: FakeApi) -> None:
    ready.remove("secrets", "hf-token")
    [missing] = [finding for finding in check(context="fake") if finding.level == "error"]
    assert missing.fix.startswith(f"kubectl --context fake -n {NAMESPACE} create secret generic hf-token")
    finding = Finding("error", "x", "y", "kubectl get crds; helm upgrade x CHART   # kubectl config get-contexts")
    fix = "kubectl --context prod get crds; helm --kube-context prod upgrade x CHART   # kubectl config get-contexts"
    assert outside.in_context(finding, "prod").fix == fix
    assert outside.in_context(finding, None) is finding


# --- no cluster


def test_a_cluster_that_is_away_is_one_finding(ready: FakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outside, "PATIENCE_SECONDS", 0.2)
    ready.away = True
    [found] = check()
    assert (found.level, found.subject, found.unanswered) == ("not checked", "cluster", True)
    assert "does not answer" in found.found and found.fix == "kubectl cluster-info"


def test_no_kubeconfig_and_no_such_context_are_one_finding(
    fake: FakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [found] = check(context="nobody")
    assert found.unanswered and "nobody" in found.found and found.fix.startswith("kubectl config get-contexts nobody")
    for text in (None, "", "not: a kubeconfig", "{{{"):
        path = tmp_path / "kubeconfig-of-nobody"
        if text is not None:
            path.write_text(text)
        monkeypatch.setenv("KUBECONFIG", str(path))
        [found] = check()
        assert (found.level, found.unanswered) == ("not checked", True)
        assert found.fix.startswith("kubectl config get-contexts ")


def test_who_is_not_logged_in_is_told_that_once(ready: FakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    from genvalues.cluster.api import Api, NotAllowed

    def refuse(self: Api, *_: Any, **__: Any) -> None:
        raise NotAllowed(401, "Unauthorized")

    monkeypatch.setattr(Api, "get", refuse)
    [found] = check()
    assert found.level == "not checked" and "401" in found.found and "aws eks update-kubeconfig" in found.fix


def test_offline_says_so_for_every_check() -> None:
    found = check_cluster(CHART, TRN1, RELEASE, offline=True)
    assert len(found) == 7 and {finding.found for finding in found} == {"--offline"}
