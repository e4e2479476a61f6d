"""What a run has cost, and that it stands still: counted from what pods say, and acted upon by the gate."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from generator.cluster.conftest import Trainer
from generator.cluster.fake_api import FakeApi
from generator.cluster.objects import Object, Operator, pod, pytorch_job
from generator.cluster.test_gate import EARLIER, OWN, QUICK, is_going, is_released, nothing_happens
from generator.cluster.waiting import PATIENCE, beside, until
from genvalues.cluster.api import Api
from genvalues.cluster.config import ClusterConfig, Guards
from genvalues.cluster.failures import StageFailed, StoppedByGuard, describe_failure
from genvalues.cluster.follower import Pace
from genvalues.cluster.gate import gate
from genvalues.cluster.guards import (
    Ledger,
    Limit,
    Standstill,
    describe_checkpoint,
    describe_duration,
    describe_standstill,
    reserve_hours,
)
from genvalues.cluster.trainer_client import ask_trainer
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


# --- counting


def test_a_pod_costs_from_its_start_to_its_end_and_only_while_it_holds_a_node() -> None:
    ledger = Ledger().seen([worker("a", NOON), worker("b", None, phase="Pending")], NOON + HOUR)
    assert ledger.node_hours == pytest.approx(1) and list(ledger.pods) == ["a"]
    ledger = ledger.seen([worker("a", NOON), worker("b", NOON + HOUR)], NOON + 2 * HOUR)
    assert ledger.node_hours == pytest.approx(3)
    ended = [worker("a", NOON, ended=NOON + 2.5 * HOUR), worker("b", NOON + HOUR, ended=NOON + 2 * HOUR)]
    assert ledger.seen(ended, NOON + 50 * HOUR).node_hours == pytest.approx(3.5), "an ended pod holds no node"


def test_a_pod_that_still_pulls_its_image_holds_its_node() -> None:
    ledger = Ledger().seen([worker("a", NOON, phase="Pending")], NOON + HOUR)
    assert ledger.node_hours == pytest.approx(1)


def test_a_pod_that_vanished_is_remembered_until_it_was_last_seen() -> None:
    ledger = Ledger().seen([worker("a", NOON)], NOON + HOUR).seen([], NOON + 9 * HOUR)
    assert ledger.node_hours == pytest.approx(1)
    assert ledger.seen([worker("b", NOON + 9 * HOUR)], NOON + 10 * HOUR).node_hours == pytest.approx(2)


def test_an_evicted_pod_that_does_not_say_when_it_ended_stops_counting() -> None:
    gone = worker("a", NOON, phase="Failed")
    ledger = Ledger().seen([worker("a", NOON)], NOON + HOUR).seen([gone], NOON + 2 * HOUR).seen([gone], NOON + 9 * HOUR)
    assert ledger.node_hours == pytest.approx(1)


def test_a_ledger_is_read_as_it_was_written() -> None:
    ledger = Ledger(stopped_job="j", stopped_why="w").seen([worker("a", NOON)], NOON + HOUR)
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
        '{"pods": {}, "stopped": "train"}',
        '{"pods": []}',
        "[]",
        "{",
    ],
)
def test_costs_that_no_gate_has_written_are_told_with_their_file(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer, text: str
) -> None:
    file = trainer.progress.with_name("costs.json")
    file.write_text(text)
    running = Guarded(fake, api, config, maxCost=200, pricePerNodeHour=21.5)
    fake.add("pytorchjobs", pytorch_job(OWN))
    running.look_after()
    assert str(file) in str(running.fails(UserError))
    assert not is_released(fake), "nothing is paid for that cannot be counted"


def test_the_limit_is_reached_when_what_is_left_is_what_ending_takes() -> None:
    job = pytorch_job(OWN)
    job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"] = {"spec": {"terminationGracePeriodSeconds": 120}}
    assert reserve_hours(job) == pytest.approx(2 * 120 / HOUR)
    limit = Limit(200, 21.5)
    last = 200 / 21.5 - reserve_hours(job)
    assert not limit.is_reached(last - 1e-6, reserve_hours(job)) and limit.is_reached(last + 1e-6, reserve_hours(job))
    assert not Limit(None, 21.5).is_reached(1e9, 1)
    assert not Limit(None, None).is_reached(1e9, 1)
    assert limit.describe(9.308) == (
        "guards.maxCost 200 dollars is reached (cost so far 200.12: 9.31 node hours at 21.5)"
    )


def test_the_cost_is_unknown_where_no_price_is() -> None:
    assert Limit(None, None).as_annotation(2, "now") == {
        "cost": None,
        "nodeHours": 2,
        "pricePerNodeHour": None,
        "maxCost": None,
        "updated": "now",
    }
    assert Limit(200, 21.5).as_annotation(2, "now")["cost"] == 43


def test_times_are_said_as_people_say_them() -> None:
    assert [describe_duration(seconds) for seconds in (45, 1800, 5400, 7230, 0)] == [
        *("45 s", "30 min", "1 h 30 min", "2 h 30 s", "0 s")
    ]
    assert describe_standstill(1800, {"step": 120, "totalSteps": 1000}) == (
        "no step for 30 min, while all pods run (guards.stallTimeout); the last was step 120 of 1000"
    )
    assert "none was taken yet" in describe_standstill(1800, {})
    assert describe_checkpoint({"step": 9, "savedStep": 7}) == "the checkpoint at step 7 is kept"
    assert describe_checkpoint({"step": 9, "savedStep": None}) == "no checkpoint was saved"
    assert describe_checkpoint({}) == ""


# --- standing still


class Watched:
    """A job of two workers, looked at once a minute."""

    def __init__(self) -> None:
        self.job = pytorch_job(OWN, fingerprint="f")
        self.pods = [worker("a", NOON), worker("b", NOON)]
        self.progress: dict[str, Any] = {}
        self.minutes = 0
        self.standstill = Standstill()

    def after(self, minutes: int) -> float:
        """Minutes of standstill after so many more."""
        for _ in range(minutes):
            self.minutes += 1
            seconds = self.standstill.seconds(self.job, self.pods, self.progress, NOON + self.minutes * 60)
        return seconds / 60


@pytest.fixture
def watched() -> Watched:
    watched = Watched()
    assert watched.after(1) == 0
    return watched


def test_it_counts_from_all_pods_running_and_from_each_step(watched: Watched) -> None:
    assert watched.after(20) == 20, "the first step is waited for, too"
    watched.progress = {"step": 1, "updated": "12:20"}
    assert watched.after(1) == 0
    assert watched.after(7) == 7
    watched.progress = {"step": 1, "updated": "12:28"}  # taken again, after a resume
    assert watched.after(1) == 0


def test_progress_that_cannot_be_read_is_no_step(watched: Watched) -> None:
    watched.progress = {"step": 1, "updated": "12:01"}
    watched.after(6)
    watched.progress = {}
    assert watched.after(5) == 10


@pytest.mark.parametrize("what", ["suspended", "unschedulable", "one is missing", "waiting", "told to end", "ended"])
def test_time_in_which_no_step_can_be_taken_does_not_count(watched: Watched, what: str) -> None:
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
    elif what == "told to end":
        watched.pods[1] = worker("b", NOON)
        watched.pods[1]["metadata"]["deletionTimestamp"] = written(NOON)
    else:
        watched.pods[1] = worker("b", NOON, ended=NOON)
    assert watched.after(30) == 0
    watched.job["spec"]["runPolicy"]["suspend"] = False
    watched.pods[1:] = [before]
    assert watched.after(1) == 0, "from anew"
    assert watched.after(3) == 3


def test_a_restart_in_place_begins_anew(watched: Watched) -> None:
    assert watched.after(9) == 9
    watched.pods[1] = worker("b", NOON)
    watched.pods[1]["status"]["containerStatuses"][0]["restartCount"] = 1
    assert watched.after(1) == 0


# --- what the gate does


class Clock:
    """Time as the test tells it, for what the gate counts."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead


