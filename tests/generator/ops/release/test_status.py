"""genvalues status: each stage's state, from Helm's record and the API, attached and detached."""

from __future__ import annotations

import json
import re
import socket
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from generator.cluster.fake_api import FakeApi, now, write_kubeconfig
from generator.cluster.waiting import PATIENCE, beside, until
from generator.ops.release.fake_helm import FakeHelm
from generator.ops.release.run import Outer, Run
from genvalues import cli
from genvalues.common.manifests import SKIPPED
from genvalues.ops import follow, status, status_text
from genvalues.ops.stages import StageStatus

ROOT = Path(__file__).parents[4]
NOW = datetime.now(timezone.utc)
STAGES = ["preflight", "storage-prepare", "tokenize", "compile", "train", "consolidate", "merge", "evaluate"]


def genvalues(*arguments: str) -> int:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["genvalues", *arguments])
        cli.main()
    return int(ended.value.code or 0)


def look(release: str = "demo") -> status.ReleaseStatus:
    return status.watch_release(release, "team-a", None).status()


def states(of: status.ReleaseStatus) -> dict[str, str]:
    return {stage.name: stage.state for stage in of.stages}


def stage(name: str, of: status.ReleaseStatus | None = None) -> StageStatus:
    return next(one for one in (of or look()).stages if one.name == name)


@pytest.fixture
def run(fake: FakeApi, helm: FakeHelm) -> Run:
    return Run(fake, helm, values={"storage": {"prepare": {"enabled": True}}})


def test_stages_are_in_hook_order_and_waiting_until_they_start(run: Run) -> None:
    assert states(look()) == dict.fromkeys(STAGES, "waiting")
    run.through("preflight")
    run.begin("storage-prepare")
    found = look()
    assert states(found) == {**dict.fromkeys(STAGES, "waiting"), "preflight": "done", "storage-prepare": "running"}
    assert found.outcome == "running" and found.mode == "attached" and found.helm == "pending-install"


def test_jobs_of_an_earlier_revision_do_not_count(run: Run) -> None:
    run.to_train()
    run.end("train-gate", "train: done")
    run.through("consolidate", "merge", "evaluate")
    run.ends("deployed")
    assert look().outcome == "done"
    run.revision, run.status, run.phases = 2, "pending-upgrade", {}
    run.record()
    run.begin("preflight")
    found = look()
    assert states(found)["preflight"] == "running" and states(found)["merge"] == "waiting"


def test_a_stage_with_nothing_to_do_is_skipped(run: Run) -> None:
    run.through("preflight", "storage-prepare")
    run.begin("tokenize")
    run.end("tokenize", f"tokenize: {SKIPPED} (/workspace/x.json)")
    assert states(look())["tokenize"] == "skipped"


def test_the_trainer_uses_the_same_words_for_nothing_to_do() -> None:
    stage_text = (ROOT / "trainer/llama_lora/stage.py").read_text()
    assert SKIPPED in stage_text or "manifests.SKIPPED" in stage_text


def test_the_training_stage_has_progress_cost_and_nodes(run: Run) -> None:
    run.to_train()
    progress = {
        "stage": "train",
        "step": 120,
        "totalSteps": 1000,
        "loss": 1.25,
        "evalLoss": 1.5,
        "tokensPerSecond": 5120.4,
        "etaSeconds": 3720,
    }
    cost = {"cost": 12.3, "nodeHours": 0.6, "pricePerNodeHour": 21.5, "maxCost": 40, "updated": now()}
    run.annotate("demo-train-1", progress={**progress, "updated": now()}, cost=cost)
    found = look()
    train = stage("train", found)
    assert train.state == "running" and train.progress and train.progress["step"] == 120
    assert train.nodes == ("node-0", "node-1") and train.devices == {"aws.amazon.com/neuron": 32}
    assert (found.cost, found.max_cost) == (12.3, 40)
    line = status_text.describe(train, (train.started or NOW) + timedelta(seconds=754))
    assert line == (
        "train: running for 12 min 34 s, step 120 of 1,000, loss 1.2500, held-out loss 1.5000, "
        "5,120 tokens/s, 1 h 02 min left, "
        "$12.30 so far of at most $40.00, holds 2 nodes"
    )


