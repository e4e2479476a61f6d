"""Cost and stall of a run: computed from the pods, and enforced by the gate."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from generator.cluster.conftest import Trainer
from generator.cluster.fake_api import NAMESPACE, FakeApi
from generator.cluster.objects import Object, Operator, pod, pytorch_job
from generator.cluster.test_gate import EARLIER, OWN, QUICK, is_going, is_released, let_the_gate_look
from generator.cluster.waiting import PATIENCE, beside, log_lines, until
from genvalues.cluster.api import Api, connect
from genvalues.cluster.config import ClusterConfig, GuardLimits
from genvalues.cluster.cost_tracker import RAISE_MAX_COST
from genvalues.cluster.failures import StageFailed, StoppedByGuard, describe_failure
from genvalues.cluster.follower import GateTimings
from genvalues.cluster.gate import gate
from genvalues.cluster.guards import CostLimit, Ledger, StallTimer, describe_stall, reserve_hours
from genvalues.cluster.progress import describe_checkpoint
from genvalues.cluster.trainer_client import read_stage_state
from genvalues.common.errors import UserError

HOUR = 3600.0
NOON = 1_800_000_000.0


def written(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def worker(uid: str, since: float | None, *, ended: float | None = None, phase: str = "Running") -> Object:
    state: Object = {"running": {}}
    if ended is not None:
        phase, state = "Failed", {"terminated": {"exitCode": 1, "finishedAt": written(ended)}}
    status: Object = {"phase": phase, "containerStatuses": [{"name": "pytorch", "state": state, "restartCount": 0}]}
    if since is not None:
        status["startTime"] = written(since)
    return {
        "metadata": {"name": f"pod-{uid}", "uid": uid, "labels": {"app.kubernetes.io/component": "train"}},
        "spec": {},
        "status": status,
    }


# --- cost


def test_a_pod_costs_from_its_start_to_its_end_while_it_holds_a_node() -> None:
    ledger = Ledger().updated([worker("a", NOON), worker("b", None, phase="Pending")], NOON + HOUR)
    assert ledger.node_hours == pytest.approx(1) and list(ledger.pods) == ["a"]
    ledger = ledger.updated([worker("a", NOON), worker("b", NOON + HOUR)], NOON + 2 * HOUR)
    assert ledger.node_hours == pytest.approx(3)
    ended = [worker("a", NOON, ended=NOON + 2.5 * HOUR), worker("b", NOON + HOUR, ended=NOON + 2 * HOUR)]
    assert ledger.updated(ended, NOON + 50 * HOUR).node_hours == pytest.approx(3.5), "an ended pod holds no node"


def test_a_pod_that_pulls_its_image_holds_its_node() -> None:
    ledger = Ledger().updated([worker("a", NOON, phase="Pending")], NOON + HOUR)
    assert ledger.node_hours == pytest.approx(1)


def test_a_deleted_pod_counts_until_it_was_last_seen() -> None:
    ledger = Ledger().updated([worker("a", NOON)], NOON + HOUR).updated([], NOON + 9 * HOUR)
    assert ledger.node_hours == pytest.approx(1)
    assert ledger.updated([worker("b", NOON + 9 * HOUR)], NOON + 10 * HOUR).node_hours == pytest.approx(2)


def test_an_evicted_pod_without_an_end_time_stops_counting() -> None:
    gone = worker("a", NOON, phase="Failed")
    ledger = (
        Ledger()
        .updated([worker("a", NOON)], NOON + HOUR)
        .updated([gone], NOON + 2 * HOUR)
        .updated([gone], NOON + 9 * HOUR)
    )
    assert ledger.node_hours == pytest.approx(1)


def test_a_ledger_is_read_back_as_it_was_written() -> None:
    ledger = Ledger(stopped_job="j", stopped_why="w").updated([worker("a", NOON)], NOON + HOUR)
    assert Ledger.from_json(json.loads(json.dumps(ledger.as_json()))) == ledger
    assert Ledger.from_json(Ledger().as_json()) == Ledger()


@pytest.mark.parametrize(
    "text",
    [
        '{"pods": {"a": {"name": "p", "stage": "train", "since": 1, "until": "x"}}, "stopped": null}',
        '{"pods": {"a": {"name": "p", "stage": "train", "since": 1, "until": null}}, "stopped": null}',
        '{"pods": {"a": {"name": "p", "stage": "train", "since": 1, "until": NaN}}, "stopped": null}',
        '{"pods": {"a": {"name": "p", "stage": "train", "since": Infinity, "until": 1}}, "stopped": null}',
        '{"pods": {"a": {"name": "p", "stage": "train", "since": 1}}, "stopped": null}',
        '{"pods": {"a": "p"}, "stopped": null}',
        '{"pods": {"a": {}}, "stopped": null}',
        '{"pods": {}, "stopped": "train"}',
        '{"pods": {}, "stopped": null, "sha256": "%s"}' % ("0" * 64),
        '{"pods": []}',
        "[]",
        "{",
        "",
    ],
)
def test_an_invalid_cost_file_is_an_error_that_names_the_file(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer, text: str
) -> None:
    file = trainer.progress.with_name("costs.json")
    file.write_text(text)
    running = Guarded(fake, api, config, maxCost=200, pricePerNodeHour=21.5)
    fake.add("pytorchjobs", pytorch_job(OWN))
    running.start_gate()
    assert str(file) in str(running.fails(UserError))
    assert not is_released(fake), "no node is used whose cost cannot be counted"


def test_the_limit_is_reached_when_the_rest_is_what_stopping_costs() -> None:
    job = pytorch_job(OWN)
    job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"] = {"spec": {"terminationGracePeriodSeconds": 120}}
    assert reserve_hours(job) == pytest.approx(2 * 120 / HOUR)
    limit = CostLimit(200, 21.5)
    last = 200 / 21.5 - reserve_hours(job)
    assert not limit.is_reached(last - 1e-6, reserve_hours(job)) and limit.is_reached(last + 1e-6, reserve_hours(job))
    assert not CostLimit(None, 21.5).is_reached(1e9, 1)
    assert not CostLimit(None, None).is_reached(1e9, 1)
    assert limit.describe(9.308) == (
        "guards.maxCost of $200 is reached (cost so far $200.12: 9.31 node hours at $21.5)"
    )


def test_the_cost_is_unknown_without_a_price() -> None:
    assert CostLimit(None, None).as_annotation(2, "now") == {
        "cost": None,
        "nodeHours": 2,
        "pricePerNodeHour": None,
        "maxCost": None,
        "updated": "now",
    }
    assert CostLimit(200, 21.5).as_annotation(2, "now")["cost"] == 43


def test_a_stall_is_described_with_its_duration_its_setting_and_the_last_step() -> None:
    described = describe_stall(1800, {"step": 120, "totalSteps": 1000})
    assert all(part in described for part in ("no step for 30 min", "guards.stallTimeout", "120 of 1000"))
    assert "no step was taken yet" in describe_stall(1800, {})


def test_what_is_kept_after_a_stop_is_described() -> None:
    assert describe_checkpoint({"step": 9, "savedStep": 7}) == "the checkpoint at step 7 is kept"
    assert describe_checkpoint({"step": 9, "savedStep": None}) == "no checkpoint was saved"
    assert describe_checkpoint({}) == ""


# --- stalls


class Watched:
    """A job with two workers, observed once a minute."""

    def __init__(self) -> None:
        self.job = pytorch_job(OWN, fingerprint="f")
        self.pods = [worker("a", NOON), worker("b", NOON)]
        self.progress: dict[str, Any] = {}
        self.minutes = 0
        self.stall = StallTimer()

    def after(self, minutes: int) -> float:
        """Let ``minutes`` pass; return how many minutes the job has stalled."""
        for _ in range(minutes):
            self.minutes += 1
            seconds = self.stall.seconds(self.job, self.pods, self.progress, NOON + self.minutes * 60)
        return seconds / 60


@pytest.fixture
def watched() -> Watched:
    watched = Watched()
    assert watched.after(1) == 0
    return watched


def test_a_stall_is_measured_from_the_start_of_all_pods_and_from_each_step(watched: Watched) -> None:
    assert watched.after(20) == 20, "a stall before the first step counts too"
    watched.progress = {"step": 1, "updated": "12:20"}
    assert watched.after(1) == 0
    assert watched.after(7) == 7
    watched.progress = {"step": 1, "updated": "12:28"}  # repeated after a resume
    assert watched.after(1) == 0


def test_unreadable_progress_is_not_a_step(watched: Watched) -> None:
    watched.progress = {"step": 1, "updated": "12:01"}
    watched.after(6)
    watched.progress = {}
    assert watched.after(5) == 10


@pytest.mark.parametrize("what", ["suspended", "unschedulable", "one is missing", "waiting", "being deleted", "ended"])
def test_time_during_which_no_step_is_possible_does_not_count(watched: Watched, what: str) -> None:
    assert watched.after(9) == 9
    before = watched.pods[1]
    if what == "suspended":
        watched.job["spec"]["runPolicy"]["suspend"] = True
    elif what == "unschedulable":
        watched.pods[1] = worker("b", None, phase="Pending")
    elif what == "one is missing":
        del watched.pods[1]
    elif what == "waiting":  # for its restart
        watched.pods[1] = worker("b", NOON)
        watched.pods[1]["status"]["containerStatuses"][0]["state"] = {"waiting": {"reason": "CrashLoopBackOff"}}
    elif what == "being deleted":
        watched.pods[1] = worker("b", NOON)
        watched.pods[1]["metadata"]["deletionTimestamp"] = written(NOON)
    else:
        watched.pods[1] = worker("b", NOON, ended=NOON)
    assert watched.after(30) == 0
    watched.job["spec"]["runPolicy"]["suspend"] = False
    watched.pods[1:] = [before]
    assert watched.after(1) == 0, "the measurement restarts"
    assert watched.after(3) == 3


def test_a_container_restart_restarts_the_measurement(watched: Watched) -> None:
    assert watched.after(9) == 9
    watched.pods[1] = worker("b", NOON)
    watched.pods[1]["status"]["containerStatuses"][0]["restartCount"] = 1
    assert watched.after(1) == 0


# --- the gate


class Clock:
    """The gate's clock, which a test sets ahead."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead


