"""genvalues report: out of a pod that mounts the volume read-only, or from a workspace on this computer."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from generator.cluster.fake_api import FakeApi, now
from generator.ops.release.fake_helm import FakeHelm
from generator.ops.release.run import Outer, Run
from generator.ops.release.test_status import genvalues
from genvalues.common.log_file import lines_of
from genvalues.ops import report

PAGE = b"<!doctype html><title>better</title>" + bytes(range(256)) * 100


@pytest.fixture
def run(fake: FakeApi, helm: FakeHelm) -> Run:
    return Run(fake, helm)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "INTERVAL", 0.01)
    monkeypatch.setattr(report, "WAIT_SECONDS", 1.0)


def pods_say(fake: FakeApi, lines: list[str], code: int = 0) -> list[dict[str, Any]]:
    """Whatever Job is created has a pod at once, which ends with these lines. Returns the Jobs."""
    created: list[dict[str, Any]] = []

    def start(job: dict[str, Any]) -> None:
        created.append(job)
        name = job["metadata"]["name"]
        reference = {"kind": "Job", "name": name, "uid": job["metadata"]["uid"]}
        fake.logs[f"{name}-x1"] = lines
        ended = {"exitCode": code, "reason": "Error" if code else "Completed", "finishedAt": now()}
        status = {"name": "report", "state": {"terminated": ended}, "restartCount": 0}
        meta = {"name": f"{name}-x1", "labels": {"job-name": name}, "ownerReferences": [reference]}
        phase = "Failed" if code else "Succeeded"
        fake.add("pods", {"metadata": meta, "spec": {}, "status": {"phase": phase, "containerStatuses": [status]}})

    fake.after.append(("create", "jobs", start))
    return created


def test_the_report_is_written_and_nothing_is_left_in_the_cluster(
    run: Run, fake: FakeApi, capsys: pytest.CaptureFixture[str]
) -> None:
    run.through("preflight")
    before = fake.names("jobs"), fake.names("pods")
    pods_say(fake, ["a warning", *lines_of(PAGE)])
    assert genvalues("report", "demo", "-o", "page.html") == 0
    assert Path("page.html").read_bytes() == PAGE
    assert capsys.readouterr().out == "page.html\n"
    assert (fake.names("jobs"), fake.names("pods")) == before
    rights = {("create", "jobs.batch"), ("list", "pods"), ("get", "pods/log"), ("delete", "jobs.batch")}
    assert rights <= set(fake.requests) and not [verb for verb, kind in fake.requests if kind == "secrets"]


def test_json_has_the_digest_and_the_default_file_is_report_html(
    run: Run, fake: FakeApi, capsys: pytest.CaptureFixture[str]
) -> None:
    pods_say(fake, list(lines_of(PAGE)))
    assert genvalues("report", "demo", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document == {"file": "report.html", "bytes": len(PAGE), "sha256": hashlib.sha256(PAGE).hexdigest()}


def test_the_job_reads_the_volume_read_only_without_rights_and_ends_by_itself(run: Run, fake: FakeApi) -> None:
    created = pods_say(fake, list(lines_of(PAGE)))
    assert genvalues("report", "demo") == 0
    [job] = created
    spec = job["spec"]["template"]["spec"]
    [container] = spec["containers"]
    [tested] = run.hook("verify", "Pod")["spec"]["containers"]
    assert container["command"][:2] == ["llama-lora", "report"] and container["image"] == tested["image"]
    [mount] = [each for each in container["volumeMounts"] if each["name"] == "workspace"]
    assert mount["readOnly"] is True and spec["automountServiceAccountToken"] is False
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container["securityContext"]["readOnlyRootFilesystem"] and spec["securityContext"]["runAsNonRoot"]
    assert job["spec"]["backoffLimit"] == 0 and spec["restartPolicy"] == "Never"
    assert job["spec"]["activeDeadlineSeconds"] > 0 and job["spec"]["ttlSecondsAfterFinished"] > 0
    assert not any(name.startswith("helm.sh/") for name in job["spec"]["template"]["metadata"]["annotations"])
    assert not [each for each in container["env"] if "valueFrom" in each], "no Secret is needed"
    labels = job["metadata"]["labels"]
    assert labels["app.kubernetes.io/component"] == "report" and labels["app.kubernetes.io/instance"] == "demo"


def test_the_report_of_a_detached_release(fake: FakeApi, helm: FakeHelm) -> None:
    Outer(fake, helm).inner()
    pods_say(fake, list(lines_of(PAGE)))
    assert genvalues("report", "demo") == 0
    assert Path("report.html").read_bytes() == PAGE


def test_what_the_pod_says_is_the_error_where_there_is_no_report(
    run: Run, fake: FakeApi, capsys: pytest.CaptureFixture[str]
) -> None:
    pods_say(fake, ["runs/llama/report.html: the run has no report: evaluate has not ended. Run evaluate", ""], code=2)
    assert genvalues("report", "demo") == 2
    assert "evaluate has not ended" in capsys.readouterr().err
    assert not Path("report.html").exists() and not [name for name in fake.names("jobs") if "report" in name]


def test_a_pod_that_cannot_start_is_explained_after_a_bounded_wait(
    run: Run, fake: FakeApi, capsys: pytest.CaptureFixture[str]
) -> None:
    def pending(job: dict[str, Any]) -> None:
        name = job["metadata"]["name"]
        lack = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes available"}
        meta = {
            "name": f"{name}-x1",
            "labels": {"job-name": name},
            "ownerReferences": [{"uid": job["metadata"]["uid"]}],
        }
        fake.add("pods", {"metadata": meta, "spec": {}, "status": {"phase": "Pending", "conditions": [lack]}})

    fake.after.append(("create", "jobs", pending))
    assert genvalues("report", "demo") == 1
    said = capsys.readouterr().err
    assert "has not ended within 1 s" in said and "0/3 nodes available" in said
    assert not [name for name in fake.names("jobs") if "report" in name]


def test_a_quota_that_forbids_the_pod_is_told(run: Run, fake: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    def forbidden(job: dict[str, Any]) -> None:
        about = {"name": job["metadata"]["name"]}
        event = {"type": "Warning", "reason": "FailedCreate", "message": "exceeded quota", "involvedObject": about}
        fake.add("events", {"metadata": {"name": "e"}, **event})

    fake.after.append(("create", "jobs", forbidden))
    assert genvalues("report", "demo") == 1
    assert "FailedCreate: exceeded quota" in capsys.readouterr().err


def test_a_log_that_is_cut_writes_nothing(run: Run, fake: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    pods_say(fake, list(lines_of(PAGE))[:-3])
    assert genvalues("report", "demo") == 1
    assert "ends before the file does" in capsys.readouterr().err and not Path("report.html").exists()


def test_a_user_without_the_right_is_told(run: Run, fake: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    fake.forbidden.add(("create", "jobs.batch"))
    assert genvalues("report", "demo") == 2
    assert "cannot create" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_starts_no_pod(run: Run, fake: FakeApi) -> None:
    assert genvalues("report", "demo", "-o", "no/such/page.html") == 2
    assert ("create", "jobs.batch") not in fake.requests


# --- a workspace on this computer


def workspace(folder: Path, content: bytes = PAGE) -> Path:
    place = folder / "runs/demo"
    (place / "stages").mkdir(parents=True)
    (place / "report.html").write_bytes(content)
    record = {"bytes": len(PAGE), "sha256": hashlib.sha256(PAGE).hexdigest()}
    (place / "stages/evaluate.json").write_text(json.dumps({"outputs": {"runs/demo/report.html": record}}))
    return folder


def test_the_report_of_a_local_run_is_found_or_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = workspace(tmp_path / "workspace")
    assert genvalues("report", "demo", "--workspace", str(folder)) == 0
    assert capsys.readouterr().out == f"{folder}/runs/demo/report.html\n" and not Path("report.html").exists()
    assert genvalues("report", "demo", "--workspace", str(folder), "-o", "page.html") == 0
    assert Path("page.html").read_bytes() == PAGE


@pytest.mark.parametrize("name", ["../demo", "..", "demo/", "/etc", "", "a\n", "x" * 64])
def test_the_name_of_a_local_run_is_the_name_of_a_folder(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = workspace(tmp_path / "workspace")
    assert genvalues("report", name, "--workspace", str(folder / "runs")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "is not a valid run name. Name a folder in " in line


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda run: (run / "report.html").write_bytes(b"other"), "another SHA-256"),
        (lambda run: (run / "report.html").unlink(), "not found"),
        (lambda run: (run / "stages/evaluate.json").unlink(), "not found"),
        (lambda run: (run / "stages/evaluate.json").write_text("[]"), "expected an object"),
        (lambda run: (run / "stages/evaluate.json").write_text('{"outputs": 7}'), "another SHA-256"),
    ],
)
def test_a_local_report_that_is_missing_or_changed_is_refused(
    damage: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = workspace(tmp_path / "workspace")
    damage(folder / "runs/demo")
    assert genvalues("report", "demo", "--workspace", str(folder), "-o", "page.html") == 2
    assert said in capsys.readouterr().err and not Path("page.html").exists()