class Guarded:
    """A gate of two running workers that started at the clock's now."""

    def __init__(
        self,
        fake: FakeApi,
        api: Api,
        config: ClusterConfig,
        *,
        stage: str = "train",
        pace: Pace = QUICK,
        **guards: Any,
    ) -> None:
        self.fake, self.api, self.stage, self.pace = fake, api, stage, pace
        self.config = config.model_copy(update={"guards": Guards(**guards)})
        self.own = OWN.replace("train", stage)
        self.operator = Operator(fake, self.own)
        self.clock = Clock()
        self.started = time.time()
        fake.graceful = True

    def release(self) -> Guarded:
        self.fake.add("pytorchjobs", pytorch_job(self.own, self.stage))
        self.look_after()
        until(lambda: is_released(self.fake, self.own), "the release")
        self.operator.start()
        for index in (0, 1):
            self.fake.merge("pods", self.operator.worker(index), {"status": {"startTime": written(self.started)}})
        until(lambda: "Running on node-1" in "".join(self.said), "the pods")
        return self

    def look_after(self) -> None:
        """Start the gate, or another one."""
        self.said: list[str] = []
        ask = lambda of: ask_trainer(of, Path("/etc/llama-lora/run.yaml"))  # noqa: E731
        arguments = (self.api, self.config, self.stage, self.own, ask, self.said.append, self.pace, self.clock)
        self.future = beside(gate, *arguments)

    def annotation(self, name: str) -> dict[str, Any]:
        job = self.fake.get("pytorchjobs", self.own)
        assert job
        found: dict[str, Any] = json.loads(job["metadata"]["annotations"].get(f"llama-lora/{name}", "{}"))
        return found

    def end_pods(self) -> None:
        """As the kubelet does when they have saved; the operator's job is gone with the last."""
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


