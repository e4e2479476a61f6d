"""genvalues install: before Helm (plan, preflight), and while and after it runs (following)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from generator.cluster.fake_api import FakeApi
from generator.cluster.waiting import PATIENCE, beside, until
from generator.ops.release.fake_helm import PYTHON, FakeHelm
from generator.ops.release.run import Outer, Run
from generator.ops.release.test_status import genvalues
from genvalues.common.findings import Finding
from genvalues.common.reports import document_of
from genvalues.ops.preflight import run as preflight

ON_CPU = "name: demo\nmodel: gpt2\ndataset: {source: a/b}\ninstance: cpu\n"
OK = Finding("ok", "claim work", "bound")
BAD = Finding("error", "secret hf-token", "is not there", "kubectl create secret generic hf-token")
AWAY = Finding("not checked", "the Hub", "gave no answer", unanswered=True)


@pytest.fixture(autouse=True)
def world(here: None, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of preflight, which finds no problem."""
    Path("f.yaml").write_text(ON_CPU)
    asked: list[dict[str, Any]] = []

    def run(checked: Any, **options: Any) -> list[Finding]:
        asked.append(options)
        return [OK]

    monkeypatch.setattr(preflight, "run_preflight", run)
    return asked


def install(*arguments: str) -> int:
    return genvalues("install", "f.yaml", "-n", "team-a", *arguments)