class Guarded:
    """A gate with guards, and two workers that start at the clock's current time."""

    def __init__(
        self,
        fake: FakeApi,
        api: Api,
        config: ClusterConfig,
        *,
        stage: str = "train",
        timings: GateTimings = QUICK,
        **guards: Any,
    ) -> None:
        self.fake, self.api, self.stage, self.timings = fake, api, stage, timings
        self.config = config.model_copy(update={"guards": GuardLimits(**guards)})
        self.own = OWN.replace("train", stage)
        self.operator = Operator(fake, self.own)
        self.clock = Clock()
        self.started = time.time()
        fake.graceful = True

    def release(self) -> Guarded:
        self.fake.add("pytorchjobs", pytorch_job(self.own, self.stage))
        self.start_gate()
        until(lambda: is_released(self.fake, self.own), "the release")
        self.operator.start()
        for index in (0, 1):
            self.fake.merge("pods", self.operator.worker(index), {"status": {"startTime": written(self.started)}})
        until(lambda: "Running on node-1" in "".join(self.logged), "the pods")
        return self

    def start_gate(self) -> None:
        """Start a gate; called again, another one."""
        self.logged = log_lines()
        read_state = lambda of: read_stage_state(of, Path("/etc/llama-lora/run.yaml"))  # noqa: E731
        arguments = (self.api, self.config, self.stage, self.own, read_state, self.timings, self.clock)
        self.future = beside(gate, *arguments)

    def annotation(self, name: str) -> dict[str, Any]:
        job = self.fake.get("pytorchjobs", self.own)
        assert job
        found: dict[str, Any] = json.loads(job["metadata"]["annotations"].get(f"llama-lora/{name}", "{}"))
        return found

    def end_pods(self) -> None:
        """As the kubelet does when the workers have saved; the job is deleted with the last pod."""
        for index in (0, 1):
            self.fake.remove("pods", self.operator.worker(index))
        self.fake.remove("pytorchjobs", self.own)

    def fails(self, kind: type[Exception] = StageFailed) -> Any:
        with pytest.raises(kind) as failure:
            self.future.result(PATIENCE)
        return failure.value

    def succeeds(self, trainer: Trainer) -> None:
        trainer.says("f1", up_to_date=True)
        for index in (0, 1):
            self.operator.end_worker(index, 0)
        self.operator.succeed()
        self.future.result(PATIENCE)