def test_a_run_that_costs_its_limit_is_stopped_with_its_checkpoint_its_nodes_free_and_the_reason_last(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    running = Guarded(fake, api, config, maxCost=200, pricePerNodeHour=21.5).release()
    says_step(trainer, 118, saved=100)
    running.clock.ahead = 4.5 * HOUR
    nothing_happens(fake)
    assert not is_going(fake, OWN), "9 node hours are 193.50"
    running.operator.write(0, "train: stopped as asked, with step 120 of 1000 saved")
    running.clock.ahead = 4.65 * HOUR
    until(lambda: is_going(fake, OWN))
    nothing_happens(fake)
    assert not running.future.done(), "the nodes are not free yet"
    assert any("stopping: guards.maxCost" in line for line in running.said)
    says_step(trainer, 120, saved=120)
    running.operator.end_worker(0, 143)
    running.end_pods()
    failure = running.fails(StoppedByGuard)
    assert failure.status == 2
    first, *tail = describe_failure("train", failure).splitlines()
    assert first.startswith("train failed: stopped: guards.maxCost 200 dollars is reached (cost so far ")
    assert first.endswith(
        "node hours at 21.5); the checkpoint at step 120 is kept. Raise guards.maxCost and upgrade to go on"
    )
    assert "ended with status" not in first, "they ended because they were told to"
    assert tail[-1] == "  train: stopped as asked, with step 120 of 1000 saved"


def test_ending_is_begun_early_enough_to_stay_below_the_limit(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    """Two pods with 30 s of grace each, at 3600 dollars an hour: 60 dollars."""
    running = Guarded(fake, api, config, maxCost=1000, pricePerNodeHour=3600).release()
    running.clock.ahead = (1000 - 60) / 2 - 15
    nothing_happens(fake)
    assert not is_going(fake, OWN)
    running.clock.ahead = (1000 - 60) / 2 + 1
    until(lambda: is_going(fake, OWN))
    running.end_pods()
    assert running.fails(StoppedByGuard)


def test_compile_counts_and_is_stopped_too(fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer) -> None:
    trainer.says("c1", up_to_date=False, of="compile")
    running = Guarded(fake, api, config, stage="compile", maxCost=200, pricePerNodeHour=21.5).release()
    running.clock.ahead = 5 * HOUR
    until(lambda: is_going(fake, running.own))
    running.end_pods()
    reason = running.fails(StoppedByGuard).reason
    assert "guards.maxCost" in reason and "checkpoint" not in reason


def test_what_earlier_jobs_and_gates_have_spent_counts(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    running = Guarded(fake, api, config, maxCost=200, pricePerNodeHour=21.5)
    ledger = Ledger().seen([worker("of-compile", NOON)], NOON + 9 * HOUR)
    trainer.progress.with_name("costs.json").write_text(json.dumps(ledger.as_json()))
    running.release()
    running.clock.ahead = 0.1 * HOUR
    until(lambda: (running.annotation("cost").get("cost") or 0) > 193)
    assert not is_going(fake, OWN)
    running.clock.ahead = 0.16 * HOUR
    until(lambda: is_going(fake, OWN))
    running.end_pods()
    assert "9.3" in running.fails(StoppedByGuard).reason
    kept = Ledger.from_json(json.loads(trainer.progress.with_name("costs.json").read_text()))
    assert len(kept.pods) == 3 and kept.node_hours == pytest.approx(9.32, abs=0.02)


def test_a_run_that_has_spent_its_limit_asks_for_no_node(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    running = Guarded(fake, api, config, maxCost=200, pricePerNodeHour=21.5)
    ledger = Ledger().seen([worker("of-yesterday", NOON)], NOON + 9.3 * HOUR)
    trainer.progress.with_name("costs.json").write_text(json.dumps(ledger.as_json()))
    fake.add("pytorchjobs", pytorch_job(OWN))
    running.look_after()
    reason = running.fails(StoppedByGuard).reason
    assert "not started: guards.maxCost 200 dollars is reached (cost so far 199.95" in reason
    assert not is_released(fake)
    running.config = config.model_copy(update={"guards": Guards(max_cost=400, price_per_node_hour=21.5)})
    running.look_after()
    until(lambda: is_released(fake), "the release, with a higher limit")
    running.operator.fail()
    running.fails()


def test_a_gate_that_is_started_again_counts_on(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    running = Guarded(fake, api, config, pricePerNodeHour=10).release()
    running.clock.ahead = HOUR
    until(lambda: (running.annotation("cost").get("cost") or 0) >= 20)
    first = running.future
    running.look_after()
    fake.remove("pods", running.operator.worker(1))  # its node is lost
    nothing_happens(fake)
    running.clock.ahead = 2 * HOUR
    until(lambda: (running.annotation("cost").get("cost") or 0) >= 30)
    assert running.annotation("cost")["nodeHours"] == pytest.approx(3, abs=0.02)
    running.operator.fail()
    running.fails()
    with pytest.raises(StageFailed):
        first.result(PATIENCE)


def test_pods_of_a_job_that_makes_way_are_counted_until_they_are_gone(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    running = Guarded(fake, api, config, pace=replace(QUICK, pods_gone=PATIENCE), pricePerNodeHour=10)
    owner = fake.add("pytorchjobs", pytorch_job(EARLIER, fingerprint="f0"))
    earlier = pod(f"{EARLIER}-worker-0", owner, "PyTorchJob")
    earlier["status"]["startTime"] = written(running.started - HOUR)
    fake.add("pods", earlier)
    fake.add("pytorchjobs", pytorch_job(OWN))
    running.look_after()
    until(lambda: is_going(fake, EARLIER))
    nothing_happens(fake)
    fake.remove("pods", f"{EARLIER}-worker-0")
    fake.remove("pytorchjobs", EARLIER)
    until(lambda: is_released(fake))
    kept = Ledger.from_json(json.loads(trainer.progress.with_name("costs.json").read_text()))
    assert kept.node_hours == pytest.approx(1, abs=0.01)
    running.operator.fail()
    running.fails()


def test_a_training_that_stands_still_is_stopped_and_says_since_which_step_and_where_its_stacks_are(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    running = Guarded(fake, api, config, stallTimeoutSeconds=1800).release()
    says_step(trainer, 7, saved=5)
    until(lambda: running.annotation("progress").get("step") == 7)
    nothing_happens(fake)
    running.clock.ahead = 1700
    nothing_happens(fake)
    says_step(trainer, 8, saved=5)  # in time
    until(lambda: running.annotation("progress").get("step") == 8)
    nothing_happens(fake)
    running.clock.ahead = 1700 + 1790
    nothing_happens(fake)
    assert not is_going(fake, OWN)
    running.operator.write(1, "all_reduce ...")
    running.clock.ahead = 1700 + 1810
    until(lambda: is_going(fake, OWN))
    running.end_pods()
    failure = running.fails(StoppedByGuard)
    assert failure.status == 2, "what tries again unasked would pay for the same half hour"
    assert "stopped: no step for 30 min" in failure.reason
    assert "the last was step 8 of 1000; the checkpoint at step 5 is kept" in failure.reason
    assert f"What each worker was doing is in {trainer.progress.parent}/stacks" in failure.reason


def test_a_training_that_never_takes_its_first_step_is_stopped(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    says_step(trainer, 9)  # an earlier training's
    running = Guarded(fake, api, config, stallTimeoutSeconds=1800).release()
    nothing_happens(fake)
    running.clock.ahead = 1900
    until(lambda: is_going(fake, OWN))
    running.end_pods()
    assert "none was taken yet" in running.fails(StoppedByGuard).reason


def test_a_gate_that_is_started_again_knows_the_step_of_the_job_it_finds(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    running = Guarded(fake, api, config, stallTimeoutSeconds=1800)
    fake.add("pytorchjobs", pytorch_job(OWN, fingerprint="f1"))
    fake.merge("pytorchjobs", OWN, {"status": {"startTime": written(running.started - HOUR)}})
    running.operator.start()
    says_step(trainer, 8)
    running.look_after()
    until(lambda: running.annotation("progress").get("step") == 8)
    nothing_happens(fake)
    running.clock.ahead = 1900
    until(lambda: is_going(fake, OWN))
    running.end_pods()
    assert "the last was step 8" in running.fails(StoppedByGuard).reason


@pytest.mark.parametrize(("stage", "limit"), [("train", 0), ("compile", 1800)])
def test_without_a_limit_and_in_compile_standing_still_is_no_failure(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer, stage: str, limit: int
) -> None:
    trainer.says("c1", up_to_date=False, of="compile")
    running = Guarded(fake, api, config, stage=stage, stallTimeoutSeconds=limit).release()
    nothing_happens(fake)
    running.clock.ahead = 1e6
    nothing_happens(fake)
    assert not is_going(fake, running.own)
    running.operator.fail()
    running.fails()


def test_pods_that_do_not_end_are_named_with_what_to_do(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    running = Guarded(fake, api, config, maxCost=200, pricePerNodeHour=21.5).release()
    running.clock.ahead = 5 * HOUR
    reason = running.fails(StoppedByGuard).reason
    assert f"STILL RUNNING after 0 s, on nodes that cost: {running.operator.worker(0)}" in reason.replace("1 s", "0 s")
    assert "kubectl -n team-a delete pod --force" in reason


def test_a_gate_that_comes_after_a_stop_gives_its_reason(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    """The first one was lost, with its node, while it waited for the pods."""
    running = Guarded(fake, api, config, maxCost=200, pricePerNodeHour=21.5).release()
    running.clock.ahead = 5 * HOUR
    until(lambda: is_going(fake, OWN))
    running.end_pods()
    running.fails(StoppedByGuard)
    running.look_after()
    assert "guards.maxCost 200 dollars is reached" in running.fails(StoppedByGuard).reason


def test_a_volume_that_takes_no_file_is_said_once_and_the_job_is_followed_on(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, value: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("genvalues.common.files.write_json", refuse)
    running = Guarded(fake, api, config, maxCost=200, pricePerNodeHour=21.5).release()
    nothing_happens(fake)
    assert sum("No space left on device" in line for line in running.said) == 1
    running.clock.ahead = 5 * HOUR
    until(lambda: is_going(fake, OWN))
    running.end_pods()
    running.fails(StoppedByGuard)


@pytest.mark.parametrize("content", ["", "[]", '{"pods": {"a": {}}, "stopped": null}', '{"pods": 1, "stopped": null}'])
def test_a_ledger_that_is_spoilt_is_named_before_a_node_is_asked_for(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer, content: str
) -> None:
    trainer.progress.with_name("costs.json").write_text(content)
    running = Guarded(fake, api, config)
    fake.add("pytorchjobs", pytorch_job(OWN))
    running.look_after()
    assert "costs.json: is not what a gate has written" in str(running.fails(UserError))
    assert not is_released(fake)


def test_progress_and_cost_are_annotations_of_the_job_to_its_end(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    says_step(trainer, 9)  # an earlier training's
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


def test_annotations_come_at_most_every_so_often_and_at_the_end(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    seldom = replace(QUICK, progress=60)
    running = Guarded(fake, api, config, pace=seldom, pricePerNodeHour=21.5).release()
    nothing_happens(fake)
    patches = fake.requests.count(("patch", "pytorchjobs.kubeflow.org"))
    assert patches == 2, "the release, and the first look"
    says_step(trainer, 1000)
    for _ in range(3):
        nothing_happens(fake)
    assert fake.requests.count(("patch", "pytorchjobs.kubeflow.org")) == patches
    running.succeeds(trainer)
    assert running.annotation("progress")["step"] == 1000


def test_annotations_that_are_refused_are_said_once_and_the_job_is_followed_on(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    running = Guarded(fake, api, config, maxCost=200, pricePerNodeHour=21.5).release()
    fake.denied["patch", "pytorchjobs"] = "admission webhook denied the request"
    nothing_happens(fake)
    nothing_happens(fake)
    assert sum("admission webhook denied" in line for line in running.said) == 1
    fake.denied.clear()
    running.clock.ahead = HOUR
    until(lambda: (running.annotation("cost").get("cost") or 0) >= 43)
    fake.denied["patch", "pytorchjobs"] = "admission webhook denied the request"
    running.clock.ahead = 5 * HOUR
    until(lambda: is_going(fake, OWN), "the guard still ends it")
    running.end_pods()
    running.fails(StoppedByGuard)


def test_a_stage_that_is_done_is_done_though_its_last_annotations_are_refused(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    running = Guarded(fake, api, config, pace=replace(QUICK, progress=HOUR)).release()
    fake.denied["patch", "pytorchjobs"] = "admission webhook denied the request"
    running.succeeds(trainer)
    assert any("admission webhook denied" in line for line in running.said)


def test_a_job_that_is_deleted_before_its_annotations_are_written_is_told_as_deleted(
    fake: FakeApi, api: Api, config: ClusterConfig, trainer: Trainer
) -> None:
    running = Guarded(fake, api, config).release()
    fake.after.append(("get", "pytorchjobs", lambda job: fake.remove("pytorchjobs", OWN)))
    assert "was deleted while it ran" in running.fails().reason
