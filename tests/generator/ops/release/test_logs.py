"""genvalues logs: of the right stage, with pod names, through restarts and new pods."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from generator.cluster.fake_api import FakeApi
from generator.cluster.waiting import PATIENCE, beside, until
from generator.ops.release.fake_helm import FakeHelm
from generator.ops.release.run import Outer, Run
from generator.ops.release.test_status import genvalues
from genvalues.commands.logs import STAGES
from genvalues.common.helm import render
from genvalues.ops import logs, status
from genvalues.ops.local.chart_stages import STAGE, annotation_of, stage_jobs
from genvalues.ops.local.local_values import read_values

ROOT = Path(__file__).parents[4]


@pytest.fixture
def run(fake: FakeApi, helm: FakeHelm) -> Run:
    return Run(fake, helm)


def shown(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> list[str]:
    assert genvalues("logs", "demo", "-n", "team-a", *arguments) == status
    return capsys.readouterr().out.splitlines()


def test_the_running_stage_is_shown_with_the_pod_before_each_workers_line(
    run: Run, fake: FakeApi, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = run.to_train()
    fake.logs[first], fake.logs[second] = ["step 1", "10%\r20%"], ["hello"]
    assert sorted(shown(capsys)) == [f"[{first}] 20%", f"[{first}] step 1", f"[{second}] hello"]
    assert shown(capsys, "tokenize") == ["tokenize: done"]
    assert sorted(shown(capsys, "--tail", "1")) == [f"[{first}] 20%", f"[{second}] hello"]


def test_the_failed_stage_is_shown_and_its_gates_log_if_the_workers_are_deleted(
    run: Run, fake: FakeApi, capsys: pytest.CaptureFixture[str]
) -> None:
    for worker in run.to_train():
        fake.remove("pods", worker)
    fake.set_condition("pytorchjobs", "demo-train-1", "Failed")
    run.end("train-gate", "train failed: no memory", "last 1 lines of w:", "  step 3", code=1)
    run.ends("failed")
    assert shown(capsys) == ["train failed: no memory", "last 1 lines of w:", "  step 3"]


def test_the_last_stage_of_a_finished_run_is_shown(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run.through("preflight", "tokenize")
    assert shown(capsys) == ["tokenize: done"]


def test_the_runners_log_is_shown_before_the_first_stage(
    fake: FakeApi, helm: FakeHelm, capsys: pytest.CaptureFixture[str]
) -> None:
    outer = Outer(fake, helm)
    fake.logs[outer.pod] = ["waiting for demo-run-tokenize"]
    assert shown(capsys) == ["waiting for demo-run-tokenize"]


def test_following_continues_through_a_restart_and_a_new_pod_until_the_stage_ends(run: Run, fake: FakeApi) -> None:
    first, second = run.to_train()
    fake.remove("pods", second)
    fake.logs[first] = ["one"]
    lines: list[str] = []
    watcher = status.watch_release("demo", "team-a", None)
    following = beside(logs.write_log, watcher, None, follow=True, tail=None, write=lines.append)
    try:
        until(lambda: lines == [f"[{first}] one"])
        # A restart in place: the stream ends, and reading continues with the new container's log.
        over = {"exitCode": 1, "reason": "Error", "finishedAt": "2025-01-01T00:00:00Z"}
        container = {"name": "pytorch", "state": {"terminated": over}, "restartCount": 0}
        fake.merge("pods", first, {"status": {"containerStatuses": [container]}})
        running = {"name": "pytorch", "state": {"running": {}}, "lastState": {"terminated": over}, "restartCount": 1}
        fake.merge("pods", first, {"status": {"containerStatuses": [running]}})
        fake.logs[first].append("two")
        until(lambda: f"[{first}] two" in lines)
        job = fake.objects["pytorchjobs", "demo-train-1"]
        fake.logs["demo-train-1-worker-7"] = ["late"]
        run.add_pod("demo-train-1-worker-7", {**job, "kind": "PyTorchJob"}, container="pytorch")
        until(lambda: "[demo-train-1-worker-7] late" in lines)
    finally:
        for pod in (first, "demo-train-1-worker-7"):
            fake.logs[pod].append("bye")
            run.end_pod(pod, 0)
        fake.set_condition("pytorchjobs", "demo-train-1", "Succeeded")
        run.end("train-gate", "train: done")
    assert following.result(PATIENCE) == "train"
    assert lines.count(f"[{first}] one") == 1, "a line that was read before the restart is not repeated"
    assert {f"[{first}] bye", "[demo-train-1-worker-7] bye"} <= set(lines)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian"], 'demo: stage "trian" not found. Stages: preflight, storage-prepare, tokenize, compile,'),
        (["merge"], "demo: stage merge has no log. It has not started; -f waits for it."),
    ],
)
def test_an_unknown_stage_or_one_without_log_is_one_line(
    run: Run, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    run.through("preflight")
    assert genvalues("logs", "demo", "-n", "team-a", *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(said)


def test_a_missing_right_to_read_logs_is_one_line(run: Run, fake: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    run.to_train()
    fake.forbidden.add(("get", "pods/log"))
    assert genvalues("logs", "demo", "-n", "team-a") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pods/log" in line


def test_json_is_one_document(run: Run, fake: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    run.through("preflight")
    run.begin("tokenize")
    fake.logs["demo-tokenize-x1"] = ["a", "b"]
    (text,) = ["\n".join(shown(capsys, "--json"))]
    assert json.loads(text) == {"release": "demo", "stage": "tokenize", "lines": ["a", "b"]}


def completed(words: str) -> list[str]:
    asked = {"_GENVALUES_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    program = Path(sys.executable).with_name("genvalues")
    done = subprocess.run([program], env=os.environ | asked, capture_output=True, text=True, check=True)
    return [line.removeprefix("plain,") for line in done.stdout.splitlines()]


def test_the_shell_completes_stages_without_a_cluster() -> None:
    assert completed("genvalues logs demo ") == list(STAGES)
    assert completed("genvalues logs -f demo co") == ["compile", "consolidate"]
    assert completed("genvalues logs demo nothing-so") == [""], "nothing of that name"


def test_completion_offers_the_charts_stages_in_their_order() -> None:
    values = read_values(ROOT / "values" / "trn1.values.yaml")
    values["compile"]["runsOn"] = "cpu"  # adds a stage
    values |= {"storage": {**values.get("storage", {}), "prepare": {"enabled": True}}, "evaluation": {"enabled": True}}
    values["publish"] = {"s3": {"uri": "s3://bucket/a"}}  # adds the last
    objects = [
        item
        for mode in ("attached", "detached")
        for item in render(ROOT / "chart", "demo", {**values, "pipeline": {"mode": mode}})
    ]
    stages = [annotation_of(item, STAGE) for item in stage_jobs(objects)]
    assert [stage for stage in stages if not stage.endswith("-gate")] == list(STAGES[:-1])
    jobs = [item for item in objects if item["kind"] == "Job" and not annotation_of(item, "helm.sh/hook")]
    assert [annotation_of(item, STAGE) for item in jobs] == [STAGES[-1]]
