"""Object names are unique, within the limits of Kubernetes, and never those of another release."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import yaml

from chart.manifests import CHART, MINIMAL, Object, Values, config, merged, pods, render

RELEASES = [
    *("llama", "llama-train", "llama-run", "llama-lora", "train", "a"),
    *("123", "1e5", "true", "a.b", "a-b", "0.0"),
    *("x" * 38, "x" * 39, "x" * 52 + "a", "x" * 52 + "b", "x" * 30 + ".y", "x" * 30 + "-y"),
]
DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
DNS_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
SERVICE = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
VERSION = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
CLUSTER_SCOPED = {"ClusterRole", "ClusterRoleBinding", "PersistentVolume", "StorageClass"}
STATIC: Values = {
    "storage": {
        "kind": "fsx-static",
        "static": {"fileSystemId": "fs-01234567", "dnsName": "a.b", "mountName": "fsx"},
    }
}
LARGEST: Values = {"parallelism": {"nodes": 1024, "dataParallelSize": 2048}}
OWN_CLASS: Values = {
    "storage": {"fsx": {"createStorageClass": True, "subnetId": "subnet-01234567", "securityGroupIds": ["sg-01234567"]}}
}


def identities(objects: list[Object]) -> list[tuple[str, str | None, str]]:
    return [(item["kind"], item["metadata"].get("namespace"), item["metadata"]["name"]) for item in objects]


def test_no_two_objects_of_a_release_share_a_name(objects: list[Object]) -> None:
    assert [identity for identity, count in Counter(identities(objects)).items() if count > 1] == []


@pytest.mark.parametrize("mode", ["attached", "detached"])
def test_no_two_releases_share_an_object(mode: str) -> None:
    releases = [release for release in RELEASES if mode == "attached" or len(release) <= 49]
    values = merged(MINIMAL, STATIC, LARGEST, {"pipeline": {"mode": mode}})
    found = Counter(
        identity
        for release in releases
        for identity in identities(render(values, release=release, namespace="research"))
    )
    assert [identity for identity, count in found.items() if count > 1] == []


@pytest.mark.parametrize("storage", [STATIC, OWN_CLASS], ids=["static", "own-class"])
def test_the_same_release_in_two_namespaces_shares_nothing_cluster_scoped(storage: Values) -> None:
    places = [("a", "b-c"), ("a-b", "c"), ("other", "b-c")]
    cluster_scoped: Counter[tuple[str, str]] = Counter()
    for namespace, release in places:
        values = merged(MINIMAL, storage, {"rbac": {"clusterScopedReads": True}})
        for item in render(values, release=release, namespace=namespace):
            if item["kind"] in CLUSTER_SCOPED:
                assert "namespace" not in item["metadata"]
                assert item["metadata"]["name"].startswith(f"{namespace}.")
                cluster_scoped[item["kind"], item["metadata"]["name"]] += 1
            else:
                assert item["metadata"]["namespace"] == namespace
    assert len(cluster_scoped) == 3 * len(places)
    assert set(cluster_scoped.values()) == {1}


@pytest.mark.parametrize("workload", ["pytorchjob", "trainjob"])
@pytest.mark.parametrize("release", RELEASES)
def test_names_and_labels_are_valid_for_every_release_name(release: str, workload: str, helm: int) -> None:
    values = merged(MINIMAL, STATIC, LARGEST, {"pipeline": {"mode": "attached"}})
    other = {} if workload == "pytorchjob" else {"workload": workload}
    objects = render(merged(values, other), helm=helm, release=release)
    for item in objects:
        name = item["metadata"]["name"]
        assert isinstance(name, str) and DNS_NAME.fullmatch(name) and len(name) <= 253
        if item["kind"] == "Job":
            assert DNS_LABEL.fullmatch(name), "it is a label value of the Job's pods"
        if item["kind"] == "PyTorchJob":
            later = re.sub(r"-1$", "-9999", name)
            assert SERVICE.fullmatch(f"{later}-worker-1023"), "a worker's pod, host name and Service"
        if item["kind"] == "TrainJob":
            later = re.sub(r"-1$", "-9999", name)
            assert SERVICE.fullmatch(f"{later}-node-0-1023-abcde"), "a worker's pod"
        for metadata in [item["metadata"], *(each.template["metadata"] for each in pods([item]))]:
            for label, value in metadata["labels"].items():
                assert isinstance(value, str) and LABEL_VALUE.fullmatch(value), f"{label}: {value!r}"
            for value in metadata.get("annotations", {}).values():
                assert isinstance(value, str)
    assert config(objects, "cluster.yaml")["release"] == release


def test_namespaces_that_look_like_numbers_are_rendered_as_text(helm: int) -> None:
    for item in render(MINIMAL, helm=helm, namespace="1e3"):
        assert item["kind"] in CLUSTER_SCOPED or item["metadata"]["namespace"] == "1e3"


def test_standard_labels_are_on_every_object_and_pod(objects: list[Object]) -> None:
    for item in objects:
        for metadata in [item["metadata"], *(each.template["metadata"] for each in pods([item]))]:
            labels = metadata["labels"]
            assert labels["app.kubernetes.io/instance"] == "llama"
            assert labels["app.kubernetes.io/managed-by"] == "Helm"
            assert labels["app.kubernetes.io/part-of"] == "llama-lora"
            assert labels.keys() >= {"helm.sh/chart", "app.kubernetes.io/name", "app.kubernetes.io/component"}
            of_storage = (
                labels["app.kubernetes.io/component"] == "storage"
            )  # kept on uninstall, so it has no version label
            assert of_storage or labels["app.kubernetes.io/version"] == VERSION


def run_label(values: Values, release: str) -> str:
    return str(config(render(merged(MINIMAL, values), release=release), "cluster.yaml")["run"])


def test_only_releases_that_use_one_run_folder_share_the_run_label() -> None:
    shared: Values = {"storage": {"existingClaim": "shared"}, "name": "mine"}
    assert run_label(shared, "a") == run_label(shared, "b")
    outer = render(merged(MINIMAL, {"pipeline": {"mode": "detached"}}))
    inner = render(config(outer, "values.yaml"), release="llama-run")
    assert config(inner, "cluster.yaml")["run"] == config(outer, "cluster.yaml")["run"] == run_label({}, "llama")
    others: list[Values] = [
        {"name": "mine"},  # on the release's volume
        {"storage": {"existingClaim": "other"}, "name": "mine"},
        {"storage": {"existingClaim": "shared"}, "name": "mine2"},
        {"storage": {"existingClaim": "shared"}, "name": "m" * 62 + "1"},
        {"storage": {"existingClaim": "shared"}, "name": "m" * 62 + "2"},
    ]
    labels = {run_label(values, "a") for values in [shared, *others]}
    assert len(labels) == 1 + len(others)
    assert all(LABEL_VALUE.fullmatch(label) for label in labels)


def test_overrides_rename_everything_but_the_volume() -> None:
    renamed = render(merged(MINIMAL, {"fullnameOverride": "other"}))
    for item in renamed:
        if item["kind"] == "PersistentVolumeClaim":
            assert item["metadata"]["name"] == "llama-workspace", "renaming it would lose the results"
        else:
            assert re.match(r"(research\.)?other-", item["metadata"]["name"])
