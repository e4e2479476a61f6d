"""The gate with a fake API server: which PyTorchJob it runs, and how it ends."""

from __future__ import annotations

import json
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from generator.cluster.conftest import Trainer
from generator.cluster.fake_api import FakeApi, now
from generator.cluster.objects import Operator, pod, pytorch_job
from generator.cluster.waiting import PATIENCE, beside, log_lines, until
from genvalues.cluster.api import Api, connect
from genvalues.cluster.config import ClusterConfig
from genvalues.cluster.failures import StageFailed, describe_failure, parse_failure
from genvalues.cluster.follower import GateTimings
from genvalues.cluster.gate import gate
from genvalues.cluster.kinds import PYTORCH_JOBS
from genvalues.cluster.progress import describe_progress
from genvalues.cluster.trainer_client import TrainerCommandFailed, read_stage_state
from genvalues.common.errors import UserError
from genvalues.common.manifests import SKIPPED

OWN, EARLIER = "demo-llama-lora-train-3", "demo-llama-lora-train-2"
MANIFEST = {
    **{"stage": "train", "fingerprint": "f1", "started": "s", "finished": "f", "versions": {}, "facts": {"steps": 6}},
    "outputs": {"runs/demo/x": {"bytes": 3, "sha256": "abc"}},
}
LOGGED_MANIFEST = (
    'train: manifest {"stage":"train","fingerprint":"f1","started":"s","finished":"f","versions":{},'
    '"facts":{"steps":6},"files":1,"bytes":3,"outputs":{"runs/demo/x":3}}'
)
QUICK = GateTimings(
    interval=0.03, progress=0.0, cannot_start=0.2, others_end=0.3, last_words=0.3, manifest=0.2, pods_gone=0.5
)


class Gate:
    """A gate that runs in a thread, and the lines that it logs."""

    def __init__(self, api: Api, config: ClusterConfig, *, timings: GateTimings = QUICK, stage: str = "train") -> None:
        self.logged = log_lines()
        own = OWN.replace("train", stage)
        read_state = lambda of: read_stage_state(of, Path("/etc/llama-lora/run.yaml"))  # noqa: E731
        self.future: Future[None] = beside(gate, api, config, stage, own, read_state, timings)

    def succeeds(self) -> None:
        self.future.result(PATIENCE)

    def fails(self, kind: type[Exception] = StageFailed) -> Any:
        with pytest.raises(kind) as failure:
            self.future.result(PATIENCE)
        return failure.value


def is_released(fake: FakeApi, name: str = OWN) -> bool:
    job = fake.get("pytorchjobs", name)
    return bool(job and not job["spec"]["runPolicy"]["suspend"])


def is_going(fake: FakeApi, name: str) -> bool:
    """Whether its deletion was requested."""
    job = fake.get("pytorchjobs", name)
    return job is None or "deletionTimestamp" in job["metadata"]


def let_the_gate_look(fake: FakeApi) -> None:
    """Wait for several requests of the gate."""
    seen = len(fake.requests)
    until(lambda: len(fake.requests) > seen + 4)


def released_and_running(fake: FakeApi, api: Api, config: ClusterConfig, **options: Any) -> tuple[Gate, Operator]:
    fake.add("pytorchjobs", pytorch_job(OWN))
    running = Gate(api, config, **options)
    until(lambda: is_released(fake), "the release")
    until(lambda: ("watch", "pods") in fake.requests, "the watch")
    operator = Operator(fake, OWN)
    operator.start()
    until(lambda: sum(path.endswith("/log") for path in fake.paths) >= 2, "both logs")
    return running, operator


