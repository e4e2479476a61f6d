"""The commands as the chart's pods run them: arguments, output, exit status and RBAC."""

from __future__ import annotations

import json
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import genvalues.cluster
from generator.cluster.conftest import Trainer
from generator.cluster.fake_api import NAMESPACE, FakeApi
from generator.cluster.objects import Operator, helm_record, job, pytorch_job
from generator.cluster.waiting import PATIENCE, beside, until
from genvalues.cluster import cleanup, gate, recovery, runner
from genvalues.cluster.api import connect
from genvalues.commands.cluster import cluster

PYTHON = sys.executable  # the fixture trainer changes sys.executable
OWN = "demo-llama-lora-train-3"


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cluster, list(arguments))


@pytest.fixture(autouse=True)
def no_signal_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the handlers of the test process, which runs commands in threads."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)


@pytest.fixture
def quick_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate.gate, "__defaults__", (gate.GateTimings(interval=0.02, last_words=0.2), time.time))


def gate_arguments(config_file: Path) -> list[str]:
    return ["gate", "--config", str(config_file), "--run-config", "/run.yaml", "--stage", "train", "--job", OWN]


def test_preflight_prints_every_finding_and_ends_with_status_2_on_an_error(fake: FakeApi, config_file: Path) -> None:
    fake.crds = set()
    result = invoke("preflight", "--config", str(config_file))
    assert result.exit_code == 2
    assert re.search(r"^error +training operator: .*\n +fix: kubectl apply", result.output, re.M)
    assert re.search(r"^error +claim demo-workspace: ", result.output, re.M)
    assert re.search(r"^error +secret hf-token: ", result.output, re.M)
    assert result.output.endswith("3 of 5 findings stop this release; the fixes are above\n")


def test_the_gate_runs_the_trainer_with_the_run_config_and_ends_with_its_outcome(
    fake: FakeApi, config_file: Path, trainer: Trainer, quick_gate: None
) -> None:
    trainer.says("f1", up_to_date=True)
    assert invoke(*gate_arguments(config_file)).exit_code == 0
    asked = trainer.answer.with_name("asked").read_text()
    assert asked == "fingerprint train --config /run.yaml\n"


def test_the_gates_log_ends_with_stage_reason_and_tail(
    fake: FakeApi, config_file: Path, trainer: Trainer, quick_gate: None
) -> None:
    fake.add("pytorchjobs", pytorch_job(OWN, fingerprint="f1"))
    operator = Operator(fake, OWN)
    operator.start()
    operator.write(1, "CUDA is not here")
    running = beside(invoke, *gate_arguments(config_file))
    until(lambda: sum(path.endswith("/log") for path in fake.paths) >= 2)
    operator.end_worker(1, 1)
    operator.fail("no retries left")
    result = running.result(PATIENCE)
    assert result.exit_code == 1
    assert result.output.splitlines()[-3:] == [
        f"train failed: {operator.worker(1)} ended with status 1; PyTorchJob {OWN}: no retries left",
        f"last 1 lines of {operator.worker(1)}:",
        "  CUDA is not here",
    ]


def test_an_internal_error_is_not_reported_as_a_failed_stage(
    fake: FakeApi, config_file: Path, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "decide", lambda *_: 1 / 0)
    assert invoke(*gate_arguments(config_file)).exit_code == 3


def test_a_missing_permission_is_named_and_ends_with_status_2(
    fake: FakeApi, config_file: Path, trainer: Trainer
) -> None:
    fake.forbidden.add(("list", "pytorchjobs.kubeflow.org"))
    result = invoke(*gate_arguments(config_file))
    assert result.exit_code == 2
    assert 'cannot list resource "pytorchjobs.kubeflow.org"' in result.stderr


def status_at_once(process: subprocess.Popen[bytes]) -> int:
    """The exit status within 3 seconds. A process that goes on is killed: its own limits are up to half an hour."""
    try:
        return process.wait(3)
    finally:
        process.kill()


def test_sigterm_ends_the_gate_at_once_and_leaves_the_job_running(
    fake: FakeApi, config_file: Path, trainer: Trainer
) -> None:
    fake.add("pytorchjobs", pytorch_job(OWN))
    stand_in = f"import sys; sys.executable = {sys.executable!r}"
    code = f"{stand_in}; from genvalues.commands.cluster import cluster; cluster()"
    with subprocess.Popen([PYTHON, "-c", code, *gate_arguments(config_file)]) as process:
        until(lambda: not (fake.get("pytorchjobs", OWN) or {})["spec"]["runPolicy"]["suspend"])
        process.send_signal(signal.SIGTERM)
        assert status_at_once(process) == 143
    assert (fake.get("pytorchjobs", OWN) or {})["spec"]["runPolicy"]["suspend"] is False