def test_a_stage_that_runs_as_a_trainjob_is_shown_as_one_that_runs_as_a_pytorchjob(
    fake: FakeApi, helm: FakeHelm
) -> None:
    fake.crds = {"trainjobs", "trainingruntimes"}
    run = Run(fake, helm, values={"workload": "trainjob"})
    run.through("preflight", "storage-prepare", "tokenize")
    run.begin("compile-gate")
    workers = run.release_workers("compile")
    compiling = stage("compile")
    assert compiling.state == "running" and set(compiling.pods) >= set(workers)
    assert compiling.nodes == ("node-0", "node-1") and compiling.devices == {"aws.amazon.com/neuron": 32}
    fake.merge("trainjobs", "demo-compile-1", {"spec": {"suspend": True}})
    for worker in workers:
        fake.remove("pods", worker)
    assert stage("compile").note == "suspended"
    fake.merge("trainjobs", "demo-compile-1", {"spec": {"suspend": False}})
    run.end("compile-gate", "the gate was evicted", code=1)
    assert stage("compile").note.startswith("TrainJob demo-compile-1 runs without a gate")
    fake.forbidden.add(("list", "trainjobs.trainer.kubeflow.org"))
    assert genvalues("status", "demo", "-n", "team-a") == 2


@pytest.mark.parametrize(
    "annotation", ["", "[]", "{", "null", '{"step": "many", "loss": null, "etaSeconds": true}', '{"stage": "compile"}']
)
def test_a_missing_or_malformed_annotation_is_ignored(run: Run, fake: FakeApi, annotation: str) -> None:
    run.to_train()
    annotations = {"llama-lora/progress": annotation, "llama-lora/cost": annotation}
    fake.merge("pytorchjobs", "demo-train-1", {"metadata": {"annotations": annotations}})
    line = status_text.describe(stage("train"), NOW - timedelta(days=9000))
    assert line.startswith("train: running for 0 s") and "step" not in line and "$" not in line


def test_what_a_stage_waits_for_is_shown(run: Run, fake: FakeApi) -> None:
    first, second = run.to_train()
    lack = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes are available"}
    fake.merge("pods", second, {"status": {"phase": "Pending", "conditions": [lack], "containerStatuses": None}})
    assert stage("train").note == f"{second} cannot be scheduled: 0/3 nodes are available"
    waiting = {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}
    fake.merge(
        "pods", second, {"status": {"conditions": [], "containerStatuses": [{"name": "pytorch", "state": waiting}]}}
    )
    assert stage("train").note == f"{second}: ImagePullBackOff: no such image"
    for worker in (first, second):
        fake.remove("pods", worker)
    uid = fake.objects["pytorchjobs", "demo-train-1"]["metadata"]["uid"]
    event = {"metadata": {"name": "e"}, "type": "Warning", "reason": "FailedCreatePod", "message": "exceeded quota"}
    fake.add("events", {**event, "involvedObject": {"uid": uid}, "lastTimestamp": now()})
    assert stage("train").note == "0 of 2 worker pods: FailedCreatePod: exceeded quota"
    fake.merge("pytorchjobs", "demo-train-1", {"spec": {"runPolicy": {"suspend": True}}})
    assert stage("train").note == "suspended"
    fake.merge("pytorchjobs", "demo-train-1", {"metadata": {"labels": {"kueue.x-k8s.io/queue-name": "team"}}})
    assert stage("train").note == "waits in queue team"


