"""The volume: where it comes from, whose it is, what happens while it is not there, and that it stays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from chart.manifests import Object, Values, merged
from cluster.space import CLAIM, Space, claim, files_pod, run, stand_in
from cluster.test_preflight import check_preflight_stopped, components, findings, problems

MADE_BY_CHART = "llama-workspace"
PREPARED: Values = {"storage": {"prepare": {"enabled": True}}}


def made_by_chart(kind: str = "generic", **settings: object) -> Values:
    return {"storage": {"enabled": True, "existingClaim": "", "kind": kind, **settings}}


def generic(storage_class: str) -> Values:
    return made_by_chart(size="1Gi", storageClass=storage_class)


# Its first stage writes to the volume and ends the run: no more is needed here.
WRITES = stand_in(
    tokenize="cd /workspace; echo written by $(id -u) > words; stat -c 'root folder: %u %a' . >> words; exit 2"
)
WRITTEN = "written by 1000\nroot folder: 1000 755\n"


def bound(space: Space, name: str) -> Object | None:
    found = space.get("pvc", name)
    return found if found and found["status"]["phase"] == "Bound" else None


def claim_of(space: Space, name: str = MADE_BY_CHART) -> Object:
    """As it is now, and is to stay."""
    found = bound(space, name)
    assert found
    return found


def words(space: Space, claim_name: str = MADE_BY_CHART) -> str:
    space.apply(files_pod(space.volume.POD, claim_name))
    return space.volume.read("words")


def test_roots_folder_on_a_claim_of_the_chart_is_given_to_the_user_and_all_stays_after_uninstall(
    new_space: Callable[..., Space], helm: int
) -> None:
    """As on FSx for Lustre. With --wait, too, where the class binds at once."""
    space = new_space("baseline")
    release = space.release(helm)
    release.install(merged(WRITES, generic("folder-of-root"), PREPARED), "--wait", status=1)
    before = claim_of(space)
    release.uninstall()
    assert claim_of(space) == before
    assert words(space) == WRITTEN


def test_a_volume_of_ones_own_behind_an_existing_claim_is_used_and_left_alone(new_space: Callable[..., Space]) -> None:
    """Made by hand: a folder that is root's, bound to the claim by its claimRef."""
    space = new_space("baseline")
    space.volume.create()  # its folder has room for the other, and goes after the test
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
    """It goes as soon as its claim has gone with the namespace."""
    run(["kubectl", "delete", "pv", f"{space.name}.{name}", "--wait=false"])


def test_static_volumes_of_two_namespaces_are_bound_each_to_its_own_claim_and_stay_after_uninstall(
    new_space: Callable[..., Space],
) -> None:
    """FSx file systems, which nobody can mount here: the stage that needs one waits for it, and uninstall ends it."""
    spaces = [new_space(), new_space()]
    names = {"fileSystemId": "fs-0123456789abcdef0", "dnsName": "fs.example.com", "mountName": "fsx"}
    values = merged(stand_in(), made_by_chart("fsx-static", size="1200Gi", static=names, prepare={"enabled": False}))
    try:
        releases = [space.release(major) for major, space in zip((3, 4), spaces, strict=True)]
        clients = [release.start_install(values) for release in releases]
        for space, release, client in zip(spaces, releases, clients, strict=True):
            space.wait("a stage that waits for its volume", lambda: space.pods("llama", "tokenize"))  # noqa: B023
            volume = f"{space.name}.{MADE_BY_CHART}"
            waits = f"Pending: not yet bound to its volume {volume}; the next stage waits for it"
            [claim_finding] = [line for line in findings(release) if f"claim {MADE_BY_CHART}" in line]
            assert claim_finding.partition(" FIX: ")[0] in {
                f"ok claim {MADE_BY_CHART}: Bound 1200Gi",
                f"warning claim {MADE_BY_CHART}: {waits}",  # Kubernetes looks every 15 s
            }
            before = space.wait("a bound claim", lambda: bound(space, MADE_BY_CHART))  # noqa: B023
            assert before["spec"]["volumeName"] == volume
            client.kill()
            release.uninstall()
            assert claim_of(space) == before
            assert (space.get("pv", volume) or {})["status"]["phase"] == "Bound"
            assert not space.pods("llama")
    finally:
        for space in spaces:
            forget_volume(space, MADE_BY_CHART)


def test_a_class_that_binds_at_the_first_pod_works_and_with_wait_no_stage_ever_starts(space: Space, helm: int) -> None:
    """docs/operations.md says so."""
    values = merged(WRITES, generic("folder-on-first-use"))
    release = space.release(helm)
    release.install(values, "--wait", "--timeout", "15s", status=1)
    assert components(space) == {"cleanup"}
    release.upgrade(values, status=1)
    waits = f"claim {MADE_BY_CHART}: Pending until its first pod, as its storage class wants it (WaitForFirstConsumer)"
    assert f"ok {waits}" in findings(release)
    assert words(space) == WRITTEN


def test_a_claim_that_stays_pending_stops_the_install_with_the_reason_and_the_fix(
    new_space: Callable[..., Space],
) -> None:
    """A class whose provisioner does not run, and a class that does not exist."""
    nobody, no_class = new_space(), new_space()
    clients = {
        space: space.release().start_install(merged(WRITES, generic(storage_class)))
        for space, storage_class in ((nobody, "nobody-makes-it"), (no_class, "no-such-class"))
    }
    for space, client in clients.items():
        assert client.wait(120).status == 1
        check_preflight_stopped(space.release())
    message = (
        "Waiting for a volume to be created either by the external provisioner 'absent.llama-lora/nobody' or manually"
        " by the system administrator. If volume creation is delayed, please verify that the provisioner is running and"
        " correctly registered."
    )
    assert problems(nobody.release()) == {
        f"error claim {MADE_BY_CHART}: Pending, and no provisioner has taken it up: {message}"
        " FIX: kubectl get csidrivers; kubectl get storageclass nobody-makes-it",
        "1 of 6 findings stop this release; the fixes are above",
    }
    assert problems(no_class.release()) == {
        f"error claim {MADE_BY_CHART}: Pending: ProvisioningFailed:"
        f' storageclass.storage.k8s.io "no-such-class" not found'
        f" FIX: kubectl -n {no_class.name} describe pvc {MADE_BY_CHART}",
        "error storage class no-such-class: there is none of this name"
        " FIX: kubectl get storageclass # then storage.storageClass",
        "2 of 6 findings stop this release; the fixes are above",
    }