def test_cleanup_ends_with_status_1_when_something_still_runs(fake: FakeApi) -> None:
    fake.add("jobs", job("demo-tokenize", "tokenize"))
    result = invoke("cleanup", "--release", "demo", "--namespace", NAMESPACE, "--timeout-seconds", "1")
    assert result.exit_code == 1
    assert "job/demo-tokenize" in result.stderr


def test_cleanup_extends_the_deadline_of_its_own_job(fake: FakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cleanup.cleanup.__kwdefaults__, "interval", 0.02)
    fake.add("jobs", job("demo-cleanup", "cleanup"))
    arguments = ["cleanup", "--release", "demo", "--namespace", NAMESPACE, "--timeout-seconds", "5"]
    assert invoke(*arguments, "--own-job", "demo-cleanup", "330").exit_code == 0
    assert fake.objects["jobs", "demo-cleanup"]["spec"]["activeDeadlineSeconds"] == 330


@pytest.fixture
def helm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A script that records its arguments, and runs as long as a file ``sleep`` exists next to it."""
    folder = tmp_path / "helm-bin"
    folder.mkdir()
    command = folder / "helm"
    trap = f"trap 'echo stopped > {folder}/stopped; exit 1' TERM"
    sleep = f"while [ -e {folder}/sleep ]; do sleep 0.05; done"
    command.write_text(f'#!/bin/sh\n{trap}\necho "$@" > {folder}/asked\necho $HELM_DRIVER > {folder}/driver\n{sleep}\n')
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr("sys.executable", str(folder / "python"))  # the helm next to it takes precedence
    return folder


@pytest.fixture
def runner_arguments(config_file: Path, chart: Path, tmp_path: Path) -> list[str]:
    values = tmp_path / "values.yaml"
    values.write_text("pipeline: {mode: attached}\n")
    places = ["--config", str(config_file), "--chart", str(chart), "--values", str(values)]
    return ["runner", *places, "--own-job", "demo-runner-3"]


def test_the_runner_runs_helm_and_ends_with_its_outcome(
    fake: FakeApi, runner_arguments: list[str], chart: Path, helm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(runner.run.__kwdefaults__, "interval", 0.02)
    gate_job = job("demo-run-train-gate", "train-gate", release="demo-run")
    fake.add("jobs", gate_job)
    fake.after.append(("patch", "jobs", lambda item: fake.set_condition("jobs", item["metadata"]["name"], "Failed")))
    fake.add("secrets", helm_record("pending-install", release="demo-run"))
    assert invoke(*runner_arguments).exit_code == 0
    assert (helm / "driver").read_text() == "configmap\n"
    assert (helm / "asked").read_text().startswith(f"upgrade --install demo-run {chart} --namespace team-a")
    without_stages = documented_permissions("runner") - {("create", "events")}
    assert set(fake.requests) == without_stages


def test_sigterm_stops_helm_with_the_runner(fake: FakeApi, runner_arguments: list[str], helm: Path) -> None:
    (helm / "sleep").touch()
    stand_in = f"import sys; sys.executable = {sys.executable!r}"
    code = f"{stand_in}; from genvalues.commands.cluster import cluster; cluster()"
    with subprocess.Popen([PYTHON, "-c", code, *runner_arguments]) as process:
        until((helm / "asked").exists)
        time.sleep(0.5)  # helm may run before Popen returns in the busy runner
        process.send_signal(signal.SIGTERM)
        assert status_at_once(process) == 143
    assert (helm / "stopped").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read: No such file or directory"),
        ("release: [", "invalid YAML"),
        ("", "must be a mapping"),
        ("- release", "must be a mapping"),
        ("\x00", "invalid YAML"),
    ],
)
def test_an_unreadable_cluster_config_is_one_message_and_status_2(
    tmp_path: Path, text: str | None, message: str
) -> None:
    path = tmp_path / "bad.yaml"
    if text is not None:
        path.write_text(text)
    for command in (["preflight", "--config", str(path)], gate_arguments(path)):
        result = invoke(*command)
        assert result.exit_code == 2
        assert result.stderr.count("\n") == 1
        assert result.stderr.startswith(f"{path}: ") and message in result.stderr


def test_every_problem_in_the_cluster_config_is_named_with_its_key(config_file: Path, values: dict[str, Any]) -> None:
    del values["release"]
    values["job"]["nodes"] = 0
    values["claim"]["size"] = "1Gi"
    config_file.write_text(json.dumps(values))
    result = invoke("preflight", "--config", str(config_file))
    assert result.exit_code == 2
    for key in ("release", "job.nodes", "claim.size"):
        assert f"{config_file}: {key}: " in result.stderr


def documented_permissions(command: str) -> set[tuple[str, str]]:
    """The RBAC table in genvalues.cluster's docstring."""
    rows = re.findall(rf"^    {command} +(\S+) +([a-z ]+?) *(?:#.*)?$", genvalues.cluster.__doc__ or "", re.M)
    return {(verb, resource) for resource, verbs in rows for verb in verbs.split()}