def test_an_error_of_preflight_is_shown_with_its_fix_and_helm_is_not_run(
    fake: FakeApi, helm: FakeHelm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(preflight, "run_preflight", lambda checked, **options: [OK, BAD])
    assert install() == 2
    err = capsys.readouterr().err
    assert "secret hf-token: is not there" in err and "fix: kubectl create secret" in err
    assert not helm.asked and not fake.requests


def test_json_is_one_document_with_the_findings_if_preflight_fails(
    fake: FakeApi, helm: FakeHelm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(preflight, "run_preflight", lambda checked, **options: [OK, BAD])
    assert install("--json") == 2
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert document == {"release": "demo", "findings": document_of([OK, BAD]), "exitStatus": 2}
    assert "secret hf-token: is not there" in err


@pytest.mark.parametrize("skip", [[], ["--skip-preflight"]])
def test_a_local_path_is_an_error_with_its_place_before_any_request(
    fake: FakeApi, helm: FakeHelm, world: list[dict[str, Any]], capsys: pytest.CaptureFixture[str], skip: list[str]
) -> None:
    Path("rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n' * 8)
    Path("f.yaml").write_text(ON_CPU.replace("a/b", "rows.jsonl"))
    assert install(*skip) == 2
    *_, line = capsys.readouterr().err.splitlines()
    here = Path("rows.jsonl").resolve()
    assert line.startswith(f"f.yaml:3:11 dataset.source: {here}") and "genvalues local" in line and "s3://" in line
    assert not world and not fake.requests and not helm.calls


def test_preflight_checks_this_release_and_an_unanswered_check_does_not_stop_install(
    fake: FakeApi, helm: FakeHelm, world: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert install("--no-follow", "--release", "other", "--kube-context", "fake") == 0
    assert (world[0]["release"], world[0]["namespace"], world[0]["context"]) == ("other", "team-a", "fake")
    monkeypatch.setattr(preflight, "run_preflight", lambda checked, **options: [AWAY])
    assert install("--no-follow") == 0


def test_skip_preflight_runs_no_check(fake: FakeApi, helm: FakeHelm, world: list[dict[str, Any]]) -> None:
    assert install("--no-follow", "--skip-preflight") == 0
    assert not world and helm.asked


def test_on_trainium_the_plan_is_shown_before_any_request(
    fake: FakeApi, helm: FakeHelm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("f.yaml").write_text(
        "name: demo\nmodel: meta-llama/Llama-3.1-8B\ndataset: {source: a/b}\ninstance: trn1.32xlarge\nimage: i:1\n"
    )
    monkeypatch.setattr(preflight, "run_preflight", lambda checked, **options: [BAD])
    assert install() == 2
    assert capsys.readouterr().err.startswith("plan: 1 x trn1.32xlarge, tensor parallel 8 x 4 copies")


def test_attached_stages_are_reported_while_helm_runs_and_the_outcome_is_the_pipelines(
    fake: FakeApi, helm: FakeHelm, capsys: pytest.CaptureFixture[str]
) -> None:
    (helm.folder / "sleep").touch()
    command = [PYTHON, "-c", code(), "install", "f.yaml", "-n", "team-a", "--skip-preflight", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            until(lambda: helm.asked)
            run = Run(fake, helm)
            run.to_train()
            assert process.stderr
            told = ""
            while "train: running" not in told:
                told += process.stderr.readline()
            fake.set_condition("pytorchjobs", "demo-train-1", "Failed")
            run.end("train-gate", "train failed: w ended with status 2", "last 1 lines of w:", "  no column q", code=2)
            run.ends("failed")
            helm.ends_with(1)
        finally:
            (helm.folder / "sleep").unlink()
        out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2, err
    assert told.count("tokenize: done") == 1
    assert (told + err).splitlines()[-2:] == ["last 1 lines of w:", "  no column q"]
    document = json.loads(out)
    assert (document["outcome"], document["exitStatus"]) == ("failed", 2)


def code() -> str:
    """The command with short intervals and the stand-in for Helm, to run in another process."""
    return (
        f"import sys; sys.executable = {sys.executable!r}\n"
        "from genvalues.ops import install, follow; install.INTERVAL = follow.INTERVAL = 0.05\n"
        "from genvalues.cli import main; main()"
    )


def test_a_helm_failure_without_a_failed_stage_is_status_1(fake: FakeApi, helm: FakeHelm) -> None:
    Run(fake, helm).ends("failed")
    helm.ends_with(1)
    assert install() == 1


def test_an_install_that_helm_refuses_ends_with_helms_own_output(
    fake: FakeApi, helm: FakeHelm, capfd: pytest.CaptureFixture[str]
) -> None:
    helm.ends_with(1)
    assert install() == 1
    assert capfd.readouterr().err.splitlines()[-2:] == ["Error:", "NOTES"], "Helm's own words are the last"


def test_detached_install_follows_after_helm_and_ends_as_the_runner_does(
    fake: FakeApi, helm: FakeHelm, capsys: pytest.CaptureFixture[str]
) -> None:
    outer = Outer(fake, helm)
    inner = outer.inner()
    workers = inner.to_train()

    def the_rest() -> None:
        until(lambda: helm.asked)
        fake.set_condition("pytorchjobs", "demo-run-train-1", "Succeeded")
        for worker in workers:
            inner.end_pod(worker, 0)
        inner.end("train-gate", "train: done")
        inner.through("consolidate", "merge", "evaluate")
        inner.ends("deployed")
        outer.end("runner", "pipeline: done")

    going_on = beside(the_rest)
    assert install("--set", "mode=detached") == 0
    going_on.result(PATIENCE)
    err = capsys.readouterr().err.splitlines()
    assert err[-2].startswith("demo: done, 8 stages run")
    assert err[-1] == "merged model: runs/demo/merged on the volume of claim demo-workspace"


def test_detached_no_follow_ends_with_helm_and_json_has_the_status(
    fake: FakeApi, helm: FakeHelm, capfd: pytest.CaptureFixture[str]
) -> None:
    Outer(fake, helm)
    assert install("--set", "mode=detached", "--no-follow", "--json") == 0
    document = json.loads(capfd.readouterr().out)
    assert (document["release"], document["outcome"], document["exitStatus"]) == ("demo", "running", 0)


def test_ctrl_c_while_following_detached_says_that_the_run_continues_and_how_to_follow_it(
    fake: FakeApi, helm: FakeHelm
) -> None:
    Outer(fake, helm).inner().to_train()
    command = [PYTHON, "-c", code(), "install", "f.yaml", "-n", "team-a", "--skip-preflight", "--set", "mode=detached"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stderr
        told = ""
        while "train: running" not in told:
            told += process.stderr.readline()
        os.kill(process.pid, signal.SIGINT)
        _, rest = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    again = "genvalues status demo --watch --namespace team-a"
    last = rest.splitlines()[-1]
    assert last.startswith("warning: Stopped following. The run continues") and last.endswith(again)
