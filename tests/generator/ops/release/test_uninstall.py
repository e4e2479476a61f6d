"""genvalues uninstall: lists what will be stopped, then what remains, what costs money and how to remove it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from generator.cluster.fake_api import CLUSTER_SCOPED, FakeApi
from generator.ops.release.fake_helm import FakeHelm
from generator.ops.release.run import Outer, Run
from generator.ops.release.test_status import genvalues

FSX = {"csi": {"driver": "fsx.csi.aws.com", "volumeHandle": "fs-0123456789abcdef0"}}


@pytest.fixture(autouse=True)
def volumes_are_cluster_scoped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("generator.cluster.fake_api.CLUSTER_SCOPED", {*CLUSTER_SCOPED, "persistentvolumes"})


@pytest.fixture
def run(fake: FakeApi, helm: FakeHelm) -> Run:
    return Run(fake, helm)


def claim(fake: FakeApi, policy: str = "Retain", **volume: Any) -> None:
    spec = {"storageClassName": "fsx-sc", "volumeName": "pvc-1", "resources": {"requests": {"storage": "1200Gi"}}}
    fake.add("persistentvolumeclaims", {"metadata": {"name": "demo-workspace"}, "spec": spec})
    fake.add(
        "persistentvolumes",
        {"metadata": {"name": "pvc-1"}, "spec": {"persistentVolumeReclaimPolicy": policy, **FSX, **volume}},
    )


def uninstall(*arguments: str, release: str = "demo") -> int:
    return genvalues("uninstall", release, "-n", "team-a", *arguments)


def test_what_runs_is_listed_before_and_what_remains_after(
    run: Run, fake: FakeApi, helm: FakeHelm, capsys: pytest.CaptureFixture[str]
) -> None:
    run.to_train()
    run.annotate("demo-train-1", progress={"stage": "train", "step": 7, "totalSteps": 9})
    claim(fake)
    assert uninstall() == 0
    after, err = capsys.readouterr()
    before, _, _ = err.partition("Running: helm uninstall demo")
    assert "Will be stopped: train at step 7 of 9 (demo-train-1-worker-0" in before
    assert "claim demo-workspace, 1200Gi, storage class fsx-sc" in after
    assert "FSx for Lustre file system fs-0123456789abcdef0 (costs money until it is removed)" in after
    assert "aws fsx delete-file-system --file-system-id fs-0123456789abcdef0" in after
    assert "kubectl delete pv pvc-1" in after and "kubectl -n team-a delete secret hf-token" in after
    assert helm.asked[:4] == ["uninstall", "demo", "--namespace", "team-a"]


def test_helms_timeout_includes_that_of_the_cleanup(fake: FakeApi, helm: FakeHelm) -> None:
    Run(fake, helm, values={"cleanup": {"timeoutSeconds": 1000}})
    assert uninstall("--kube-context", "fake") == 0
    assert helm.asked[4:] == ["--kube-context", "fake", "--timeout", "1270s"]


def test_a_volume_that_is_deleted_with_its_claim_is_not_listed(
    run: Run, fake: FakeApi, capsys: pytest.CaptureFixture[str]
) -> None:
    claim(fake, policy="Delete")
    assert uninstall() == 0
    out = capsys.readouterr().out
    assert "delete pvc demo-workspace" in out and "pv pvc-1" not in out and "fs-0" not in out


def test_what_cannot_be_read_is_listed_as_possibly_remaining(
    run: Run, fake: FakeApi, capsys: pytest.CaptureFixture[str]
) -> None:
    claim(fake)
    fake.forbidden |= {("get", "persistentvolumes")}
    assert uninstall() == 0
    assert "volume pvc-1, which could not be read" in capsys.readouterr().out
    fake.forbidden |= {("get", "persistentvolumeclaims")}
    assert uninstall() == 0
    assert "claim demo-workspace, if it exists (it could not be read)" in capsys.readouterr().out


def test_an_existing_claim_is_listed_as_not_created_by_the_release(
    fake: FakeApi, helm: FakeHelm, capsys: pytest.CaptureFixture[str]
) -> None:
    Run(fake, helm, values={"storage": {"existingClaim": "ours"}})
    spec = {"resources": {"requests": {"storage": "5Gi"}}}
    fake.add("persistentvolumeclaims", {"metadata": {"name": "ours"}, "spec": spec})
    assert uninstall() == 0
    assert "claim ours, 5Gi, not created by this release (storage.existingClaim)" in capsys.readouterr().out


def test_a_terminal_is_asked_and_no_changes_nothing(run: Run, helm: FakeHelm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    answers = iter([False, True])
    monkeypatch.setattr("click.confirm", lambda question, err: next(answers))
    assert uninstall() == 1 and not helm.asked
    assert uninstall() == 0 and helm.asked
    assert uninstall("--yes") == 0, "no question"


def test_a_helm_failure_is_reported_as_not_uninstalled(
    run: Run, helm: FakeHelm, capfd: pytest.CaptureFixture[str]
) -> None:
    helm.ends_with(1)
    assert uninstall("--json") == 1
    out, err = capfd.readouterr()
    assert json.loads(out)["uninstalled"] is False
    assert "demo was not uninstalled" in err and json.loads(out)["stays"] == []


def test_json_lists_what_remains(run: Run, fake: FakeApi, capfd: pytest.CaptureFixture[str]) -> None:
    claim(fake)
    assert uninstall("--json") == 0
    document = json.loads(capfd.readouterr().out)
    assert document["uninstalled"] is True
    assert [one["costs"] for one in document["stays"]] == [True, False, True, False]


def test_the_inner_release_of_a_runner_is_refused_and_the_outer_one_named(
    fake: FakeApi, helm: FakeHelm, capsys: pytest.CaptureFixture[str]
) -> None:
    Outer(fake, helm).inner()
    assert uninstall(release="demo-run") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("demo-run: is installed by the runner of demo")
    assert line.endswith("genvalues uninstall demo --namespace team-a")
    assert not helm.asked


def test_an_unknown_release_is_one_line(run: Run, helm: FakeHelm, capsys: pytest.CaptureFixture[str]) -> None:
    assert uninstall(release="dem") == 2
    assert capsys.readouterr().err == 'namespace team-a: release "dem" not found. Releases: demo.\n'
    assert not helm.asked