def test_an_up_to_date_stage_deletes_its_suspended_job_and_requests_no_node(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    trainer.says("f1", up_to_date=True)
    trainer.manifest.write_text(json.dumps(MANIFEST))
    fake.add("pytorchjobs", pytorch_job(OWN))
    (running := Gate(api, config)).succeeds()
    assert fake.names("pytorchjobs") == []
    assert running.logged[-2:] == [LOGGED_MANIFEST, f"train: {SKIPPED}"]
    assert ("patch", "pytorchjobs.kubeflow.org") not in fake.requests


def test_the_gate_succeeds_when_every_worker_has_and_the_manifest_is_there(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    running, operator = released_and_running(fake, api, config)
    job = fake.get("pytorchjobs", OWN)
    assert job and job["metadata"]["annotations"]["llama-lora/fingerprint"] == "f1"
    operator.end_worker(0, 0)
    operator.succeed()  # as the operator does when the first worker has succeeded
    until(lambda: any("Succeeded" in line for line in running.logged))
    assert not running.future.done()
    trainer.says("f1", up_to_date=True)
    trainer.manifest.write_text(json.dumps(MANIFEST))
    operator.end_worker(1, 0)
    running.succeeds()
    assert running.logged[-2:] == [LOGGED_MANIFEST, "train: done"]


@pytest.mark.parametrize("hangs", [False, True])
@pytest.mark.parametrize("succeeded", [False, True])
def test_a_job_whose_workers_have_not_all_ended_is_followed_although_its_stage_is_up_to_date(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer, succeeded: bool, hangs: bool
) -> None:
    """A gate that starts between the first worker's end and the last one's, as after an upgrade."""
    fake.add("pytorchjobs", pytorch_job(EARLIER, fingerprint="f1"))
    fake.add("pytorchjobs", pytorch_job(OWN))
    operator = Operator(fake, EARLIER)
    operator.start()
    operator.end_worker(0, 0)
    if succeeded:
        operator.succeed()
    trainer.says("f1", up_to_date=True)
    running = Gate(api, config)
    until(lambda: any(f"following PyTorchJob {EARLIER}" in line for line in running.logged))
    assert fake.names("pytorchjobs") == [EARLIER], "no new job is needed"
    if not succeeded:
        operator.succeed()
    if hangs:
        assert operator.worker(1) in running.fails().reason
        assert is_going(fake, EARLIER), "the worker that hangs holds a Trainium node"
    else:
        operator.end_worker(1, 0)
        running.succeeds()


def test_workers_that_still_run_long_after_the_first_success_fail_the_stage(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    running, operator = released_and_running(fake, api, config)
    operator.end_worker(0, 0)
    trainer.says("f1", up_to_date=True)
    operator.succeed()
    failure = running.fails()
    assert failure.status == 1 and operator.worker(1) in failure.reason
    assert is_going(fake, OWN), "the worker that still runs holds a Trainium node"


def test_a_succeeded_job_with_a_failed_worker_fails_the_stage(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    running, operator = released_and_running(fake, api, config)
    trainer.says("f1", up_to_date=True)
    operator.end_worker(0, 0)
    operator.end_worker(1, 1)
    operator.succeed()
    failure = running.fails()
    assert failure.status == 1 and operator.worker(1) in failure.reason
    assert is_going(fake, OWN), "a third worker may still run"


def test_a_succeeded_job_without_the_manifest_fails_the_stage(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    running, operator = released_and_running(fake, api, config)
    for index in (0, 1):
        operator.end_worker(index, 0)
    operator.succeed()
    assert "manifest" in running.fails().reason


def test_a_manifest_of_another_fingerprint_is_not_success(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    running, operator = released_and_running(fake, api, config)
    trainer.says("f2", up_to_date=True)
    for index in (0, 1):
        operator.end_worker(index, 0)
    operator.succeed()
    assert "manifest" in running.fails().reason


def test_a_failed_job_is_reported_with_stage_reason_and_log_tail_although_its_pods_are_deleted(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    running, operator = released_and_running(fake, api, config)
    operator.write(0, "step 1", "step 2")
    operator.write(1, "step 1", "RuntimeError: NaN loss")
    operator.end_worker(1, 1)
    operator.fail("PyTorchJob is failed because 1 Worker replica(s) failed.")
    failure = running.fails()
    assert failure.status == 1
    assert describe_failure("train", failure).splitlines() == [
        f"train failed: {operator.worker(1)} ended with status 1; PyTorchJob {OWN}: "
        "PyTorchJob is failed because 1 Worker replica(s) failed.",
        f"last 2 lines of {operator.worker(1)}:",
        "  step 1",
        "  RuntimeError: NaN loss",
    ]


@pytest.mark.parametrize("tail", [[], ["step 1", "  RuntimeError: NaN loss", "last 2 lines of nothing:"]])
def test_a_described_failure_is_parsed_from_the_end_of_the_gates_log(tail: list[str]) -> None:
    failure = StageFailed("worker-1 ended with status 1; see\nits log")
    failure.pod, failure.tail = ("worker-1", tail) if tail else ("", [])
    log = ["train: released PyTorchJob train-1", *describe_failure("train", failure).splitlines()]
    assert parse_failure("train", log) == ("worker-1 ended with status 1; see its log", failure.pod, tuple(tail))


def test_a_gate_log_without_a_described_failure_gives_its_last_line() -> None:
    assert parse_failure("train", ["a", "secret x not found"]) == ("secret x not found", "", ("a",))
    assert parse_failure("train", []) == ("", "", ())


def test_the_tail_keeps_what_a_container_wrote_before_its_restart(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    running, operator = released_and_running(fake, api, config)
    operator.write(0, "Traceback", "ValueError: bad shard")
    operator.restart_worker(0, 1)
    operator.write(0, "starting")
    operator.fail("backoffLimit")
    failure = running.fails()
    assert failure.tail == ["Traceback", "ValueError: bad shard", "starting"]
    assert "ended with status 1" in failure.reason


def test_out_of_memory_is_named(fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer) -> None:
    running, operator = released_and_running(fake, api, config)
    operator.end_worker(1, 137, "OOMKilled")
    operator.fail()
    assert f"{operator.worker(1)} ended with status 137 (OOMKilled)" in running.fails().reason


def test_the_reported_worker_is_the_one_that_failed_not_those_that_were_stopped(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    running, operator = released_and_running(fake, api, config)
    operator.write(0, "stopping")
    operator.write(1, "the cause")
    operator.end_worker(0, 143)
    operator.end_worker(1, 1)
    operator.fail()
    failure = running.fails()
    assert (failure.pod, failure.tail) == (operator.worker(1), ["the cause"])


@pytest.mark.parametrize("restarted", [False, True])
def test_a_worker_that_ends_with_status_2_ends_the_job_at_once_with_status_2(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer, restarted: bool
) -> None:
    running, operator = released_and_running(fake, api, config)
    operator.write(1, "training.maxSequenceLength: too long")
    operator.restart_worker(1, 2) if restarted else operator.end_worker(1, 2)
    failure = running.fails()
    assert failure.status == 2
    assert failure.tail == ["training.maxSequenceLength: too long"]
    assert is_going(fake, OWN)


def test_a_worker_that_fails_once_more_than_backoff_limit_ends_the_job_before_its_next_restart(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    running, operator = released_and_running(fake, api, config)
    for index in (0, 1):  # one failure ends the other worker too
        operator.restart_worker(index, 1)
    let_the_gate_look(fake)
    assert not is_going(fake, OWN)
    operator.write(1, "RuntimeError: NaN loss")
    operator.restart_worker(1, 1, put_off=True)
    failure = running.fails()
    assert failure.status == 1 and f"{operator.worker(1)} has failed 2 times (backoffLimit 1)" in failure.reason
    assert failure.tail == ["RuntimeError: NaN loss"]
    assert is_going(fake, OWN)


def test_a_worker_that_is_evicted_has_not_failed(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    running, operator = released_and_running(fake, api, config)
    operator.restart_worker(1, 1)
    let_the_gate_look(fake)
    operator.end_worker(1, 143)  # its pod is Failed; the operator makes another
    let_the_gate_look(fake)
    assert not is_going(fake, OWN) and not running.future.done()
    operator.fail("the end of the test")
    running.fails()


def test_a_job_past_its_deadline_is_patched_so_that_the_operator_reconciles_it(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    running, operator = released_and_running(fake, api, config)
    fake.merge("pytorchjobs", OWN, {"spec": {"runPolicy": {"activeDeadlineSeconds": 60}}})
    fake.merge("pytorchjobs", OWN, {"status": {"startTime": now()}})
    let_the_gate_look(fake)
    assert not overdue(fake)
    fake.merge("pytorchjobs", OWN, {"status": {"startTime": "2020-01-01T00:00:00Z"}})
    until(lambda: overdue(fake))
    operator.fail("active longer than specified deadline")
    assert "active longer than specified deadline" in running.fails().reason


def overdue(fake: FakeApi) -> float:
    job = fake.get("pytorchjobs", OWN)
    assert job
    return float(job["metadata"]["annotations"].get("llama-lora/seconds-overdue", 0))


def test_status_2_is_seen_although_the_operator_deletes_the_pods_at_once(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    slow = GateTimings(interval=0.5, progress=0.0)  # all of it happens between two looks
    running, operator = released_and_running(fake, api, config, timings=slow)
    operator.end_worker(0, 2)
    operator.fail()
    assert running.fails().status == 2


def test_pods_are_watched_again_after_an_outage_of_the_api_server(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    slow = GateTimings(interval=0.5, progress=0.0, last_words=0.3)
    running, operator = released_and_running(fake, api, config, timings=slow)
    fake.away = True
    time.sleep(0.1)
    watches = fake.requests.count(("watch", "pods"))
    fake.away = False
    until(lambda: fake.requests.count(("watch", "pods")) > watches)
    operator.end_worker(0, 2)
    operator.fail()
    assert running.fails().status == 2


def test_an_earlier_job_with_the_same_fingerprint_is_followed_and_the_new_one_deleted(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    fake.add("pytorchjobs", pytorch_job(EARLIER, fingerprint="f1"))
    fake.add("pytorchjobs", pytorch_job(OWN))
    operator = Operator(fake, EARLIER)
    operator.start()
    uids = {name: fake.get("pods", name)["metadata"]["uid"] for name in fake.names("pods")}  # type: ignore[index]
    running = Gate(api, config)
    until(lambda: fake.names("pytorchjobs") == [EARLIER])
    until(lambda: any("following" in line for line in running.logged))
    assert uids == {name: fake.get("pods", name)["metadata"]["uid"] for name in fake.names("pods")}  # type: ignore[index]
    trainer.says("f1", up_to_date=True)
    operator.end_worker(0, 0)
    operator.end_worker(1, 0)
    operator.succeed()
    running.succeeds()


def test_an_earlier_job_with_another_fingerprint_is_stopped_and_gone_before_the_new_one_is_released(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    fake.add("pytorchjobs", pytorch_job(EARLIER, fingerprint="f0"))
    fake.add("pytorchjobs", pytorch_job(OWN))
    operator = Operator(fake, EARLIER)
    operator.start()
    running = Gate(api, config, timings=GateTimings(interval=0.03))
    until(lambda: is_going(fake, EARLIER))
    fake.remove("pods", operator.worker(0))
    let_the_gate_look(fake)
    assert not is_released(fake), "two trainers in one run folder"
    fake.remove("pods", operator.worker(1))
    fake.remove("pytorchjobs", EARLIER)
    until(lambda: is_released(fake))
    Operator(fake, OWN).fail()
    running.fails()


def test_the_new_job_is_not_released_while_pods_of_the_earlier_one_run(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    fake.add("pytorchjobs", pytorch_job(EARLIER, fingerprint="f0"))
    fake.add("pytorchjobs", pytorch_job(OWN))
    Operator(fake, EARLIER).start()
    failure = Gate(api, config).fails(UserError)
    assert "delete pod --force" in str(failure)
    assert not is_released(fake)


def test_a_job_that_is_being_deleted_is_waited_for_never_followed(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    fake.add("pytorchjobs", pytorch_job(EARLIER, fingerprint="f1"))
    operator = Operator(fake, EARLIER)
    operator.start()
    fake.merge("pytorchjobs", EARLIER, {"metadata": {"deletionTimestamp": now()}})
    fake.add("pytorchjobs", pytorch_job(OWN))
    running = Gate(api, config, timings=GateTimings(interval=0.03))
    until(lambda: any(f"deleting PyTorchJob {EARLIER}" in line for line in running.logged))
    assert not is_released(fake)
    for index in (0, 1):
        fake.remove("pods", operator.worker(index))
    fake.remove("pytorchjobs", EARLIER)
    until(lambda: is_released(fake))
    Operator(fake, OWN).fail()
    running.fails()


def test_at_release_only_jobs_of_earlier_revisions_of_this_stage_are_deleted(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    others = ["demo-llama-lora-compile-3", "other-train-1"]
    fake.add("pytorchjobs", pytorch_job(others[0], "compile"))
    fake.add("pytorchjobs", pytorch_job(others[1], release="other", run="another-run", fingerprint="f0"))
    fake.add("pytorchjobs", pytorch_job("demo-llama-lora-train-1"))  # never released
    fake.add("pytorchjobs", pytorch_job(EARLIER, fingerprint="f1"))
    fake.set_condition("pytorchjobs", EARLIER, "Failed")
    running, operator = released_and_running(fake, api, config)
    assert fake.names("pytorchjobs") == [*others[:1], OWN, others[1]]
    operator.fail()
    running.fails()


@pytest.mark.parametrize("fingerprint", ["f0", "f1"])
def test_the_pods_of_a_finished_job_have_ended_before_the_new_one_is_released(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer, fingerprint: str
) -> None:
    fake.graceful = True  # its workers save a checkpoint, for up to 120 s
    fake.add("pytorchjobs", pytorch_job(EARLIER, fingerprint=fingerprint))
    operator = Operator(fake, EARLIER)
    operator.start()
    fake.set_condition("pytorchjobs", EARLIER, "Failed")
    fake.add("pytorchjobs", pytorch_job(OWN))
    running = Gate(api, config, timings=GateTimings(interval=0.03))
    until(lambda: is_going(fake, EARLIER))
    let_the_gate_look(fake)
    assert not is_released(fake), "two trainers in one run folder"
    for index in (0, 1):
        fake.remove("pods", operator.worker(index))
    until(lambda: is_released(fake))
    Operator(fake, OWN).fail()
    running.fails()


def test_pods_of_a_deleted_job_are_waited_for(fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer) -> None:
    fake.graceful = True
    fake.add("pytorchjobs", pytorch_job(EARLIER, fingerprint="f1"))
    operator = Operator(fake, EARLIER)
    operator.start()
    api.delete(PYTORCH_JOBS, EARLIER)  # in the background, as kubectl does
    fake.add("pytorchjobs", pytorch_job(OWN))
    running = Gate(api, config, timings=GateTimings(interval=0.03))
    let_the_gate_look(fake)
    assert fake.names("pytorchjobs") == [OWN] and not is_released(fake)
    operator.end_worker(0, 143)
    fake.remove("pods", operator.worker(1))
    until(lambda: is_released(fake))
    Operator(fake, OWN).fail()
    running.fails()


@pytest.mark.parametrize("release", ["demo-run", "other"])
def test_a_job_of_the_same_run_and_fingerprint_is_followed_even_if_another_release_owns_it(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer, release: str
) -> None:
    theirs = f"{release}-train-1"
    fake.add("pytorchjobs", pytorch_job(theirs, release=release, fingerprint="f1"))
    operator = Operator(fake, theirs)
    operator.start()
    fake.add("pytorchjobs", pytorch_job(f"{release}-train-2", release=release))  # waits for its own gate
    fake.add("pytorchjobs", pytorch_job(OWN))
    running = Gate(api, config)
    until(lambda: any(f"following PyTorchJob {theirs}" in line for line in running.logged))
    assert OWN not in fake.names("pytorchjobs"), "two trainers in one run folder"
    assert (f"{release}-train-2" in fake.names("pytorchjobs")) == (release == "other")
    trainer.says("f1", up_to_date=True)
    operator.end_worker(0, 0)
    operator.end_worker(1, 0)
    operator.succeed()
    running.succeeds()


@pytest.mark.parametrize(("mine", "theirs"), [("demo", "demo-run"), ("demo-run", "demo")])
def test_another_configurations_job_of_the_release_in_the_other_mode_is_stopped(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer, mine: str, theirs: str
) -> None:
    fake.add("pytorchjobs", pytorch_job("theirs-train-1", release=theirs, fingerprint="f0"))
    operator = Operator(fake, "theirs-train-1")
    operator.start()
    fake.add("pytorchjobs", pytorch_job(OWN, release=mine))
    running = Gate(api, config.model_copy(update={"release": mine}), timings=GateTimings(interval=0.03))
    until(lambda: is_going(fake, "theirs-train-1"))
    let_the_gate_look(fake)
    assert not is_released(fake)
    for index in (0, 1):
        fake.remove("pods", operator.worker(index))
    until(lambda: is_released(fake))
    Operator(fake, OWN).fail()
    running.fails()


@pytest.mark.parametrize("stage", ["compile", "train"])
def test_another_release_that_uses_the_run_folder_is_named_with_a_fix_and_not_stopped(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer, stage: str
) -> None:
    trainer.says("c1", up_to_date=False, of="compile")
    fake.add("pytorchjobs", pytorch_job("other-train-1", release="other", fingerprint="f0"))
    Operator(fake, "other-train-1").start()
    own = OWN.replace("train", stage)
    fake.add("pytorchjobs", pytorch_job(own, stage))
    message = str(Gate(api, config, stage=stage).fails(UserError))
    assert "release other" in message and "another name" in message and "helm uninstall other" in message
    assert not is_released(fake, own)
    assert not is_going(fake, "other-train-1")


@pytest.mark.parametrize("now_known_as", ["f2", None], ids=["changed", "not known yet"])
def test_a_train_job_of_an_earlier_configuration_has_ended_before_compile_is_released(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer, now_known_as: str | None
) -> None:
    trainer.says("c2", up_to_date=False, of="compile")
    trainer.says(now_known_as, up_to_date=False)
    fake.add("pytorchjobs", pytorch_job(EARLIER, fingerprint="f1"))
    operator = Operator(fake, EARLIER)
    operator.start()
    own = OWN.replace("train", "compile")
    fake.add("pytorchjobs", pytorch_job(own, "compile"))
    running = Gate(api, config, stage="compile", timings=GateTimings(interval=0.03))
    until(lambda: is_going(fake, EARLIER))
    let_the_gate_look(fake)
    assert not is_released(fake, own), "compile needs the nodes that train holds"
    for index in (0, 1):
        fake.remove("pods", operator.worker(index))
    until(lambda: is_released(fake, own))
    Operator(fake, own).fail()
    running.fails()


def test_a_train_job_of_the_current_configuration_keeps_running_during_compile(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    trainer.says("c1", up_to_date=False, of="compile")
    fake.add("pytorchjobs", pytorch_job(EARLIER, fingerprint="f1"))
    Operator(fake, EARLIER).start()
    own = OWN.replace("train", "compile")
    fake.add("pytorchjobs", pytorch_job(own, "compile"))
    running = Gate(api, config, stage="compile")
    until(lambda: is_released(fake, own))
    assert not is_going(fake, EARLIER)
    Operator(fake, own).fail()
    running.fails()


def test_a_restarted_gate_follows_the_job_that_it_released(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    fake.add("pytorchjobs", pytorch_job(OWN, fingerprint="f1"))
    operator = Operator(fake, OWN)
    operator.start()
    running = Gate(api, config)
    until(lambda: any("following" in line for line in running.logged))
    trainer.says("f1", up_to_date=True)
    operator.end_worker(0, 0)
    operator.end_worker(1, 0)
    operator.succeed()
    running.succeeds()
    assert ("delete", "pytorchjobs.kubeflow.org") not in fake.requests


def test_a_gate_that_restarts_after_the_failure_reports_it(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    fake.add("pytorchjobs", pytorch_job(OWN, fingerprint="f1"))
    Operator(fake, OWN).fail("out of retries")
    assert "out of retries" in Gate(api, config).fails().reason


def test_a_missing_job_is_an_error_with_a_fix(fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer) -> None:
    assert "helm upgrade" in str(Gate(api, config).fails(UserError))


def test_deleting_a_running_job_ends_the_gate(fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer) -> None:
    running, _ = released_and_running(fake, api, config)
    fake.remove("pytorchjobs", OWN)
    failure = running.fails()
    assert failure.status == 2 and "deleted" in failure.reason


def test_with_kueue_the_queue_label_is_added_and_kueue_unsuspends(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    queued = config.model_copy(update={"job": config.job.model_copy(update={"queue_name": "trn"})})
    fake.add("pytorchjobs", pytorch_job(OWN))
    running = Gate(api, queued)
    job = until(lambda: (job := fake.get("pytorchjobs", OWN)) and "trn" in job["metadata"]["labels"].values() and job)
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "trn"
    assert job["spec"]["runPolicy"]["suspend"] is True
    fake.merge("pytorchjobs", OWN, {"spec": {"runPolicy": {"suspend": False}}})
    operator = Operator(fake, OWN)
    operator.start()
    trainer.says("f1", up_to_date=True)
    operator.end_worker(0, 0)
    operator.end_worker(1, 0)
    operator.succeed()
    running.succeeds()


def no_time(config: ClusterConfig, seconds: float = 0.2) -> ClusterConfig:
    return config.model_copy(
        update={"train": config.train.model_copy(update={"unschedulable_timeout_seconds": seconds})}
    )


def add_unschedulable(fake: FakeApi, since: str) -> None:
    owner = fake.get("pytorchjobs", OWN)
    assert owner
    message = "0/3 nodes are available: 3 Insufficient aws.amazon.com/neuron."
    scheduled = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
    for index in (0, 1):
        waiting = pod(f"{OWN}-worker-{index}", owner, "PyTorchJob", phase="Pending")
        del waiting["status"]["containerStatuses"], waiting["spec"]["nodeName"]
        waiting["status"]["conditions"] = [scheduled | {"lastTransitionTime": since}]
        fake.add("pods", waiting)


def test_pods_unschedulable_for_too_long_fail_with_the_schedulers_reason(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    fake.add("pytorchjobs", pytorch_job(OWN))
    running = Gate(api, config)  # 1800 s
    until(lambda: is_released(fake))
    add_unschedulable(fake, "2025-01-01T00:00:00Z")
    failure = running.fails()
    assert failure.status == 2
    assert "Insufficient aws.amazon.com/neuron" in failure.reason
    assert is_going(fake, OWN), "an autoscaler would keep adding nodes for it"


def test_unschedulable_within_the_timeout_is_logged_and_waited_for(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    fake.add("pytorchjobs", pytorch_job(OWN))
    running = Gate(api, config)
    until(lambda: is_released(fake))
    add_unschedulable(fake, now())
    until(lambda: any("Insufficient" in line for line in running.logged))
    seen = len(fake.requests)
    until(lambda: len(fake.requests) > seen + 6)
    assert not running.future.done()
    Operator(fake, OWN).fail()
    running.fails()


def test_suspended_time_does_not_count(fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer) -> None:
    fake.add("pytorchjobs", pytorch_job(OWN, fingerprint="f1"))
    fake.merge("pytorchjobs", OWN, {"spec": {"runPolicy": {"suspend": True}}})  # by another controller
    running = Gate(api, no_time(config, 0.1))
    until(lambda: any("Suspended" in line for line in running.logged))
    seen = len(fake.requests)
    until(lambda: len(fake.requests) > seen + 20)  # 10 looks, 0.3 s
    assert not running.future.done()
    Operator(fake, OWN).fail()
    running.fails()


def test_pods_that_are_never_created_fail_the_stage_with_the_operators_reason(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    own = fake.add("pytorchjobs", pytorch_job(OWN))
    about = {"uid": own["metadata"]["uid"], "name": OWN}
    message = 'pods "x" is forbidden: violates PodSecurity "restricted:latest"'
    event = {"reason": "FailedCreatePod", "type": "Warning", "message": message, "lastTimestamp": now()}
    fake.add("events", {"metadata": {"name": "e1"}, "involvedObject": about, **event})
    failure = Gate(api, no_time(config)).fails()
    assert "violates PodSecurity" in failure.reason and failure.status == 2


def test_an_image_that_cannot_be_pulled_fails_the_stage_although_its_pods_have_nodes(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    running, operator = released_and_running(fake, api, config)
    waiting = {"reason": "ImagePullBackOff", "message": 'Back-off pulling image "x"'}
    status = {"phase": "Pending", "containerStatuses": [{"name": "pytorch", "state": {"waiting": waiting}}]}
    fake.merge("pods", operator.worker(0), {"status": status})
    failure = running.fails()
    assert "ImagePullBackOff" in failure.reason and failure.status == 2


def test_the_gate_survives_an_outage_of_the_api_server(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    running, operator = released_and_running(fake, api, config)
    fake.away = True
    operator.write(0, "written meanwhile")
    time.sleep(0.4)
    assert not running.future.done()
    fake.away = False
    operator.write(0, "written after")
    until(lambda: sum(path.endswith("/log") for path in fake.paths) >= 4)
    operator.end_worker(0, 1)
    operator.fail()
    assert running.fails().tail == ["written meanwhile", "written after"]


def test_a_lasting_outage_of_the_api_server_is_retried_and_is_not_a_failed_stage(
    fake: FakeApi, config: ClusterConfig, trainer: Trainer
) -> None:
    from genvalues.cluster.kinds import ServerAway

    impatient = connect(config.namespace, patience=0.2, interval=0.02)
    running, _ = released_and_running(fake, impatient, config)
    fake.away = True
    running.fails(ServerAway)


def test_progress_conditions_and_pods_are_logged_once_for_each_change(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    stale = {"stage": "train", "step": 9, "totalSteps": 9, "updated": "2025-01-01T00:00:00Z"}
    trainer.progress.write_text(json.dumps(stale))
    running, operator = released_and_running(fake, api, config)
    fresh = stale | {"step": 120, "totalSteps": 1000, "loss": 1.25, "updated": "2025-01-01T01:00:00Z"}
    trainer.progress.write_text(json.dumps(fresh))
    line = until(lambda: next((line for line in running.logged if "step 120 of 1,000" in line), ""))
    assert "loss 1.25" in line
    operator.fail()
    running.fails()
    assert not any("step 9 " in line for line in running.logged)
    assert len(set(running.logged)) == len(running.logged)
    assert f"train: {operator.worker(0)}: Running on node-1" in running.logged


def test_progress_with_missing_values_is_described() -> None:
    progress = {"step": 5, "totalSteps": 10, "loss": None, "tokensPerSecond": 5120.4, "etaSeconds": 3720}
    assert describe_progress(progress) == "step 5 of 10, 5,120 tokens/s, 1 h 02 min left"
    assert describe_progress({"step": 5, "totalSteps": 10, "evalLoss": 1.5}) == "step 5 of 10, held-out loss 1.5000"


def test_a_stage_whose_dependency_is_not_done_is_a_user_error(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    trainer.says(None, up_to_date=False)
    fake.add("pytorchjobs", pytorch_job(OWN))
    assert "not done" in str(Gate(api, config).fails(UserError))
    assert not is_released(fake)


def test_a_failing_trainer_command_or_invalid_output_is_retried(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    trainer.answer.write_text("Killed")
    Gate(api, config).fails(TrainerCommandFailed)
    trainer.ends_with(1)
    Gate(api, config).fails(TrainerCommandFailed)
    trainer.ends_with(2)
    Gate(api, config).fails(UserError)
