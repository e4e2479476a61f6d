"""Taking over from a killed Helm client: which Jobs are stopped, which are waited for, and when nothing is changed."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest

from generator.cluster.fake_api import FakeApi
from generator.cluster.objects import content_of, helm_record, job, pytorch_job
from generator.cluster.waiting import PATIENCE, beside, log_lines, until
from genvalues.cluster.api import Api
from genvalues.cluster.recovery import OperationInProgress, take_over
from genvalues.common.errors import UserError

RECORD = "sh.helm.release.v1.demo.v2"


def looked(fake: FakeApi, times: int = 3) -> Callable[[], bool]:
    seen = fake.requests.count(("list", "jobs.batch"))
    return lambda: fake.requests.count(("list", "jobs.batch")) >= seen + times


@pytest.mark.parametrize("status", ["pending-install", "pending-upgrade", "pending-rollback"])
def test_a_pending_record_is_marked_as_failed_and_otherwise_unchanged(fake: FakeApi, api: Api, status: str) -> None:
    """If it were deleted, Helm 3.17 and 4.3 would reuse the revision number, whose PyTorchJobs exist."""
    before = fake.add("secrets", helm_record(status, revision=2))
    fake.add("secrets", helm_record("deployed"))
    lines = log_lines()
    take_over(api, "demo", 0.02)
    after = fake.objects["secrets", RECORD]
    assert after["metadata"]["labels"] == {**before["metadata"]["labels"], "status": "failed"}
    assert after["type"] == before["type"]
    info = {**content_of(before)["info"], "status": "failed", "description": "the Helm client was killed"}
    assert content_of(after) == {**content_of(before), "info": info}
    assert len(lines) == 1 and f"demo is {status} (revision 2)" in lines[0]
    assert fake.objects["secrets", "sh.helm.release.v1.demo.v1"]["metadata"]["labels"]["status"] == "deployed"


def test_a_running_gate_is_stopped_and_its_training_continues(fake: FakeApi, api: Api) -> None:
    fake.add("secrets", helm_record("pending-upgrade", revision=2))
    fake.add("jobs", job("demo-train-gate", "train-gate"))
    fake.add("pytorchjobs", pytorch_job("demo-train-1", fingerprint="f0"))
    training = fake.get("pytorchjobs", "demo-train-1")
    taking_over = beside(take_over, api, "demo", 0.02)
    until(lambda: fake.objects["jobs", "demo-train-gate"]["spec"]["activeDeadlineSeconds"] == 1)
    until(looked(fake))
    assert fake.objects["secrets", RECORD]["metadata"]["labels"]["status"] == "pending-upgrade", (
        "the gate's pod may still run"
    )
    fake.set_condition("jobs", "demo-train-gate", "Failed", reason="DeadlineExceeded")
    taking_over.result(PATIENCE)
    assert fake.get("pytorchjobs", "demo-train-1") == training
    assert ("delete", "jobs.batch") not in fake.requests, "Helm 3 treats a deleted Job as successful"


@pytest.mark.parametrize("stage", ["tokenize", "cleanup"])
def test_any_other_running_job_is_waited_for_and_not_changed(fake: FakeApi, api: Api, stage: str) -> None:
    fake.add("secrets", helm_record("pending-upgrade", revision=2))
    fake.add("jobs", job(f"demo-{stage}", stage))
    fake.add("jobs", job("demo-runner-1", "runner"))  # no Helm client waits for it
    lines = log_lines()
    taking_over = beside(take_over, api, "demo", 0.02)
    until(looked(fake))
    assert fake.objects["secrets", RECORD]["metadata"]["labels"]["status"] == "pending-upgrade"
    fake.set_condition("jobs", f"demo-{stage}", "Complete")
    taking_over.result(PATIENCE)
    assert not {("patch", "jobs.batch"), ("delete", "jobs.batch")} & set(fake.requests)
    assert [f"demo-{stage}" in line for line in lines if "waiting for" in line] == [True], "logged once"


def next_stage_starts(fake: FakeApi) -> None:
    fake.set_condition("jobs", "demo-tokenize", "Complete")
    fake.add("jobs", job("demo-rehearse", "rehearse"))


def next_hook_is_recorded(fake: FakeApi) -> None:
    fake.merge("secrets", RECORD, {"data": {"more": "x"}})


def client_ends(fake: FakeApi) -> None:
    fake.merge("secrets", RECORD, {"metadata": {"labels": {"status": "deployed"}}})


@pytest.mark.parametrize("happens", [next_stage_starts, next_hook_is_recorded, client_ends])
def test_a_live_helm_client_is_reported_and_its_release_not_changed(
    fake: FakeApi, api: Api, happens: Callable[[FakeApi], None]
) -> None:
    fake.add("secrets", helm_record("pending-upgrade", revision=2))
    fake.add("jobs", job("demo-tokenize", "tokenize"))
    taking_over = beside(take_over, api, "demo", 0.02)
    until(looked(fake))
    happens(fake)
    record = fake.get("secrets", RECORD)
    with pytest.raises(OperationInProgress, match="another Helm client is working on release demo"):
        taking_over.result(PATIENCE)
    assert fake.get("secrets", RECORD) == record


def test_a_change_between_the_last_look_and_the_update_is_not_overwritten(fake: FakeApi, api: Api) -> None:
    fake.add("secrets", helm_record("pending-upgrade", revision=2))

    class Client(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            client_ends(fake)  # right before the update, which is logged

    logging.getLogger("genvalues").addHandler(Client())
    with pytest.raises(OperationInProgress):
        take_over(api, "demo", 0.02)
    assert fake.objects["secrets", RECORD]["metadata"]["labels"]["status"] == "deployed"


def test_a_stage_that_starts_shortly_after_the_last_one_is_seen(fake: FakeApi, api: Api) -> None:
    """One look after the end is not enough: a live client creates the next Job a moment later."""
    fake.add("secrets", helm_record("pending-upgrade", revision=2))
    fake.add("jobs", job("demo-tokenize", "tokenize"))
    taking_over = beside(take_over, api, "demo", 0.2)
    until(looked(fake, 2))
    fake.set_condition("jobs", "demo-tokenize", "Complete")
    until(looked(fake, 1))
    fake.add("jobs", job("demo-rehearse", "rehearse"))
    with pytest.raises(OperationInProgress):
        taking_over.result(PATIENCE)


@pytest.mark.parametrize("content", ["", "!", "eA==", "SDRzSUFBQUFBQUFBQS8="])
def test_an_unreadable_record_is_an_error_with_a_fix(fake: FakeApi, api: Api, content: str) -> None:
    record = helm_record("pending-install", revision=2)
    fake.add("secrets", {**record, "data": {"release": content}})
    with pytest.raises(UserError, match=f"{RECORD}: .*kubectl -n team-a delete secret {RECORD}"):
        take_over(api, "demo", 0.02)