def test_the_rbac_table_names_each_command() -> None:
    assert all(documented_permissions(command) for command in ("preflight", "gate", "cleanup", "runner", "install"))


def test_preflight_needs_exactly_its_documented_permissions(fake: FakeApi, config_file: Path) -> None:
    fake.after.append(
        ("create", "pytorchjobs", lambda item: fake.set_condition("pytorchjobs", item["metadata"]["name"], "Suspended"))
    )
    claim = {
        "metadata": {"name": "demo-workspace"},
        "spec": {"accessModes": ["ReadWriteMany"], "storageClassName": "x"},
    }
    claim = fake.add("persistentvolumeclaims", claim)
    about = {"uid": claim["metadata"]["uid"], "name": "demo-workspace"}
    waits = {"reason": "WaitForFirstConsumer", "message": "", "involvedObject": about}
    fake.add("events", {"metadata": {"name": "e"}, **waits})
    invoke("preflight", "--config", str(config_file))
    documented = documented_permissions("preflight")
    optional = {("list", "persistentvolumeclaims"), *(one for one in documented if "kueue" in one[1])}
    assert set(fake.requests) == documented - optional


def test_the_gate_needs_exactly_its_documented_permissions(
    fake: FakeApi, config_file: Path, values: dict[str, Any], trainer: Trainer, quick_gate: None
) -> None:
    fake.add("pytorchjobs", pytorch_job("demo-llama-lora-train-1", fingerprint="f0"))
    Operator(fake, "demo-llama-lora-train-1").fail()
    fake.add("pytorchjobs", pytorch_job(OWN))
    config_file.write_text(json.dumps(values | {"train": {"unschedulableTimeoutSeconds": 0.3}}))
    running = beside(invoke, *gate_arguments(config_file))
    until(lambda: ("patch", "pytorchjobs.kubeflow.org") in fake.requests)
    Operator(fake, OWN).start(workers=1)
    assert running.result(PATIENCE).exit_code == 2
    when_it_is_stopped, in_a_queue = ("get", "jobs.batch"), ("list", "workloads.kueue.x-k8s.io")
    assert set(fake.requests) == documented_permissions("gate") - {when_it_is_stopped, in_a_queue}


def test_cleanup_needs_exactly_its_documented_permissions(fake: FakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cleanup.cleanup.__kwdefaults__, "interval", 0.02)
    fake.add("jobs", job("demo-tokenize", "tokenize"))
    fake.add("pytorchjobs", pytorch_job(OWN))
    fake.add("pods", {"metadata": job("demo-verify", "verify")["metadata"]})
    fake.after.append(("patch", "jobs", lambda item: fake.set_condition("jobs", item["metadata"]["name"], "Failed")))
    assert invoke("cleanup", "--release", "demo", "--namespace", NAMESPACE, "--timeout-seconds", "5").exit_code == 0
    assert set(fake.requests) == documented_permissions("cleanup")


def test_taking_over_a_release_needs_exactly_its_documented_permissions(fake: FakeApi) -> None:
    fake.add("jobs", job("demo-train-gate", "train-gate"))
    fake.after.append(("patch", "jobs", lambda item: fake.set_condition("jobs", item["metadata"]["name"], "Failed")))
    fake.add("secrets", helm_record("pending-install"))
    recovery.take_over(connect(NAMESPACE), "demo", interval=0.02)
    assert set(fake.requests) == documented_permissions("install")
