"""Kueue: a job enters its queue when the gate releases it, and the gate says why it waits there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from generator.cluster.conftest import Trainer
from generator.cluster.fake_api import FakeApi
from generator.cluster.objects import pytorch_job
from generator.cluster.test_gate import OWN, QUICK, Gate, is_going, is_released
from generator.cluster.waiting import PATIENCE, until
from genvalues.cluster.api import Api
from genvalues.cluster.config import ClusterConfig
from genvalues.cluster.follower import GateTimings
from genvalues.cluster.queueing import NOT_RELEASED

QUEUE = "kueue.x-k8s.io/queue-name"
SOON = GateTimings(**{**vars(QUICK), "workload": 0.3})


@pytest.fixture
def queued(config: ClusterConfig) -> ClusterConfig:
    return config.model_copy(update={"job": config.job.model_copy(update={"queue_name": "trn"})})


@pytest.fixture
def kueue(fake: FakeApi) -> FakeApi:
    fake.crds |= {"localqueues", "workloads"}
    return fake


@pytest.fixture(autouse=True)
def ended(fake: FakeApi, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every gate has ended before the next test begins: its job is gone."""
    started: list[Gate] = []
    begin = Gate.__init__

    def noted(self: Gate, *arguments: Any, **options: Any) -> None:
        started.append(self)
        begin(self, *arguments, **options)

    monkeypatch.setattr(Gate, "__init__", noted)
    yield
    fake.remove("pytorchjobs", OWN)
    for gate in started:
        gate.future.exception(PATIENCE)


def add(fake: FakeApi, queue: str = "") -> dict[str, Any]:
    created = pytorch_job(OWN)
    created["metadata"]["labels"] |= {QUEUE: queue} if queue else {}
    return fake.add("pytorchjobs", created)


def add_workload(fake: FakeApi, job: dict[str, Any], *conditions: dict[str, str]) -> None:
    meta = {"name": "pytorchjob-x", "labels": {"kueue.x-k8s.io/job-uid": job["metadata"]["uid"]}}
    fake.add("workloads", {"metadata": meta, "status": {"conditions": [*conditions]}})


def queue_of(fake: FakeApi) -> str | None:
    job = fake.get("pytorchjobs", OWN)
    assert job
    return str(job["metadata"]["labels"].get(QUEUE, "")) if "annotations" in job["metadata"] else None


def fingerprint_of(fake: FakeApi) -> str:
    return str((fake.get("pytorchjobs", OWN) or {})["metadata"]["annotations"].get("llama-lora/fingerprint", ""))


def test_a_job_that_kueue_holds_back_enters_the_queue_of_the_values(
    kueue: FakeApi, api: Api, queued: ClusterConfig, trainer: Trainer
) -> None:
    job = add(kueue, NOT_RELEASED)
    add_workload(kueue, job)
    Gate(api, queued)
    until(lambda: fingerprint_of(kueue) == "f1", "the release")
    assert queue_of(kueue) == "trn" and not is_released(kueue), "Kueue starts it"


@pytest.mark.parametrize("held", [NOT_RELEASED, ""])
def test_without_a_queue_the_gate_starts_the_job_itself(
    kueue: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer, held: str
) -> None:
    add(kueue, held)
    Gate(api, config)
    until(lambda: is_released(kueue), "the release")
    assert queue_of(kueue) == "" and fingerprint_of(kueue) == "f1"


@pytest.mark.parametrize("held", [NOT_RELEASED, "default"])
def test_where_there_is_a_default_queue_kueue_starts_the_job_from_it_after_the_release(
    kueue: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer, held: str
) -> None:
    kueue.default_queue = True
    add(kueue, held)
    Gate(api, config)
    until(lambda: fingerprint_of(kueue) == "f1", "the release")
    assert queue_of(kueue) == "default" and not is_released(kueue)


def test_kueues_reason_is_logged_while_the_job_waits(
    kueue: FakeApi, api: Api, queued: ClusterConfig, trainer: Trainer
) -> None:
    full = "couldn't assign flavors to pod set worker: insufficient unused quota for aws.amazon.com/neuron"
    job = add(kueue, NOT_RELEASED)
    add_workload(kueue, job, {"type": "QuotaReserved", "status": "False", "message": full})
    running = Gate(api, queued, timings=SOON)
    until(lambda: any(f"{OWN} waits in queue trn: {full}" in line for line in running.logged))
    reserved = {"type": "QuotaReserved", "status": "True"}
    checks = {"type": "Admitted", "status": "False", "message": "The workload has failed admission checks"}
    kueue.merge("workloads", "pytorchjob-x", {"status": {"conditions": [reserved, checks]}})
    until(lambda: any("failed admission checks" in line for line in running.logged))
    assert not running.future.done(), "a job may wait for its quota as long as it takes"
    kueue.merge("pytorchjobs", OWN, {"spec": {"runPolicy": {"suspend": False}}})
    kueue.remove("workloads", "pytorchjob-x")
    looks = len(kueue.requests)
    until(lambda: len(kueue.requests) > looks + 30, "a while in which the job runs")
    kueue.merge("pytorchjobs", OWN, {"spec": {"runPolicy": {"suspend": True}}})  # evicted
    add_workload(kueue, job, {"type": "QuotaReserved", "status": "False", "message": "Preempted by another"})
    until(lambda: any("Preempted by another" in line for line in running.logged))


@pytest.mark.parametrize(("installed", "words"), [(True, "kubeflow.org/pytorchjob"), (False, "not installed")])
def test_a_job_that_kueue_does_not_manage_fails_with_the_integration_to_enable(
    fake: FakeApi, api: Api, queued: ClusterConfig, trainer: Trainer, installed: bool, words: str
) -> None:
    fake.crds |= {"localqueues", "workloads"} if installed else set()
    add(fake, NOT_RELEASED)
    failure = Gate(api, queued, timings=SOON).fails()
    assert failure.status == 2 and words in failure.reason and "kueue.queueName" in failure.reason
    assert is_going(fake, OWN)


def test_roles_of_an_earlier_chart_do_not_fail_a_job_in_a_queue(
    kueue: FakeApi, api: Api, queued: ClusterConfig, trainer: Trainer
) -> None:
    kueue.forbidden.add(("list", "workloads.kueue.x-k8s.io"))
    add(kueue)
    running = Gate(api, queued, timings=SOON)
    until(lambda: kueue.requests.count(("list", "workloads.kueue.x-k8s.io")) > 20)
    assert not running.future.done()
