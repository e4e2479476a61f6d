"""The volume: how it is provisioned, who owns it, what happens while it is missing, and that it is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from chart.manifests import Object, Values, merged
from cluster.space import CLAIM, Space, claim, files_pod, run, stand_in
from cluster.test_preflight import check_preflight_stopped, components, findings, problems

CHARTS_CLAIM = "llama-workspace"
PREPARED: Values = {"storage": {"prepare": {"enabled": True}}}


def charts_claim(kind: str = "generic", **settings: object) -> Values:
    return {"storage": {"enabled": True, "existingClaim": "", "kind": kind, **settings}}


def generic(storage_class: str) -> Values:
    return charts_claim(size="1Gi", storageClass=storage_class)


# The first stage writes to the volume and ends the run.
WRITES = stand_in(
    tokenize="cd /workspace; echo written by $(id -u) > words; stat -c 'root folder: %u %a' . >> words; exit 2"
)
WRITTEN = "written by 1000\nroot folder: 1000 755\n"


def bound(space: Space, name: str) -> Object | None:
    found = space.get("pvc", name)
    return found if found and found["status"]["phase"] == "Bound" else None


def claim_of(space: Space, name: str = CHARTS_CLAIM) -> Object:
    found = bound(space, name)
    assert found
    return found


def words(space: Space, claim_name: str = CHARTS_CLAIM) -> str:
    space.apply(files_pod(space.volume.POD, claim_name))
    return space.volume.read("words")


def test_the_root_folder_of_the_charts_claim_is_given_to_the_user_and_the_claim_is_kept_after_uninstall(
    new_space: Callable[..., Space],
) -> None:
    """As on FSx for Lustre. Also with --wait, because this class binds immediately."""
    space = new_space("baseline")
    release = space.release(3)
    release.install(merged(WRITES, generic("folder-of-root"), PREPARED), "--wait", status=1)
    before = claim_of(space)
    release.uninstall()
    assert claim_of(space) == before
    assert words(space) == WRITTEN


def test_the_volume_of_an_existing_claim_is_used_and_not_deleted(new_space: Callable[..., Space]) -> None:
    """Created by hand: a folder owned by root, bound to the claim by its claimRef."""
    space = new_space("baseline")
    space.volume.create()  # its folder contains the other volume's, and is deleted after the test
    with volume_by_hand(space, "by-hand"):
        release = space.release(4)
        release.install(merged(WRITES, PREPARED, {"storage": {"existingClaim": "by-hand"}}), status=1)
        before = claim_of(space, "by-hand")
        release.uninstall()
        assert claim_of(space, "by-hand") == before
        assert words(space, "by-hand") == WRITTEN


@contextmanager
def volume_by_hand(space: Space, name: str) -> Iterator[None]:
    folder = space.wait("the volume's folder", lambda: (space.get("pvc", CLAIM) or {})["spec"].get("volumeName"))
    path = (space.get("pv", folder) or {})["spec"]["hostPath"]["path"]
    spec: Object = {
        "capacity": {"storage": "1Gi"},
        "accessModes": ["ReadWriteMany"],
        "hostPath": {"path": f"{path}/{name}", "type": "DirectoryOrCreate"},
        "claimRef": {"name": name, "namespace": space.name},
        "storageClassName": "",
        "persistentVolumeReclaimPolicy": "Retain",
    }
    volume = {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": f"{space.name}.{name}"},
        "spec": spec,
    }
    space.apply(volume, claim(name, "", ("ReadWriteMany",)))
    try:
        yield
    finally:
        forget_volume(space, name)


def forget_volume(space: Space, name: str) -> None:
    """It is deleted as soon as its claim is deleted with the namespace."""
    run(["kubectl", "delete", "pv", f"{space.name}.{name}", "--wait=false"])


def test_static_volumes_of_two_namespaces_bind_to_their_own_claims_and_are_kept_after_uninstall(
    new_space: Callable[..., Space],
) -> None:
    """FSx file systems, which cannot be mounted here: the stage that needs one waits, and uninstall stops it."""
    spaces = [new_space(), new_space()]
    names = {"fileSystemId": "fs-0123456789abcdef0", "dnsName": "fs.example.com", "mountName": "fsx"}
    values = merged(stand_in(), charts_claim("fsx-static", size="1200Gi", static=names, prepare={"enabled": False}))
    try:
        releases = [space.release(major) for major, space in zip((3, 4), spaces, strict=True)]
        clients = [release.start_install(values) for release in releases]
        for space, release, client in zip(spaces, releases, clients, strict=True):
            space.wait("a stage that waits for its volume", lambda: space.pods("llama", "tokenize"))  # noqa: B023
            volume = f"{space.name}.{CHARTS_CLAIM}"
            waits = f"Pending: not yet bound to its volume {volume}; the next stage waits for it"
            [claim_finding] = [line for line in findings(release) if f"claim {CHARTS_CLAIM}" in line]
            assert claim_finding.partition(" FIX: ")[0] in {
                f"ok claim {CHARTS_CLAIM}: Bound 1200Gi",
                f"warning claim {CHARTS_CLAIM}: {waits}",  # Kubernetes resyncs every 15 s
            }
            before = space.wait("a bound claim", lambda: bound(space, CHARTS_CLAIM))  # noqa: B023
            assert before["spec"]["volumeName"] == volume
            client.kill()
            release.uninstall()
            assert claim_of(space) == before
            assert (space.get("pv", volume) or {})["status"]["phase"] == "Bound"
            assert not space.pods("llama")
    finally:
        for space in spaces:
            forget_volume(space, CHARTS_CLAIM)


def test_a_class_that_waits_for_its_first_consumer_works_without_wait_and_starts_no_stage_with_it(
    space: Space,
) -> None:
    """As described in docs/operations.md."""
    values = merged(WRITES, generic("folder-on-first-use"))
    release = space.release(4)
    release.install(values, "--wait", "--timeout", "15s", status=1)
    assert components(space) == {"cleanup"}
    release.upgrade(values, status=1)
    waits = f"claim {CHARTS_CLAIM}: Pending until its first pod starts (volumeBindingMode WaitForFirstConsumer)"
    assert f"ok {waits}" in findings(release)
    assert words(space) == WRITTEN


def test_a_claim_that_stays_pending_stops_the_install_with_the_reason_and_the_fix(
    new_space: Callable[..., Space],
) -> None:
    """A class whose provisioner is not running, and a class that does not exist."""
    no_provisioner, no_class = new_space(), new_space()
    clients = {
        space: space.release().start_install(merged(WRITES, generic(storage_class)))
        for space, storage_class in ((no_provisioner, "nobody-makes-it"), (no_class, "no-such-class"))
    }
    for space, client in clients.items():
        assert client.wait().status == 1
        check_preflight_stopped(space.release())
    message = (
        "Waiting for a volume to be created either by the external provisioner 'absent.llama-lora/nobody' or manually"
        " by the system administrator. If volume creation is delayed, please verify that the provisioner is running and"
        " correctly registered."
    )
    assert problems(no_provisioner.release()) == {
        f"error claim {CHARTS_CLAIM}: Pending: no provisioner handles it: {message}"
        " FIX: kubectl get csidrivers; kubectl get storageclass nobody-makes-it",
        "1 of 6 findings stop this release; the fixes are above",
    }
    assert problems(no_class.release()) == {
        f"error claim {CHARTS_CLAIM}: Pending: ProvisioningFailed:"
        f' storageclass.storage.k8s.io "no-such-class" not found'
        f" FIX: kubectl -n {no_class.name} describe pvc {CHARTS_CLAIM}",
        "error storage class no-such-class: not found FIX: kubectl get storageclass # then set storage.storageClass",
        "2 of 6 findings stop this release; the fixes are above",
    }
