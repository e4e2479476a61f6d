"""A gate that ends before its job does: another gate follows the job, or the job is stopped."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from generator.cluster.conftest import Trainer
from generator.cluster.fake_api import FakeApi, now
from generator.cluster.objects import Operator, pytorch_job
from generator.cluster.test_gate import OWN, QUICK, is_going
from genvalues.cluster import gate as gates
from genvalues.cluster.api import Api
from genvalues.cluster.config import ClusterConfig
from genvalues.cluster.follower import JobFollower
from genvalues.cluster.kinds import NotAllowed
from genvalues.cluster.succession import OwnJob, starts_again
from genvalues.cluster.trainer_client import StageState, TrainerCommandFailed, read_stage_state
from genvalues.common.errors import UserError

GATE = "demo-llama-lora-train-gate"


def own_job(spec: dict[str, Any], **status: Any) -> dict[str, Any]:
    return {"spec": {"backoffLimit": 30, **spec}, "status": status}


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (own_job({}), True),
        (own_job({}, failed=29), True),
        (own_job({}, failed=30), False),
        (own_job({}, conditions=[{"type": "Failed", "status": "True"}]), False),
        (own_job({"activeDeadlineSeconds": 1}, failed=30), True),
        (own_job({"suspend": True}), True),
    ],
    ids=[
        *("the first failure", "the last retry", "no retries left", "failed"),
        *("stopped by cleanup or a take-over", "suspended by Kueue"),
    ],
)
def test_whether_a_job_starts_another_pod_of_the_gate(found: dict[str, Any], expected: bool) -> None:
    assert starts_again(found) is expected


def test_helm_creates_a_successor_shortly_after_it_has_deleted_a_gate(fake: FakeApi, api: Api) -> None:
    own = OwnJob(GATE, "gone", wait=0.1, interval=0.01)
    assert not own.has_successor(api), "deleted by hand"
    created = fake.add("jobs", {"metadata": {"name": GATE}, **own_job({})})
    assert own.has_successor(api)
    mine = OwnJob(GATE, created["metadata"]["uid"], wait=0.1, interval=0.01)
    assert mine.has_successor(api), "its next pod"
    fake.merge("jobs", GATE, {"metadata": {"deletionTimestamp": now()}})
    assert not mine.has_successor(api)
    assert OwnJob(GATE, "").has_successor(api), "not a pod of the chart"


def of_trainer(stage: str) -> StageState:
    return read_stage_state(stage, Path("/run.yaml"))


def run_gate(
    fake: FakeApi, api: Api, config: ClusterConfig, error: BaseException, has_successor: Callable[[Api], bool]
) -> None:
    """Run a gate that follows a running job until ``error`` ends it."""
    fake.add("pytorchjobs", pytorch_job(OWN, fingerprint="f1"))
    Operator(fake, OWN).start()

    def raise_error(*_: Any) -> None:
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JobFollower, "check", raise_error)
        with pytest.raises(type(error)):
            gates.gate(api, config, "train", OWN, of_trainer, QUICK, has_successor=has_successor)


@pytest.mark.parametrize("error", [SystemExit(143), TrainerCommandFailed("x"), ZeroDivisionError()], ids=type)
@pytest.mark.parametrize("followed", [True, False])
def test_a_job_that_no_other_gate_follows_is_stopped(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer, error: BaseException, followed: bool
) -> None:
    run_gate(fake, api, config, error, lambda _: followed)
    assert is_going(fake, OWN) is not followed


@pytest.mark.parametrize("error", [UserError("x"), NotAllowed(403, "x")], ids=type)
def test_an_error_that_is_not_retried_stops_the_job(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer, error: BaseException
) -> None:
    run_gate(fake, api, config, error, lambda _: True)
    assert is_going(fake, OWN)


def test_a_gate_that_cannot_ask_leaves_the_job_running(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    fake.forbidden.add(("get", "jobs.batch"))  # roles of an earlier chart
    run_gate(fake, api, config, SystemExit(143), OwnJob(GATE, "x", wait=0.1, interval=0.01).has_successor)
    assert not is_going(fake, OWN)


@pytest.mark.parametrize("problem", ["a damaged costs.json", "a damaged input", "a stage before it is not done"])
def test_a_gate_that_fails_before_it_follows_the_running_job_stops_it(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer, problem: str
) -> None:
    """As after an eviction of its pod. Its Job has failed for good, so nothing else would enforce the limits."""
    fake.add("pytorchjobs", pytorch_job(OWN, fingerprint="f1"))
    fake.add("pytorchjobs", pytorch_job("other-train-1", release="other", fingerprint="f1"))
    Operator(fake, OWN).start()
    if problem == "a damaged costs.json":
        trainer.progress.with_name("costs.json").write_text("{")
    elif problem == "a damaged input":
        trainer.ends_with(2)
    else:
        trainer.says(None, up_to_date=False)
    with pytest.raises(UserError):
        gates.gate(api, config, "train", OWN, of_trainer, QUICK, has_successor=lambda _: True)
    assert is_going(fake, OWN)
    assert not is_going(fake, "other-train-1"), "it has a gate of its own"


@pytest.mark.parametrize("followed", [True, False])
def test_a_gate_whose_retries_are_used_up_before_it_follows_the_running_job_stops_it(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer, followed: bool
) -> None:
    fake.add("pytorchjobs", pytorch_job(OWN, fingerprint="f1"))
    Operator(fake, OWN).start()
    trainer.ends_with(1)
    with pytest.raises(TrainerCommandFailed):
        gates.gate(api, config, "train", OWN, of_trainer, QUICK, has_successor=lambda _: followed)
    assert is_going(fake, OWN) is not followed


def test_a_volume_that_fails_for_a_while_ends_no_training(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    fake.add("pytorchjobs", pytorch_job(OWN, fingerprint="f1"))
    Operator(fake, OWN).start()
    monkeypatch.setattr("genvalues.common.json_files.open_regular", fail)
    with pytest.raises(OSError, match=r"Input/output error.*costs\.json"):
        gates.gate(api, config, "train", OWN, of_trainer, QUICK, has_successor=lambda _: True)
    assert not is_going(fake, OWN)
