"""The volume: one claim of the configured kind, kept on uninstall."""

from __future__ import annotations

import pytest

from chart.manifests import MINIMAL, Object, Values, annotation, config, hooks, merged, one, pods, render

KINDS = {"PersistentVolumeClaim", "PersistentVolume", "StorageClass"}


def storage(values: Values, helm: int = 4) -> list[Object]:
    return [item for item in render(merged(MINIMAL, {"storage": values}), helm=helm) if item["kind"] in KINDS]


def test_storage_is_kept_on_uninstall_and_is_not_a_hook(objects: list[Object]) -> None:
    for item in objects:
        if item["kind"] in KINDS:
            assert annotation(item, "helm.sh/resource-policy") == "keep"
            assert not hooks(item)


def test_every_pod_mounts_the_claim_that_preflight_checks(objects: list[Object]) -> None:
    claim = config(objects, "cluster.yaml")["claim"]
    for each in pods(objects):
        for volume in each.spec["volumes"]:
            if volume["name"] == "workspace":
                assert volume["persistentVolumeClaim"]["claimName"] == claim["name"]
    made = [item["metadata"]["name"] for item in objects if item["kind"] == "PersistentVolumeClaim"]
    assert made == ([claim["name"]] if claim["managed"] else [])


def test_fsx_is_a_claim_of_an_existing_class(helm: int) -> None:
    [claim] = storage({}, helm)
    assert claim["spec"]["storageClassName"] == "fsx-sc"
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert claim["spec"]["resources"]["requests"]["storage"] == "1200Gi"


def test_fsx_with_a_class_of_the_release(helm: int) -> None:
    fsx = {
        "createStorageClass": True,
        "subnetId": "subnet-01234567",
        "securityGroupIds": ["sg-0123456a", "sg-0123456b"],
    }
    made = {item["kind"]: item for item in storage({"fsx": fsx}, helm)}
    assert made.keys() == {"StorageClass", "PersistentVolumeClaim"}
    storage_class = made["StorageClass"]
    assert made["PersistentVolumeClaim"]["spec"]["storageClassName"] == storage_class["metadata"]["name"]
    assert storage_class["provisioner"] == "fsx.csi.aws.com"
    assert storage_class["reclaimPolicy"] == "Retain"
    assert storage_class["parameters"] == {
        "subnetId": "subnet-01234567",
        "securityGroupIds": "sg-0123456a,sg-0123456b",
        "deploymentType": "PERSISTENT_2",
        "perUnitStorageThroughput": "250",
    }


def test_fsx_static_binds_this_claim_to_that_file_system(helm: int) -> None:
    static = {
        "fileSystemId": "fs-01234567",
        "dnsName": "fs-01234567.fsx.eu-west-1.amazonaws.com",
        "mountName": "12345678",
    }
    made = {item["kind"]: item for item in storage({"kind": "fsx-static", "static": static}, helm)}
    assert made.keys() == {"PersistentVolume", "PersistentVolumeClaim"}
    volume, claim = made["PersistentVolume"], made["PersistentVolumeClaim"]
    assert volume["spec"]["csi"] == {
        "driver": "fsx.csi.aws.com",
        "volumeHandle": "fs-01234567",
        "volumeAttributes": {"dnsname": "fs-01234567.fsx.eu-west-1.amazonaws.com", "mountname": "12345678"},
    }
    assert volume["spec"]["persistentVolumeReclaimPolicy"] == "Retain"
    assert volume["spec"]["claimRef"]["name"] == claim["metadata"]["name"]
    assert volume["spec"]["claimRef"]["namespace"] == claim["metadata"]["namespace"]
    assert claim["spec"]["volumeName"] == volume["metadata"]["name"]
    assert claim["spec"]["storageClassName"] == "" == volume["spec"]["storageClassName"]
    assert claim["spec"]["resources"]["requests"] == volume["spec"]["capacity"]


def test_generic_accepts_any_class_or_the_clusters_default(helm: int) -> None:
    generic = {"kind": "generic", "size": "10Gi", "accessModes": ["ReadWriteOnce"]}
    [named] = storage({**generic, "storageClass": "local-path"}, helm)
    assert named["spec"]["storageClassName"] == "local-path"
    assert named["spec"]["accessModes"] == ["ReadWriteOnce"]
    [default] = storage({**generic, "storageClass": ""}, helm)
    assert "storageClassName" not in default["spec"]


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("kind", ["fsx", "fsx-static", "generic"])
def test_an_existing_claim_is_used_and_nothing_is_created(enabled: bool, kind: str) -> None:
    values = {"storage": {"enabled": enabled, "kind": kind, "existingClaim": "123"}}
    objects = render(merged(MINIMAL, values))
    assert not [item for item in objects if item["kind"] in KINDS]
    assert config(objects, "cluster.yaml")["claim"] == {"name": "123", "managed": False}
    assert one(objects, "Job", "llama-storage-prepare"), "an existing claim is prepared too"
