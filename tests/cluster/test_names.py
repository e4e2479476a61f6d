"""Releases side by side share no object name, including cluster-scoped objects."""

from __future__ import annotations

from collections.abc import Callable

from chart.manifests import Object, Values, merged
from cluster.space import SMALL, Space, run, stand_in, uids
from genvalues.cluster.objects import INSTANCE

KINDS = ("configmaps", "serviceaccounts", "roles", "rolebindings", "pvcs", "jobs", "pytorchjobs", "pods")
OF_ITS_OWN: Values = {
    "storage": {"enabled": True, "existingClaim": "", "kind": "generic", "size": "1Gi", "storageClass": "folder"},
    "evaluation": {"enabled": False},
    "dataset": {"evalFraction": 0},
}


def objects_of(space: Space, release: str) -> dict[str, Object]:
    """The release's objects in its namespace and in the cluster, by kind and name."""
    labels = f"{INSTANCE}={release}"
    return {f"{kind}/{item['metadata']['name']}": item for kind in KINDS for item in space.list(kind, labels)}


def cluster_scoped(space: Space) -> set[str]:
    listed = run(["kubectl", "get", "clusterroles,clusterrolebindings,storageclasses", "-o", "name"]).output.split()
    return {name.partition("/")[2] for name in listed if f"/{space.name}." in name}


def test_releases_side_by_side_and_with_one_name_in_two_namespaces_do_not_affect_each_other(
    new_space: Callable[..., Space],
) -> None:
    """One release trains while two others run and are uninstalled."""
    here, there = new_space(), new_space()
    trains = merged(stand_in(train="until [ -e /workspace/go-on ]; do sleep 0.5; done"), OF_ITS_OWN)
    goes_through = merged(stand_in(), OF_ITS_OWN)

    one = here.release(3, "one")
    client = one.start_install(trains)
    neighbours = [here.release(4, "two"), there.release(3, "one")]
    clients = [neighbour.start_install(goes_through) for neighbour in neighbours]
    workers = here.wait_for_training("one")
    for neighbour, its_client in zip(neighbours, clients, strict=True):
        assert its_client.wait().status == 0, its_client.output
        assert neighbour.state == "deployed"

    before = objects_of(here, "one")
    for neighbour in neighbours:
        neighbour.uninstall()
    assert objects_of(there, "one").keys() == {"pvcs/one-workspace"}
    assert objects_of(here, "two").keys() == {"pvcs/two-workspace"}
    assert cluster_scoped(there) == set()
    assert cluster_scoped(here) == {f"{here.name}.one-preflight"}
    assert objects_of(here, "one").keys() == before.keys()
    assert uids(here.wait_for_training("one")) == uids(workers)

    here.kubectl("exec", "one-train-1-worker-0", "--", "touch", "/workspace/go-on")
    assert client.wait().status == 0, client.output
    assert one.state == "deployed"


def test_releases_with_one_name_in_two_namespaces_have_different_storage_classes(
    new_space: Callable[..., Space],
) -> None:
    """The storage class of a release with FSx. (Static volumes: test_storage.)"""
    spaces = [new_space(), new_space()]
    fsx = {
        "createStorageClass": True,
        "subnetId": "subnet-0123456789abcdef0",
        "securityGroupIds": ["sg-0123456789abcdef0"],
    }
    makes_class = merged(SMALL, {"storage": {"enabled": True, "existingClaim": "", "kind": "fsx", "fsx": fsx}})
    try:
        for space in spaces:
            space.release().install(makes_class, "--no-hooks")
        for space in spaces:
            name = f"{space.name}.llama-workspace"
            assert name in cluster_scoped(space)
            assert objects_of(space, "llama")["pvcs/llama-workspace"]["spec"]["storageClassName"] == name
    finally:
        run(["kubectl", "delete", "storageclass", *(f"{space.name}.llama-workspace" for space in spaces)])