def says_step(trainer: Trainer, step: int, saved: int | None = None) -> None:
    progress = {"stage": "train", "step": step, "totalSteps": 1000, "loss": 1.5, "savedStep": saved}
    partial = trainer.progress.with_name("partial-progress")
    partial.write_text(json.dumps({**progress, "updated": datetime.now(timezone.utc).isoformat()}))
    partial.replace(trainer.progress)


def test_a_run_at_its_cost_limit_saves_frees_its_nodes_and_ends_with_the_reason(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    running = Guarded(fake, api, config, maxCost=200, pricePerNodeHour=21.5).release()
    says_step(trainer, 118, saved=100)
    running.clock.ahead = 4.5 * HOUR
    let_the_gate_look(fake)
    assert not is_going(fake, OWN), "9 node hours cost $193.50"
    running.operator.write(0, "train: stopped as asked, with step 120 of 1000 saved")
    running.clock.ahead = 4.65 * HOUR
    until(lambda: is_going(fake, OWN))
    let_the_gate_look(fake)
    assert not running.future.done(), "the nodes are still held"
    assert any("stopping: guards.maxCost" in line for line in running.logged)
    says_step(trainer, 120, saved=120)
    running.operator.end_worker(0, 143)
    running.end_pods()
    failure = running.fails(StoppedByGuard)
    assert failure.status == 2
    first, *tail = describe_failure("train", failure).splitlines()
    assert first.startswith("train failed: stopped: guards.maxCost of $200 is reached (cost so far $")
    assert first.endswith(f"node hours at $21.5); the checkpoint at step 120 is kept. {RAISE_MAX_COST}")
    assert "ended with status" not in first, "they ended because the gate stopped them"
    assert tail[-1] == "  train: stopped as asked, with step 120 of 1000 saved"


def test_the_stop_begins_early_enough_to_stay_below_the_limit(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    """Two pods with a grace period of 30 s each, at $3600 per hour: $60."""
    running = Guarded(fake, api, config, maxCost=1000, pricePerNodeHour=3600).release()
    running.clock.ahead = (1000 - 60) / 2 - 15
    let_the_gate_look(fake)
    assert not is_going(fake, OWN)
    running.clock.ahead = (1000 - 60) / 2 + 1
    until(lambda: is_going(fake, OWN))
    running.end_pods()
    assert running.fails(StoppedByGuard)


def test_compile_costs_count_and_it_is_stopped_too(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    trainer.says("c1", up_to_date=False, of="compile")
    running = Guarded(fake, api, config, stage="compile", maxCost=200, pricePerNodeHour=21.5).release()
    running.clock.ahead = 5 * HOUR
    until(lambda: is_going(fake, running.own))
    running.end_pods()
    reason = running.fails(StoppedByGuard).reason
    assert "guards.maxCost" in reason and "checkpoint" not in reason


def test_the_cost_of_earlier_jobs_and_gates_counts(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    running = Guarded(fake, api, config, maxCost=200, pricePerNodeHour=21.5)
    ledger = Ledger().updated([worker("of-compile", NOON)], NOON + 9 * HOUR)
    trainer.progress.with_name("costs.json").write_text(json.dumps(ledger.as_json()))
    running.release()
    running.clock.ahead = 0.1 * HOUR
    until(lambda: (running.annotation("cost").get("cost") or 0) > 193)
    assert not is_going(fake, OWN)
    running.clock.ahead = 0.16 * HOUR
    until(lambda: is_going(fake, OWN))
    running.end_pods()
    assert "9.3" in running.fails(StoppedByGuard).reason
    written_costs = json.loads(trainer.progress.with_name("costs.json").read_text())
    assert written_costs["pricePerNodeHour"] == 21.5, "the report has it from here"
    kept = Ledger.from_json(written_costs)
    assert len(kept.pods) == 3 and kept.node_hours == pytest.approx(9.32, abs=0.02)


def test_a_run_that_has_reached_its_limit_requests_no_node(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    running = Guarded(fake, api, config, maxCost=200, pricePerNodeHour=21.5)
    ledger = Ledger().updated([worker("of-yesterday", NOON)], NOON + 9.3 * HOUR)
    trainer.progress.with_name("costs.json").write_text(json.dumps(ledger.as_json()))
    fake.add("pytorchjobs", pytorch_job(OWN))
    running.start_gate()
    reason = running.fails(StoppedByGuard).reason
    assert "not started: guards.maxCost of $200 is reached (cost so far $199.95" in reason
    assert not is_released(fake)
    running.config = config.model_copy(update={"guards": GuardLimits(max_cost=400, price_per_node_hour=21.5)})
    running.start_gate()
    until(lambda: is_released(fake), "the release, with a higher limit")
    running.operator.fail()
    running.fails()


def test_a_restarted_gate_continues_the_count(fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer) -> None:
    running = Guarded(fake, api, config, pricePerNodeHour=10).release()
    running.clock.ahead = HOUR
    until(lambda: (running.annotation("cost").get("cost") or 0) >= 20)
    first = running.future
    running.start_gate()
    fake.remove("pods", running.operator.worker(1))  # its node is lost
    let_the_gate_look(fake)
    running.clock.ahead = 2 * HOUR
    until(lambda: (running.annotation("cost").get("cost") or 0) >= 30)
    assert running.annotation("cost")["nodeHours"] == pytest.approx(3, abs=0.02)
    running.operator.fail()
    running.fails()
    with pytest.raises(StageFailed):
        first.result(PATIENCE)


def test_pods_of_a_replaced_job_count_until_they_have_ended(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    running = Guarded(fake, api, config, timings=replace(QUICK, pods_gone=PATIENCE), pricePerNodeHour=10)
    owner = fake.add("pytorchjobs", pytorch_job(EARLIER, fingerprint="f0"))
    earlier = pod(f"{EARLIER}-worker-0", owner, "PyTorchJob")
    earlier["status"]["startTime"] = written(running.started - HOUR)
    fake.add("pods", earlier)
    fake.add("pytorchjobs", pytorch_job(OWN))
    running.start_gate()
    until(lambda: is_going(fake, EARLIER))
    let_the_gate_look(fake)
    fake.remove("pods", f"{EARLIER}-worker-0")
    fake.remove("pytorchjobs", EARLIER)
    until(lambda: is_released(fake))
    kept = Ledger.from_json(json.loads(trainer.progress.with_name("costs.json").read_text()))
    assert kept.node_hours == pytest.approx(1, abs=0.01)
    running.operator.fail()
    running.fails()


def test_a_stalled_training_is_stopped_with_its_last_step_and_the_place_of_its_stack_traces(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    running = Guarded(fake, api, config, stallTimeoutSeconds=1800).release()
    says_step(trainer, 7, saved=5)
    until(lambda: running.annotation("progress").get("step") == 7)
    let_the_gate_look(fake)
    running.clock.ahead = 1700
    let_the_gate_look(fake)
    says_step(trainer, 8, saved=5)  # in time
    until(lambda: running.annotation("progress").get("step") == 8)
    let_the_gate_look(fake)
    running.clock.ahead = 1700 + 1790
    let_the_gate_look(fake)
    assert not is_going(fake, OWN)
    running.operator.write(1, "all_reduce ...")
    running.clock.ahead = 1700 + 1810
    until(lambda: is_going(fake, OWN))
    running.end_pods()
    failure = running.fails(StoppedByGuard)
    assert failure.status == 2, "an automatic retry would cost the same again"
    assert "stopped: no step for 30 min" in failure.reason
    assert "8 of 1000; the checkpoint at step 5 is kept" in failure.reason
    assert f"{trainer.progress.parent}/stacks" in failure.reason


def test_a_training_that_never_takes_its_first_step_is_stopped(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    says_step(trainer, 9)  # of an earlier training
    running = Guarded(fake, api, config, stallTimeoutSeconds=1800).release()
    let_the_gate_look(fake)
    running.clock.ahead = 1900
    until(lambda: is_going(fake, OWN))
    running.end_pods()
    assert "no step was taken yet" in running.fails(StoppedByGuard).reason


def test_a_restarted_gate_knows_the_last_step_of_the_job_it_follows(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    running = Guarded(fake, api, config, stallTimeoutSeconds=1800)
    fake.add("pytorchjobs", pytorch_job(OWN, fingerprint="f1"))
    fake.merge("pytorchjobs", OWN, {"status": {"startTime": written(running.started - HOUR)}})
    running.operator.start()
    says_step(trainer, 8)
    running.start_gate()
    until(lambda: running.annotation("progress").get("step") == 8)
    let_the_gate_look(fake)
    running.clock.ahead = 1900
    until(lambda: is_going(fake, OWN))
    running.end_pods()
    assert "last step: 8 of" in running.fails(StoppedByGuard).reason


@pytest.mark.parametrize(("stage", "limit"), [("train", 0), ("compile", 1800)])
def test_a_stall_is_no_failure_without_a_limit_or_in_compile(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer, stage: str, limit: int
) -> None:
    trainer.says("c1", up_to_date=False, of="compile")
    running = Guarded(fake, api, config, stage=stage, stallTimeoutSeconds=limit).release()
    let_the_gate_look(fake)
    running.clock.ahead = 1e6
    let_the_gate_look(fake)
    assert not is_going(fake, running.own)
    running.operator.fail()
    running.fails()


def test_pods_that_do_not_end_are_named_with_a_fix(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    running = Guarded(fake, api, config, maxCost=200, pricePerNodeHour=21.5).release()
    running.clock.ahead = 5 * HOUR
    reason = running.fails(StoppedByGuard).reason
    assert "STILL RUNNING after" in reason and running.operator.worker(0) in reason
    assert "kubectl -n team-a delete pod --force" in reason


def test_a_gate_that_restarts_after_a_stop_reports_its_reason(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    """The first gate was lost with its node while it waited for the pods."""
    running = Guarded(fake, api, config, maxCost=200, pricePerNodeHour=21.5).release()
    running.clock.ahead = 5 * HOUR
    until(lambda: is_going(fake, OWN))
    running.end_pods()
    running.fails(StoppedByGuard)
    running.start_gate()
    assert "guards.maxCost of $200 is reached" in running.fails(StoppedByGuard).reason


def test_a_gate_that_restarts_after_it_stopped_a_job_of_an_earlier_revision_reports_its_reason(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    running = Guarded(fake, api, config, maxCost=200, pricePerNodeHour=21.5)
    ledger = Ledger(stopped_job=EARLIER, stopped_why="stopped: no step for 30 min 00 s")
    trainer.progress.with_name("costs.json").write_text(json.dumps(ledger.as_json()))
    running.start_gate()  # it has deleted its own job, because it followed the earlier one
    assert running.fails(StoppedByGuard).reason == ledger.stopped_why


def test_the_guards_do_not_wait_for_annotations_that_a_webhook_holds_up(
    fake: FakeApi, config: ClusterConfig, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("genvalues.cluster.follower.PUBLISH_SECONDS", 0.1)
    patient = connect(NAMESPACE, patience=300.0, interval=0.02)
    running = Guarded(fake, patient, config, maxCost=200, pricePerNodeHour=21.5).release()
    fake.failing["patch"] = "failed calling webhook: connection refused"
    running.clock.ahead = 5 * HOUR
    until(lambda: is_going(fake, OWN), "the guard to stop it")
    running.end_pods()
    running.fails(StoppedByGuard)


def test_a_full_volume_is_logged_once_and_the_job_is_still_followed(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, value: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("genvalues.common.files.write_json", refuse)
    running = Guarded(fake, api, config, maxCost=200, pricePerNodeHour=21.5).release()
    let_the_gate_look(fake)
    assert sum("No space left on device" in line for line in running.logged) == 1
    running.clock.ahead = 5 * HOUR
    until(lambda: is_going(fake, OWN))
    running.end_pods()
    running.fails(StoppedByGuard)


def test_progress_and_cost_are_annotations_of_the_job_until_its_end(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    says_step(trainer, 9)  # of an earlier training
    running = Guarded(fake, api, config, maxCost=200, pricePerNodeHour=21.5).release()
    cost = until(lambda: running.annotation("cost"))
    assert cost.keys() == {"cost", "nodeHours", "pricePerNodeHour", "maxCost", "updated"}
    assert (cost["maxCost"], cost["pricePerNodeHour"]) == (200, 21.5)
    assert not running.annotation("progress")
    says_step(trainer, 120, saved=100)
    until(lambda: running.annotation("progress").get("step") == 120)
    running.clock.ahead = HOUR
    until(lambda: running.annotation("cost")["cost"] > 42)
    running.succeeds(trainer)


def test_annotations_are_written_at_intervals_and_at_the_end(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    rarely = replace(QUICK, progress=60)
    running = Guarded(fake, api, config, timings=rarely, pricePerNodeHour=21.5).release()
    let_the_gate_look(fake)
    patches = fake.requests.count(("patch", "pytorchjobs.kubeflow.org"))
    assert patches == 2, "the release, and the first look"
    says_step(trainer, 1000)
    for _ in range(3):
        let_the_gate_look(fake)
    assert fake.requests.count(("patch", "pytorchjobs.kubeflow.org")) == patches
    running.succeeds(trainer)
    assert running.annotation("progress")["step"] == 1000


def test_rejected_annotations_are_logged_once_and_the_job_is_still_followed(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    running = Guarded(fake, api, config, maxCost=200, pricePerNodeHour=21.5).release()
    fake.denied["patch", "pytorchjobs"] = "admission webhook denied the request"
    let_the_gate_look(fake)
    let_the_gate_look(fake)
    assert sum("admission webhook denied" in line for line in running.logged) == 1
    fake.denied.clear()
    running.clock.ahead = HOUR
    until(lambda: (running.annotation("cost").get("cost") or 0) >= 43)
    fake.denied["patch", "pytorchjobs"] = "admission webhook denied the request"
    running.clock.ahead = 5 * HOUR
    until(lambda: is_going(fake, OWN), "the guard still stops it")
    running.end_pods()
    running.fails(StoppedByGuard)


def test_a_stage_succeeds_although_its_last_annotations_are_rejected(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    running = Guarded(fake, api, config, timings=replace(QUICK, progress=HOUR)).release()
    fake.denied["patch", "pytorchjobs"] = "admission webhook denied the request"
    running.succeeds(trainer)
    assert any("admission webhook denied" in line for line in running.logged)


def test_a_job_deleted_before_its_annotations_are_written_is_reported_as_deleted(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    running = Guarded(fake, api, config).release()
    fake.after.append(("get", "pytorchjobs", lambda job: fake.remove("pytorchjobs", OWN)))
    assert "was deleted while it was running" in running.fails().reason
