"""cleanup with a fake API server: afterwards nothing of the release runs, and nothing else has changed."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from generator.cluster.fake_api import FakeApi
from generator.cluster.objects import RUN, helm_record, job, pod, pytorch_job
from generator.cluster.waiting import PATIENCE, beside, until
from genvalues.cluster.api import Api
from genvalues.cluster.cleanup import StillRunning, cleanup, helm
from genvalues.cluster.workloads import workload_for

Object = dict[str, Any]


def clean(api: Api, release: str = "demo", timeout: float = 5.0, interval: float = 0.02, **options: Any) -> None:
    cleanup(api, release, timeout, interval=interval, workload=workload_for("pytorchjob"), **options)


def add_job(fake: FakeApi, name: str, stage: str, **options: Any) -> Object:
    """A running Job with its pod."""
    added = fake.add("jobs", job(name, stage, **options))
    fake.add("pods", pod(f"{name}-x1", added, "Job", container=stage))
    return added


def job_controller(fake: FakeApi) -> None:
    """Fails a Job with a deadline of 1 s and stops a suspended one, as the controller does: the pods first."""

    def act(changed: Object) -> None:
        name = changed["metadata"]["name"]
        for owned in fake.owned_by(changed):
            if changed["spec"].get("suspend"):
                threading.Timer(0.1, fake.remove, ("pods", owned)).start()  # its grace period
            elif changed["spec"].get("activeDeadlineSeconds") == 1:
                fake.remove("pods", owned)
        if changed["spec"].get("activeDeadlineSeconds") == 1:
            fake.set_condition("jobs", name, "Failed", reason="DeadlineExceeded")

    fake.after.append(("patch", "jobs", act))


def test_a_running_hook_job_is_never_deleted_before_it_has_failed(fake: FakeApi, api: Api) -> None:
    job_controller(fake)
    states: list[bool] = []

    def was_finished(deleted: Object) -> None:
        states.append(any(one["type"] == "Failed" for one in deleted.get("status", {}).get("conditions", [])))

    fake.after.append(("delete", "jobs", was_finished))
    add_job(fake, "demo-tokenize", "tokenize")
    add_job(fake, "demo-train-gate", "train-gate")
    clean(api)
    assert (fake.names("jobs"), fake.names("pods"), states) == ([], [], [True, True])


def test_pytorch_jobs_are_deleted_and_their_pods_waited_for(fake: FakeApi, api: Api) -> None:
    training = fake.add("pytorchjobs", pytorch_job("demo-train-3", fingerprint="f1"))
    for index in (0, 1):
        fake.add("pods", pod(f"demo-train-3-worker-{index}", training, "PyTorchJob"))
    running = beside(clean, api)
    until(lambda: "deletionTimestamp" in fake.get("pytorchjobs", "demo-train-3")["metadata"])  # type: ignore[index]
    fake.remove("pods", "demo-train-3-worker-0")
    seen = len(fake.requests)
    until(lambda: len(fake.requests) > seen + 12)
    assert not running.done(), "a Trainium node is still held"
    fake.remove("pods", "demo-train-3-worker-1")
    fake.remove("pytorchjobs", "demo-train-3")
    running.result(PATIENCE)


def test_a_stage_started_meanwhile_by_a_live_helm_client_is_stopped_too(fake: FakeApi, api: Api) -> None:
    job_controller(fake)

    def next_stage(deleted: Object) -> None:
        if deleted["metadata"]["name"] == "demo-tokenize":
            threading.Timer(0.2, add_job, (fake, "demo-merge", "merge")).start()

    fake.after.append(("delete", "jobs", next_stage))
    add_job(fake, "demo-tokenize", "tokenize")
    clean(api, interval=0.1)
    assert ("jobs", "demo-merge") not in fake.objects
    assert any(change == "ADDED" and item["metadata"]["name"] == "demo-merge" for change, _, item in fake.changes)


def test_the_own_job_other_releases_and_other_objects_are_not_changed(fake: FakeApi, api: Api) -> None:
    add_job(fake, "demo-cleanup", "cleanup")
    add_job(fake, "other-tokenize", "tokenize", release="other")
    fake.add("pytorchjobs", pytorch_job("other-train-1", release="other", fingerprint="f1"))
    theirs = job("their-own-job", "anything")
    del theirs["metadata"]["annotations"]
    fake.add("jobs", theirs)
    before = (fake.names("jobs"), fake.names("pods"), fake.names("pytorchjobs"))
    clean(api)
    assert (fake.names("jobs"), fake.names("pods"), fake.names("pytorchjobs")) == before
    assert not {verb for verb, _ in fake.requests} & {"patch", "delete"}


def test_finished_jobs_and_a_suspended_leftover_are_deleted(fake: FakeApi, api: Api) -> None:
    add_job(fake, "demo-tokenize", "tokenize")
    fake.set_condition("jobs", "demo-tokenize", "Complete")
    fake.add("pytorchjobs", pytorch_job("demo-train-1"))  # left by `uninstall --no-hooks`: blocks the next install
    fake.add("pytorchjobs", pytorch_job("demo-preflight-1", "preflight"))  # the probe of a killed preflight
    clean(api)
    assert (fake.names("jobs"), fake.names("pytorchjobs"), fake.names("pods")) == ([], [], [])


def test_the_pod_of_helm_test_is_deleted_although_it_has_no_owner(fake: FakeApi, api: Api) -> None:
    fake.add("pods", {"metadata": job("demo-verify", "verify")["metadata"], "status": {"phase": "Succeeded"}})
    clean(api)
    assert fake.names("pods") == []


def test_cleanup_works_without_the_training_operator(fake: FakeApi, api: Api) -> None:
    job_controller(fake)
    fake.crds = set()
    add_job(fake, "demo-tokenize", "tokenize")
    clean(api)
    assert fake.names("jobs") == []


def test_objects_that_do_not_end_are_named_at_the_deadline(fake: FakeApi, api: Api) -> None:
    add_job(fake, "demo-tokenize", "tokenize")  # no controller makes it fail
    with pytest.raises(StillRunning, match="kubectl -n team-a describe job/demo-tokenize pod/demo-tokenize-x1"):
        clean(api, timeout=0.3)
    assert ("delete", "jobs.batch") not in fake.requests


def test_an_outage_of_the_api_server_is_waited_for(fake: FakeApi, api: Api) -> None:
    add_job(fake, "demo-tokenize", "tokenize")
    running = beside(clean, api)
    until(lambda: ("patch", "jobs.batch") in fake.requests)
    fake.away = True
    fake.remove("pods", "demo-tokenize-x1")
    fake.set_condition("jobs", "demo-tokenize", "Failed")
    with pytest.raises(TimeoutError):
        running.result(0.3)
    fake.away = False
    running.result(PATIENCE)
    assert fake.names("jobs") == []


def test_a_detached_release_stops_its_runner_first_then_the_stages_then_the_inner_release(
    fake: FakeApi, api: Api
) -> None:
    job_controller(fake)
    add_job(fake, "demo-runner-1", "runner")
    add_job(fake, "demo-run-tokenize", "tokenize", release="demo-run")
    training = fake.add("pytorchjobs", pytorch_job("demo-run-train-1", release="demo-run", fingerprint="f1"))
    order: list[str] = []

    def note(changed: Object) -> None:
        lives = "demo-runner-1-x1" in fake.names("pods")
        order.append(changed["metadata"]["name"] + (" while the runner runs" if lives else ""))

    fake.after += [("patch", "jobs", note), ("delete", "pytorchjobs", note)]
    clean(api, run_helm=lambda arguments, seconds: order.append(" ".join(arguments)))
    assert order == [
        "demo-runner-1 while the runner runs",  # to stop it
        "demo-run-tokenize",
        training["metadata"]["name"],
        "uninstall demo-run --namespace team-a --no-hooks --ignore-not-found",
    ]
    assert fake.names("jobs") == []


def test_a_rollback_from_detached_to_attached_stops_the_stages_and_leaves_the_inner_release(
    fake: FakeApi, api: Api
) -> None:
    """Helm runs the hooks of the revision that it restores, with the roles of mode attached."""
    job_controller(fake)
    fake.forbidden |= {(verb, "configmaps") for verb in ("list", "get", "delete")} | {("delete", "secrets")}
    add_job(fake, "demo-runner-2", "runner")
    add_job(fake, "demo-run-tokenize", "tokenize", release="demo-run")
    fake.add("pytorchjobs", pytorch_job("demo-run-train-1", release="demo-run", fingerprint="f1"))
    clean(api, run_helm=lambda *_: pytest.fail("Helm would not be allowed to"))
    assert (fake.names("jobs"), fake.names("pytorchjobs"), fake.names("pods")) == ([], [], [])


def test_uninstall_finds_the_records_of_the_inner_release_in_secrets_and_in_config_maps(
    fake: FakeApi, api: Api
) -> None:
    """Of a chart that kept them in Secrets, whether or not a later runner has moved them."""
    job_controller(fake)
    add_job(fake, "demo-runner-1", "runner")
    for release in ("demo-run", "demo", "other"):
        fake.add("secrets", helm_record("deployed", revision=3, release=release))
    fake.add("secrets", {"metadata": {"name": "hf-token"}})
    config = job("demo-run-config", "config", release="demo-run")["metadata"]
    fake.add("configmaps", {"metadata": config})
    fake.add("configmaps", {"metadata": {"name": "mine"}})
    clean(api, run_helm=lambda *_: None)
    assert fake.names("secrets") == ["hf-token", "sh.helm.release.v1.demo.v3", "sh.helm.release.v1.other.v3"]
    assert fake.names("configmaps") == ["mine"]
    assert not {("get", "secrets"), ("list", "secrets")} & set(fake.requests)


def test_helm_uninstalls_the_inner_release_where_its_records_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    command = tmp_path / "helm"
    command.write_text(f"#!/bin/sh\necho $HELM_DRIVER > {tmp_path}/driver\n")
    command.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))  # the helm next to it takes precedence
    helm(["uninstall", "demo-run"], 10)
    assert (tmp_path / "driver").read_text() == "configmap\n"


def test_stages_left_by_a_runner_are_stopped_after_an_upgrade_to_attached(fake: FakeApi, api: Api) -> None:
    job_controller(fake)
    add_job(fake, "demo-run-tokenize", "tokenize", release="demo-run")
    fake.add("pytorchjobs", pytorch_job("demo-run-train-1", release="demo-run", fingerprint="f1"))
    clean(api, run=RUN)
    assert (fake.names("jobs"), fake.names("pytorchjobs"), fake.names("pods")) == ([], [], [])


@pytest.mark.parametrize("run", ["", RUN])
def test_an_unrelated_release_with_the_name_of_the_inner_one_is_not_changed(fake: FakeApi, api: Api, run: str) -> None:
    add_job(fake, "demo-run-tokenize", "tokenize", release="demo-run", run="another-run")
    clean(api, run=run, run_helm=lambda *_: pytest.fail("nothing to uninstall"))
    assert fake.names("jobs") == ["demo-run-tokenize"]
