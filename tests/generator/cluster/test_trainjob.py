"""A stage that runs as a TrainJob is released, followed, stopped and cleaned up as one that runs as a PyTorchJob."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from generator.cluster.conftest import Trainer
from generator.cluster.fake_api import FakeApi, now
from generator.cluster.objects import Operator, labels, pod, pytorch_job, train_job
from generator.cluster.test_gate import EARLIER, OWN, Gate, is_going
from generator.cluster.waiting import until
from genvalues.cluster.api import Api
from genvalues.cluster.cleanup import cleanup
from genvalues.cluster.config import ClusterConfig
from genvalues.cluster.guards import StallTimer, reserve_hours
from genvalues.cluster.objects import INDEX, QUEUE_NAME, latest_of_each_worker
from genvalues.cluster.queueing import NOT_RELEASED, PREBUILT, release
from genvalues.cluster.workloads import is_finished, is_released, workload_for, workload_of
from genvalues.common.errors import UserError

TRAINJOBS = "trainjobs.trainer.kubeflow.org"


@pytest.fixture
def config(values: dict[str, Any]) -> ClusterConfig:
    return ClusterConfig.model_validate({**values, "workload": "trainjob"})


@pytest.fixture
def trainer_v2(fake: FakeApi) -> FakeApi:
    """A cluster without the training operator."""
    fake.crds = {"trainjobs", "trainingruntimes"}
    return fake


def add(fake: FakeApi, name: str, **options: Any) -> None:
    fake.add("trainingruntimes", {"metadata": {"name": name, "labels": labels("demo", "train", "run")}})
    fake.add("trainjobs", train_job(name, **options))


def names(fake: FakeApi) -> tuple[list[str], list[str]]:
    return fake.names("trainjobs"), fake.names("trainingruntimes")


@pytest.fixture
def released(trainer_v2: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer) -> Iterator[tuple[Gate, Operator]]:
    add(trainer_v2, OWN)
    running = Gate(api, config)
    until(lambda: (trainer_v2.get("trainjobs", OWN) or {})["spec"]["suspend"] is False, "the release")
    operator = Operator(trainer_v2, OWN, "trainjobs")
    operator.start()
    until(lambda: sum(path.endswith("/log") for path in trainer_v2.paths) >= 2, "both logs")
    yield running, operator


def test_the_gate_releases_and_follows_a_trainjob_to_its_end(
    released: tuple[Gate, Operator], trainer_v2: FakeApi, trainer: Trainer
) -> None:
    running, operator = released
    found = trainer_v2.get("trainjobs", OWN)
    assert found and is_released(found) and not is_finished(found)
    trainer.says("f1", up_to_date=True)
    for index in (0, 1):
        operator.end_worker(index, 0)
    operator.succeed()
    running.succeeds()
    assert running.logged[-1] == "train: done"
    assert f"train: released TrainJob {OWN}" in running.logged


def test_a_worker_that_ends_with_status_2_ends_the_trainjob_at_once(
    released: tuple[Gate, Operator], trainer_v2: FakeApi
) -> None:
    running, operator = released
    operator.write(1, "lora.r is not set")
    operator.restart_worker(1, 2)
    failure = running.fails()
    assert failure.status == 2 and operator.worker(1) in failure.reason and failure.tail == ["lora.r is not set"]
    assert is_going_with_its_runtime(trainer_v2)


def test_a_worker_that_fails_too_often_ends_a_trainjob_that_shows_no_condition(
    released: tuple[Gate, Operator], trainer_v2: FakeApi
) -> None:
    running, operator = released
    operator.restart_worker(0, 1)  # the first of one retry
    operator.restart_worker(0, 1, put_off=True)
    failure = running.fails()
    assert failure.status == 1 and "failed 2 times (backoffLimit 1)" in failure.reason
    assert is_going_with_its_runtime(trainer_v2)


@pytest.fixture
def replaced(released: tuple[Gate, Operator], trainer_v2: FakeApi) -> str:
    """The pod that the Job of the TrainJob has created in place of an evicted one, which stays."""
    owner = trainer_v2.get("trainjobs", OWN)
    assert owner
    evicted = released[1].worker(1)
    long_ago = {"creationTimestamp": "2025-01-01T00:00:00Z", "annotations": {INDEX: "1"}}
    over = [{"name": "node", "state": {"terminated": {"exitCode": 143}}, "restartCount": 0}]
    status = {"phase": "Failed", "reason": "Evicted", "containerStatuses": over}
    trainer_v2.merge("pods", evicted, {"metadata": long_ago, "status": status})
    replacement = pod(f"{OWN}-node-0-1-new", owner, "TrainJob", container="node")
    replacement["metadata"]["annotations"] = {INDEX: "1"}
    trainer_v2.add("pods", replacement)
    return f"{OWN}-node-0-1-new"


def test_a_trainjob_with_a_worker_that_was_evicted_and_replaced_succeeds(
    released: tuple[Gate, Operator], replaced: str, trainer_v2: FakeApi, trainer: Trainer
) -> None:
    running, operator = released
    trainer.says("f1", up_to_date=True)
    operator.end_worker(0, 0)
    trainer_v2.merge("pods", replaced, {"status": {"phase": "Succeeded"}})
    operator.succeed()
    running.succeeds()


def test_a_trainjob_stalls_although_an_evicted_worker_is_still_listed(
    released: tuple[Gate, Operator], replaced: str, trainer_v2: FakeApi
) -> None:
    job = trainer_v2.get("trainjobs", OWN)
    pods = [item for (plural, _), item in trainer_v2.objects.items() if plural == "pods"]
    assert job and len(pods) == 3
    stall = StallTimer()
    assert [stall.seconds(job, latest_of_each_worker(pods), {}, at) for at in (100.0, 160.0)] == [0, 60]
    released[1].fail("the end of the test")
    released[0].fails()


def test_a_failed_trainjob_fails_the_stage_with_trainers_message(released: tuple[Gate, Operator]) -> None:
    running, operator = released
    operator.fail("jobset failed due to one or more job failures")
    assert running.fails().reason == f"TrainJob {OWN}: jobset failed due to one or more job failures"


@pytest.mark.parametrize(
    ("queue", "now_in", "expected"), [("", "", ""), ("", "default", "default"), ("trn", "", "trn")]
)
def test_a_trainjob_that_kueue_holds_back_is_released_into_its_queue_or_started(
    trainer_v2: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer, queue: str, now_in: str, expected: str
) -> None:
    add(trainer_v2, OWN)
    held = {PREBUILT: NOT_RELEASED, **({QUEUE_NAME: now_in} if now_in else {})}
    trainer_v2.merge("trainjobs", OWN, {"metadata": {"labels": held}})
    release(api, workload_for("trainjob"), trainer_v2.objects["trainjobs", OWN], "f1", queue)
    found = trainer_v2.objects["trainjobs", OWN]
    assert is_released(found) and PREBUILT not in found["metadata"]["labels"]
    assert found["metadata"]["labels"].get(QUEUE_NAME, "") == expected
    assert found["spec"]["suspend"] is (expected != ""), "Kueue starts it from a queue"


def is_going_with_its_runtime(fake: FakeApi) -> bool:
    """Whether both are to be deleted, and Trainer cannot start pods for a TrainJob that is being deleted."""
    found = fake.get("trainjobs", OWN)
    assert found and found["spec"]["suspend"] is True, "Trainer creates the JobSet of a TrainJob again"
    return "deletionTimestamp" in found["metadata"] and fake.names("trainingruntimes") == []


def test_an_up_to_date_stage_deletes_its_suspended_trainjob_and_its_runtime(
    trainer_v2: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    trainer.says("f1", up_to_date=True)
    add(trainer_v2, OWN)
    Gate(api, config).succeeds()
    assert names(trainer_v2) == ([], [])


def test_an_earlier_trainjob_with_the_same_fingerprint_keeps_its_runtime_and_is_followed(
    trainer_v2: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    add(trainer_v2, EARLIER, fingerprint="f1")
    operator = Operator(trainer_v2, EARLIER, "trainjobs")
    operator.start()
    add(trainer_v2, OWN)
    running = Gate(api, config)
    until(lambda: names(trainer_v2) == ([EARLIER], [EARLIER]), "the deletion of the new one")
    trainer.says("f1", up_to_date=True)
    for index in (0, 1):
        operator.end_worker(index, 0)
    operator.succeed()
    running.succeeds()


@pytest.mark.parametrize("waits", [False, True], ids=["with pods", "in a queue"])
def test_a_running_job_of_the_other_workload_is_never_joined_in_its_run_folder(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer, waits: bool
) -> None:
    fake.crds |= {"trainjobs", "trainingruntimes"}
    fake.add("pytorchjobs", pytorch_job(EARLIER, fingerprint="f1"))
    if waits:
        fake.merge("pytorchjobs", EARLIER, {"spec": {"runPolicy": {"suspend": True}}})
    else:
        Operator(fake, EARLIER).start()
    add(fake, OWN)
    refused = Gate(api, config).fails(UserError)
    assert refused.where == "workload" and f"PyTorchJob {EARLIER}" in str(refused)
    assert f"delete pytorchjob {EARLIER}" in refused.fix
    assert (fake.get("trainjobs", OWN) or {})["spec"]["suspend"] is True
    assert not is_going(fake, EARLIER)


def test_without_the_right_to_list_the_other_workload_its_pods_are_waited_for(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    fake.crds |= {"trainjobs", "trainingruntimes"}
    fake.forbidden.add(("list", "pytorchjobs.kubeflow.org"))
    fake.add("pytorchjobs", pytorch_job(EARLIER, fingerprint="f0"))
    Operator(fake, EARLIER).start()
    add(fake, OWN)
    refused = Gate(api, config).fails(UserError)
    assert f"{EARLIER}-worker-0" in str(refused)
    assert (fake.get("trainjobs", OWN) or {})["spec"]["suspend"] is True


def test_cleanup_stops_trainjobs_and_leaves_no_runtime(trainer_v2: FakeApi, api: Api) -> None:
    add(trainer_v2, OWN, fingerprint="f1")
    operator = Operator(trainer_v2, OWN, "trainjobs")
    operator.start()
    trainer_v2.add("trainingruntimes", {"metadata": {"name": "left", "labels": labels("demo", "train", "run")}})
    trainer_v2.add("trainingruntimes", {"metadata": {"name": "other", "labels": labels("other", "train", "run")}})

    def end(_: Any) -> None:
        for index in (0, 1):
            trainer_v2.remove("pods", operator.worker(index))
        trainer_v2.remove("trainjobs", OWN)

    trainer_v2.after.append(("patch", "trainjobs", end))
    cleanup(api, "demo", 5, workload=workload_for("trainjob"), interval=0.01)
    assert names(trainer_v2) == ([], ["other"])


def test_cleanup_deletes_what_an_earlier_revision_ran_with_the_other_workload(fake: FakeApi, api: Api) -> None:
    fake.crds |= {"trainjobs", "trainingruntimes"}
    fake.add("pytorchjobs", pytorch_job(EARLIER))
    cleanup(api, "demo", 5, workload=workload_for("trainjob"), interval=0.01)
    assert fake.names("pytorchjobs") == []


@pytest.mark.parametrize("own", ["pytorchjob", "trainjob"])
def test_cleanup_needs_the_right_to_its_own_workload_only(fake: FakeApi, api: Api, own: str) -> None:
    fake.crds |= {"trainjobs", "trainingruntimes"}
    resources = {"pytorchjob": "pytorchjobs.kubeflow.org", "trainjob": TRAINJOBS}
    (other,) = resources.keys() - {own}
    fake.forbidden.add(("list", resources[other]))
    cleanup(api, "demo", 5, workload=workload_for(own), interval=0.01)
    with pytest.raises(Exception, match=resources[other]):
        cleanup(api, "demo", 5, workload=workload_for(other), interval=0.01)


def test_what_a_trainjob_says_about_its_pods_and_its_start() -> None:
    found = train_job(OWN, workers=3, fingerprint="f1")
    workload = workload_of(found)
    assert (workload.workers(found), workload.processes(found), workload.retries(found)) == (3, 2, 1)
    assert reserve_hours(found) == pytest.approx(3 * 120 / 3600), "what it costs to stop it"
    assert workload.started(found) == 0
    found["status"] = {"conditions": [{"type": "Suspended", "status": "True", "lastTransitionTime": now()}]}
    assert workload.started(found) == 0
    found["status"]["conditions"][0] |= {"status": "False", "lastTransitionTime": "2026-01-01T00:00:00Z"}
    assert workload.started(found) == 1767225600
