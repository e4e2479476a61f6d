"""The volume: one claim of the configured kind, kept on uninstall."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from chart.manifests import CHART, MINIMAL, Object, Values, annotation, config, hooks, merged, one, pods, render
from genvalues.inputs.chart import on_top_of_defaults

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
        "fileSystemTypeVersion": "2.15",
    }


CLASS: Values = {"createStorageClass": True, "subnetId": "subnet-01234567", "securityGroupIds": ["sg-01234567"]}


def parameters(fsx: Values, helm: int) -> Values:
    [found] = [item for item in storage({"fsx": {**CLASS, **fsx}}, helm) if item["kind"] == "StorageClass"]
    return {key: value for key, value in found["parameters"].items() if key not in ("subnetId", "securityGroupIds")}


@pytest.mark.parametrize(
    ("kind", "throughput"), [("PERSISTENT_2", "250"), ("PERSISTENT_1", "200"), ("SCRATCH_2", None), ("SCRATCH_1", None)]
)
def test_the_throughput_follows_from_the_deployment_type(kind: str, throughput: str | None, helm: int) -> None:
    made = parameters({"deploymentType": kind}, helm)
    assert (made["deploymentType"], made.get("perUnitStorageThroughput")) == (kind, throughput)
    assert made["fileSystemTypeVersion"] == "2.15"


def test_every_parameter_of_fsx_is_one_of_the_csi_drivers(helm: int) -> None:
    fsx = {
        "deploymentType": "PERSISTENT_1",
        "perUnitStorageThroughput": 100,
        "fileSystemTypeVersion": "2.12",
        "dataCompressionType": "LZ4",
        "kmsKeyId": "arn:aws:kms:us-west-2:123456789012:key/01234567-89ab-cdef-0123-456789abcdef",
        "tags": {"team": "nlp", "cost-center": "42"},
        "s3ImportPath": "s3://a-bucket/data",
        "s3ExportPath": "s3://a-bucket/out",
        "autoImportPolicy": "NEW_CHANGED",
    }
    made = parameters(fsx, helm)
    assert made.pop("extraTags") == "cost-center=42,team=nlp"
    assert made == {key: str(value) for key, value in fsx.items() if key != "tags"}
    assert parameters({"fileSystemTypeVersion": ""}, helm).keys() == {"deploymentType", "perUnitStorageThroughput"}


@pytest.mark.parametrize(
    ("instance", "nodes", "modes"),
    [
        ("cpu", 1, ["ReadWriteOnce"]),
        ("cpu", 2, ["ReadWriteMany"]),
        ("trn1.32xlarge", 1, ["ReadWriteMany"]),  # the gate, on a CPU node, mounts it too
    ],
)
def test_generic_asks_for_what_a_usual_class_has(instance: str, nodes: int, modes: list[str], helm: int) -> None:
    values = merged(MINIMAL, {"instance": instance, "parallelism": {"nodes": nodes}, "storage": {"kind": "generic"}})
    spec = one(render(values, helm=helm), "PersistentVolumeClaim")["spec"]
    assert spec == {"accessModes": modes, "resources": {"requests": {"storage": "100Gi"}}}


def test_pods_that_share_a_volume_of_one_node_run_on_one_node(helm: int) -> None:
    """The gate, which counts the cost on the volume, and the workers run at the same time."""
    generic: Values = {"storage": {"kind": "generic"}}
    outer = render(merged(MINIMAL, generic, {"pipeline": {"mode": "detached"}}), helm=helm)
    inner = render(config(outer, "values.yaml"), helm=helm, release="llama-run")
    of_release = list(pods([*outer, *inner, *render(merged(MINIMAL, generic), helm=helm)]))
    affinities = [each.spec["affinity"]["podAffinity"] for each in of_release if "affinity" in each.spec]
    [term] = affinities[0]["requiredDuringSchedulingIgnoredDuringExecution"]
    [others] = term["labelSelector"]["matchExpressions"]
    assert term["topologyKey"] == "kubernetes.io/hostname" and others["operator"] == "NotIn"
    assert all(affinity == affinities[0] for affinity in affinities)
    for each in of_release:
        labels = each.template["metadata"]["labels"]
        mounts = any(volume["name"] == "workspace" for volume in each.spec["volumes"])
        assert ("affinity" in each.spec) == mounts, each.stage
        assert term["labelSelector"]["matchLabels"].items() <= labels.items()
        assert (labels[others["key"]] not in others["values"]) == mounts, (
            "a runner attracts no stage: its node may be in another zone than the volume"
        )
    shared = merged(generic, {"storage": {"accessModes": ["ReadWriteMany"]}})
    assert not [each for each in pods(render(merged(MINIMAL, shared), helm=helm)) if "affinity" in each.spec]
    term = {"matchExpressions": [{"key": "zone", "operator": "Exists"}]}
    mine = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}}}
    own = merged(generic, {"stageDefaults": {"affinity": mine}})
    assert all(each.spec["affinity"] == mine for each in pods(render(merged(MINIMAL, own), helm=helm)))


def test_genvalues_knows_the_defaults_of_each_kind() -> None:
    for kind in ("fsx", "generic"):
        values = merged(MINIMAL, {"storage": {"kind": kind}})
        ours = on_top_of_defaults(CHART, values)["storage"]
        spec = one(render(values), "PersistentVolumeClaim")["spec"]
        assert spec["accessModes"] == ours["accessModes"]
        assert spec["resources"]["requests"]["storage"] == ours["size"]
        assert spec.get("storageClassName", "") == ours["storageClass"]


def upgraded(values: Values, existing: Values, helm: int, folder: Path) -> list[Object]:
    """The objects of an upgrade in a cluster that has these objects by kind: `helm template` has no lookup."""
    chart = folder / "chart"
    shutil.copytree(CHART, chart)
    file = chart / "templates/config/_complete.tpl"
    text = file.read_text()
    assert text.count("lookup ") == 2
    found = 'include "existing" (list %s) | fromJson'
    file.write_text(
        re.sub(
            r'lookup "[^"]*" "(\w+)" (?:"[^"]*"|\S+) (?:\$name|\(printf[^)]*\))', lambda m: found % f'"{m[1]}"', text
        )
        + "".join(
            f'{{{{- define "existing" }}}}{{{{- get (`{json.dumps(existing)}` | fromJson) (first .) | toJson }}}}'
        )
        + "{{- end }}"
    )
    return render(merged(MINIMAL, values), helm=helm, chart=chart, upgrade=True)


def test_an_upgrade_changes_nothing_of_a_volume_that_cannot_change(helm: int, tmp_path: Path) -> None:
    claim = {
        "accessModes": ["ReadWriteMany"],
        "storageClassName": "fsx-sc",
        "resources": {"requests": {"storage": "1200Gi"}},
    }
    objects = upgraded(
        {"storage": {"kind": "generic"}}, {"PersistentVolumeClaim": {"spec": claim}, "StorageClass": {}}, helm, tmp_path
    )
    assert one(objects, "PersistentVolumeClaim")["spec"] == claim


def test_an_upgrade_keeps_the_parameters_of_a_storage_class(helm: int, tmp_path: Path) -> None:
    before = {"deploymentType": "PERSISTENT_2", "perUnitStorageThroughput": "500"}
    existing = {"PersistentVolumeClaim": {}, "StorageClass": {"parameters": before}}
    objects = upgraded({"storage": {"fsx": CLASS}}, existing, helm, tmp_path)
    made = one(objects, "StorageClass")["parameters"]
    assert {key: value for key, value in made.items() if key not in ("subnetId", "securityGroupIds")} == before


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