def test_a_failed_stage_has_its_reason_and_exit_status_and_ends_with_the_logs_tail(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run.through("preflight", "storage-prepare")
    run.begin("tokenize")
    run.end("tokenize", "reading rows.jsonl", "rows.jsonl has no column q", code=2)
    run.ends("failed")
    found = look()
    assert (found.outcome, found.exit_status) == ("failed", 2)
    assert genvalues("status", "demo", "-n", "team-a") == 0
    assert capsys.readouterr().out.splitlines()[-4:] == [
        "tokenize failed: demo-tokenize-x1 ended with status 2",
        "last 2 lines of demo-tokenize-x1:",
        "  reading rows.jsonl",
        "  rows.jsonl has no column q",
    ]


def test_a_gated_stages_reason_is_in_the_gates_last_lines(run: Run, fake: FakeApi) -> None:
    workers = run.to_train()
    for worker in workers:
        fake.remove("pods", worker)  # the operator deletes the pods of a failed job
    fake.set_condition("pytorchjobs", "demo-train-1", "Failed", "1 Worker replica(s) failed.")
    told = [
        "train: released PyTorchJob demo-train-1",
        "train failed: demo-train-1-worker-1 ended with status 137 (OOMKilled); PyTorchJob demo-train-1: 1 failed",
        "last 2 lines of demo-train-1-worker-1:",
        "  step 3",
        "  allocating 80 GB",
    ]
    run.end("train-gate", *told, code=1, reason="PodFailurePolicy")
    train = stage("train")
    assert (train.state, train.exit_status, train.tail_of) == ("failed", 1, "demo-train-1-worker-1")
    assert train.reason.startswith("demo-train-1-worker-1 ended with status 137 (OOMKilled)")
    assert train.tail == ("step 3", "allocating 80 GB")


def test_a_stage_that_a_guard_ended_is_stopped_with_status_2(run: Run, fake: FakeApi) -> None:
    run.to_train()
    fake.merge("pytorchjobs", "demo-train-1", {"metadata": {"deletionTimestamp": now()}})
    run.end("train-gate", "train failed: stopped: guards.maxCost 40 dollars is reached. Raise it", code=2)
    run.ends("failed")
    found = look()
    assert (found.outcome, found.exit_status) == ("stopped", 2)
    assert found.reason == "train stopped: guards.maxCost 40 dollars is reached. Raise it"


def test_a_missed_deadline_is_a_failure_and_a_cleanup_a_stop(run: Run, fake: FakeApi) -> None:
    run.begin("preflight")
    fake.merge("jobs", "demo-preflight", {"spec": {"activeDeadlineSeconds": 600}})
    fake.set_condition("jobs", "demo-preflight", "Failed", "Job was active longer", "DeadlineExceeded")
    assert stage("preflight").reason == "did not end within 600 s (activeDeadlineSeconds)"
    fake.merge("jobs", "demo-preflight", {"spec": {"activeDeadlineSeconds": 1}})
    run.ends("failed")
    found = look()
    assert (stage("preflight", found).state, found.outcome, found.exit_status) == ("stopped", "stopped", 1)


def test_training_without_its_gate_is_running_and_noted(run: Run, fake: FakeApi) -> None:
    run.to_train()
    fake.merge("jobs", "demo-train-gate", {"spec": {"activeDeadlineSeconds": 1}})
    fake.set_condition("jobs", "demo-train-gate", "Failed", "", "DeadlineExceeded")
    run.ends("failed")
    train = stage("train")
    assert train.state == "running" and "runs without a gate" in train.note
    assert "no Helm client follows" in look().reason


def test_a_release_that_runs_nothing_is_idle(run: Run) -> None:
    run.ends("deployed")  # as after a rollback or with --no-hooks
    found = look()
    assert found.outcome == "idle" and found.exit_status == 1 and "genvalues install" in found.reason


def test_detached_stages_are_the_inner_releases_and_the_outcome_is_the_runners(fake: FakeApi, helm: FakeHelm) -> None:
    outer = Outer(fake, helm)
    found = look()
    assert (found.mode, found.outcome, found.stages) == ("detached", "running", ())
    inner = outer.inner()
    inner.to_train()
    found = look()
    assert states(found)["train"] == "running" and found.runner and found.runner.state == "running"
    # The gate has deleted the job, which stays until its workers have ended.
    fake.merge("pytorchjobs", "demo-run-train-1", {"metadata": {"deletionTimestamp": now()}})
    inner.end("train-gate", "train failed: no memory", code=1)
    outer.end("runner", "pipeline: demo-run-train-gate failed", code=1)
    found = look()
    assert (found.outcome, found.exit_status) == ("failed", 1) and found.reason == "train failed: no memory"
    assert stage("train", found).nodes == ("node-0", "node-1"), "held until the workers have ended"


def test_detached_stages_of_an_earlier_runner_do_not_count(fake: FakeApi, helm: FakeHelm) -> None:
    inner = Outer(fake, helm).inner()
    inner.through("preflight")
    inner.updated = "2020-01-01T00:00:00Z"
    inner.record()
    assert set(states(look()).values()) == {"waiting"}


def test_a_runner_that_fails_or_is_stopped_ends_the_pipeline(fake: FakeApi, helm: FakeHelm) -> None:
    outer = Outer(fake, helm)
    outer.end("runner", "/opt/chart: pipeline.mode is detached.", code=2)
    found = look()
    assert (found.outcome, found.exit_status) == ("failed", 2)
    assert status_text.closing_lines(found)[-1] == "  /opt/chart: pipeline.mode is detached."
    fake.remove("jobs", "demo-runner-1")
    assert look().outcome == "stopped"


def test_json_has_every_key_and_nothing_else_is_on_stdout(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run.to_train()
    assert genvalues("status", "demo", "-n", "team-a", "--json") == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert document["exitStatus"] is None and document["outcome"] == "running"
    train = next(one for one in document["stages"] if one["name"] == "train")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", train["started"]) and train["ended"] is None
    assert train["devices"] == {"aws.amazon.com/neuron": 32} and {"tailOf", "exitStatus", "cost"} <= train.keys()


def test_watch_prints_each_change_once_and_exits_with_the_outcome(
    run: Run, fake: FakeApi, capsys: pytest.CaptureFixture[str]
) -> None:
    run.to_train()
    watching = beside(genvalues, "status", "demo", "-n", "team-a", "--watch")
    try:
        told = ""

        def says(words: str) -> bool:
            nonlocal told
            told += capsys.readouterr().out
            return words in told

        until(lambda: says("train: running"))
        looks = len(fake.requests)
        until(lambda: len(fake.requests) > looks + 20)  # several looks without a change
        run.annotate("demo-train-1", progress={"stage": "train", "step": 7, "totalSteps": 9, "updated": now()})
        until(lambda: says("step 7 of 9"))
    finally:
        fake.set_condition("pytorchjobs", "demo-train-1", "Failed")
        run.end(
            "train-gate", "train failed: worker-0 ended with status 2", "last 1 lines of w:", "  no column q", code=2
        )
        run.ends("failed")
    assert watching.result(PATIENCE) == 2
    says("")
    lines = told.splitlines()
    assert len([line for line in lines if line.startswith("tokenize:")]) == 1
    assert len([line for line in lines if line.startswith("train: running") and "step" not in line]) == 1
    assert lines[-1] == "  no column q"


def test_watch_continues_after_the_api_server_was_unavailable(
    run: Run, fake: FakeApi, capsys: pytest.CaptureFixture[str]
) -> None:
    run.to_train()
    follower = follow.ReleaseFollower(status.watch_release("demo", "team-a", None))
    assert [line for line in follower.look() if line.startswith("train: running")] and follower.status
    fake.away = True
    assert follower.look() == [] == follower.look() and follower.status is None
    fake.away = False
    assert follower.look() == [] and follower.status, "nothing has changed"
    away, back = (line for line in capsys.readouterr().err.splitlines() if "API server" in line)
    assert away.startswith("warning: ") and away.endswith("Retrying.") and "answers again" in back


def test_optional_requests_that_are_refused_are_listed_and_the_rest_is_shown(run: Run, fake: FakeApi) -> None:
    run.to_train()
    fake.forbidden |= {("list", "pods"), ("list", "events"), ("get", "pods/log")}
    found = look()
    assert states(found)["train"] == "running"
    assert [line.split('"')[3] for line in found.not_read] == ["pods", "events"]


@pytest.mark.parametrize("resource", ["jobs.batch", "pytorchjobs.kubeflow.org"])
def test_a_required_request_that_is_refused_is_one_line_and_status_2(
    run: Run, fake: FakeApi, capsys: pytest.CaptureFixture[str], resource: str
) -> None:
    fake.forbidden.add(("list", resource))
    assert genvalues("status", "demo", "-n", "team-a") == 2
    line = capsys.readouterr().err.rstrip("\n")
    assert "\n" not in line
    assert line.startswith("namespace team-a: ") and resource in line


@pytest.mark.parametrize("name", ["A_b", "x" * 54, "", "-x", "a b"])
@pytest.mark.parametrize("command", ["status", "logs", "bundle", "uninstall"])
def test_an_invalid_release_name_is_one_line_before_any_request(
    run: Run, fake: FakeApi, helm: FakeHelm, capsys: pytest.CaptureFixture[str], command: str, name: str
) -> None:
    assert genvalues(command, "-n", "team-a", "--", name) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f'"{name}" is not a valid release name' in line and "at most 53" in line
    assert not fake.requests and not helm.calls


def test_an_unknown_release_is_one_line_that_names_the_existing_ones(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert genvalues("status", "dem", "-n", "team-a") == 2
    assert capsys.readouterr().err == 'namespace team-a: release "dem" not found. Releases: demo.\n'


@pytest.mark.parametrize(
    ("said", "ours", "told"),
    [
        ('secrets is forbidden: User "u" cannot list resource "secrets"', 2, "release demo: secrets is forbidden"),
        ("Kubernetes cluster unreachable: connection refused", 1, "release demo: Kubernetes cluster unreachable"),
        ("invalid header hf_QwErTyUiOp given", 2, "release demo: invalid header hf_... given"),
    ],
)
def test_an_error_of_helm_is_one_line(
    run: Run, helm: FakeHelm, capsys: pytest.CaptureFixture[str], said: str, ours: int, told: str
) -> None:
    helm.refuses(said)
    assert genvalues("status", "demo", "-n", "team-a") == ours
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(told)


def test_an_unavailable_api_server_is_one_line_and_status_1(
    run: Run, fake: FakeApi, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.away = True
    assert genvalues("status", "demo", "-n", "team-a") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("the API server does not answer") and line.endswith("Try: kubectl cluster-info")


@pytest.mark.parametrize("command", ["status", "logs"])
@pytest.mark.parametrize(
    ("status", "body", "ours", "told"),
    [
        (200, '{"kind": "List", "items": null, "metadata": []}', 1, "Check the server's address in the kubeconfig"),
        (200, "<html>Log in</html>", 1, "Check the server's address in the kubeconfig"),
        (302, "", 2, "302 Found. Check the server's address in the kubeconfig"),
        (401, '{"message": "Unauthorized\\n\\u001b[31m"}', 2, "Unauthorized ?[31m. Log in to the cluster again"),
        (401, f'{{"message": "token eyJhbGciOi.{"right" * 300} hf_{"right" * 9}"}}', 2, "token eyJ... hf_. Log in"),
    ],
)
def test_what_is_not_an_api_server_or_wants_a_login_is_one_line_with_the_fix(
    run: Run,
    fake: FakeApi,
    capsys: pytest.CaptureFixture[str],
    command: str,
    status: int,
    body: str,
    ours: int,
    told: str,
) -> None:
    fake.nonsense = (status, body)
    assert genvalues(command, "demo", "-n", "team-a") == ours
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line and "right" not in line


def test_objects_with_nulls_or_without_a_uid_are_read_as_far_as_they_go(run: Run, fake: FakeApi) -> None:
    run.to_train()
    for item in fake.objects.values():
        item["metadata"] |= {"uid": None, "ownerReferences": [{"kind": "Job", "name": "a"}], "annotations": None}
        item["status"] = None
    assert states(look())["train"] == "running"


@pytest.mark.parametrize("output", ["null", "[null, 5, {}]", "no JSON", "\\377"], ids=ascii)
def test_a_helm_whose_output_is_not_helms_is_one_line_that_names_it(
    run: Run, helm: FakeHelm, capsys: pytest.CaptureFixture[str], output: str
) -> None:
    (helm.folder / "helm").write_text(f"#!/bin/sh\n[ $1 = version ] && printf v3.22.0 || printf '{output}'\n")
    assert genvalues("status", "demo", "-n", "team-a") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"release demo: the output of {helm.folder}/helm is not valid (")


@pytest.mark.parametrize("command", ["install", "status", "logs", "bundle", "uninstall"])
def test_an_api_server_that_accepts_connections_and_never_answers_is_one_line_and_status_1(
    command: str, helm: FakeHelm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Helm is not run, because it would wait forever."""
    Path("f.yaml").write_text("name: demo\nmodel: gpt2\ndataset: {source: a/b}\ninstance: cpu\n")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        write_kubeconfig(tmp_path / "kubeconfig", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
        about = ["f.yaml", "--skip-preflight"] if command == "install" else ["demo"]
        assert genvalues(command, *about, "-n", "team-a") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("the API server does not answer") and line.endswith("Try: kubectl cluster-info")
    assert not helm.calls


@pytest.mark.parametrize("command", ["install", "status", "logs", "bundle", "uninstall", "preflight"])
def test_no_kubeconfig_ends_a_command_with_2_and_is_one_finding_of_preflight(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As docs/preflight.md says."""
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    arguments = {
        "install": [str(ROOT / "values" / "cpu.yaml"), "--release", "demo"],
        "preflight": [str(ROOT / "values" / "cpu.yaml"), "--cluster"],
    }.get(command, ["demo"])
    ended = genvalues(command, *arguments)
    printed = capsys.readouterr()
    if command == "preflight":
        assert ended == 1 and printed.out.startswith("not checked  cluster: ")
    else:
        assert ended == 2 and printed.err.splitlines()[-1].startswith("no usable kubeconfig: ")
    said = (ROOT / "docs" / "preflight.md").read_text().partition("cannot work without a kubeconfig and end with 2")
    assert command == "preflight" or f"`{command}`" in said[0].splitlines()[-1]
