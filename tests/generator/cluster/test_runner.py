"""The runner with a fake API server and a Helm that records its arguments."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from generator.cluster.fake_api import FakeApi
from generator.cluster.objects import content_of, helm_record, in_config_map, job, pod, pytorch_job
from generator.cluster.waiting import PATIENCE, beside, log_lines, until
from genvalues.cluster.api import Api
from genvalues.cluster.config import ClusterConfig
from genvalues.cluster.helm_records import MOVABLE
from genvalues.cluster.runner import run
from genvalues.common.errors import UserError

OWN = "demo-runner-2"


@pytest.fixture
def inner_values(tmp_path: Path) -> Path:
    path = tmp_path / "values.yaml"
    path.write_text("pipeline: {mode: attached}\n")
    return path


class Helm:
    def __init__(self, fake: FakeApi, status: int = 0, *, fails: str = "", message: str = "", reason: str = "") -> None:
        self.asked: list[str] = []
        self.fake = fake
        self.status = status
        self.fails, self.message, self.reason = fails, message, reason

    def __call__(self, arguments: list[str]) -> int:
        self.asked.append(" ".join(arguments))
        if self.fails:
            self.fake.add("jobs", job(f"demo-run-{self.fails}", self.fails, release="demo-run"))
            self.fake.set_condition("jobs", f"demo-run-{self.fails}", "Failed", self.message, self.reason)
        return self.status


def test_installs_the_inner_release_attached(
    fake: FakeApi, api: Api, config: ClusterConfig, chart: Path, inner_values: Path
) -> None:
    helm = Helm(fake)
    assert run(api, config, chart, inner_values, OWN, interval=0.02, run_helm=helm) == 0
    where = f"--namespace team-a --values {inner_values} --timeout 720h"
    assert helm.asked == [f"upgrade --install demo-run {chart} {where} --hide-notes"]


@pytest.mark.parametrize(
    ("message", "reason", "status"),
    [
        ("Container tokenize for pod team-a/x failed with exit code 2 matching FailJob rule", "PodFailurePolicy", 2),
        ("Container train-gate for pod team-a/x failed with exit code 1 matching FailJob rule", "PodFailurePolicy", 1),
        ("Job has reached the specified backoff limit", "BackoffLimitExceeded", 1),
    ],
)
def test_the_runner_ends_with_the_status_of_the_failed_stage(
    fake: FakeApi,
    api: Api,
    config: ClusterConfig,
    chart: Path,
    inner_values: Path,
    message: str,
    reason: str,
    status: int,
) -> None:
    lines = log_lines()
    helm = Helm(fake, 1, fails="tokenize", message=message, reason=reason)
    assert run(api, config, chart, inner_values, OWN, interval=0.02, run_helm=helm) == status
    assert any("demo-run-tokenize failed" in line for line in lines)


def test_a_failure_of_helm_without_a_failed_stage_is_retried(
    fake: FakeApi, api: Api, config: ClusterConfig, chart: Path, inner_values: Path
) -> None:
    fake.add("jobs", job("demo-run-merge", "merge", release="demo-run"))
    fake.set_condition("jobs", "demo-run-merge", "Failed", "of an earlier run")
    assert run(api, config, chart, inner_values, OWN, interval=0.02, run_helm=Helm(fake, 1)) == 3


def test_a_restarted_runner_waits_for_the_running_stage_then_takes_over_the_pending_release(
    fake: FakeApi, api: Api, config: ClusterConfig, chart: Path, inner_values: Path
) -> None:
    fake.add("jobs", job("demo-run-tokenize", "tokenize", release="demo-run"))
    records = ((1, "superseded", "demo-run"), (2, "pending-upgrade", "demo-run"), (1, "pending-install", "x"))
    for revision, status, release in records:
        fake.add("configmaps", in_config_map(helm_record(status, revision=revision, release=release)))

    def statuses() -> list[str]:
        return [fake.objects["configmaps", name]["metadata"]["labels"]["status"] for name in fake.names("configmaps")]

    helm = Helm(fake)
    running = beside(run, api, config, chart, inner_values, OWN, interval=0.02, run_helm=helm)
    until(lambda: fake.requests.count(("list", "jobs.batch")) > 3)
    assert not helm.asked
    assert statuses() == ["superseded", "pending-upgrade", "pending-install"]
    fake.set_condition("jobs", "demo-run-tokenize", "Complete")
    assert running.result(PATIENCE) == 0
    assert len(helm.asked) == 1
    assert statuses() == ["superseded", "failed", "pending-install"]
    assert fake.names("jobs") == ["demo-run-tokenize"]


CONFIG = job("demo-run-config", "config", release="demo-run")["metadata"]


def test_a_release_whose_inner_records_are_secrets_is_taken_over_with_its_revisions(
    fake: FakeApi, api: Api, config: ClusterConfig, chart: Path, inner_values: Path
) -> None:
    """Of an earlier version of the chart. Helm would otherwise install revision 1, whose PyTorchJobs exist."""
    fake.add("configmaps", {"metadata": CONFIG})
    before = [fake.add("secrets", helm_record("superseded", revision=11, release="demo-run"))]
    before.append(fake.add("secrets", helm_record("pending-upgrade", revision=12, release="demo-run")))
    others = [fake.add("secrets", helm_record("deployed", release=release)) for release in ("demo", "x")]
    fake.add("configmaps", in_config_map(before[0]))  # a move that was interrupted
    seen: list[list[str]] = []

    def helm(arguments: list[str]) -> int:
        seen.append(fake.names("secrets"))
        return 0

    assert run(api, config, chart, inner_values, OWN, interval=0.02, run_helm=helm) == 0
    assert seen == [sorted(each["metadata"]["name"] for each in others)], "before Helm runs"
    for record, status in zip(before, ("superseded", "failed"), strict=True):
        moved = fake.objects["configmaps", record["metadata"]["name"]]
        assert moved["metadata"]["labels"] == {**record["metadata"]["labels"], "status": status}
        content = content_of(record)
        failed = {"status": "failed", "description": "the Helm client was killed"} if status == "failed" else {}
        assert content_of(moved) == {**content, "info": {**content["info"], **failed}}
    assert ("list", "secrets") not in fake.requests


def test_an_inner_release_without_records_is_not_installed_anew(
    fake: FakeApi, api: Api, config: ClusterConfig, chart: Path, inner_values: Path
) -> None:
    fake.add("configmaps", {"metadata": CONFIG})
    fake.add("secrets", helm_record("deployed", revision=MOVABLE + 1, release="demo-run"))
    helm = Helm(fake)
    with pytest.raises(
        UserError, match=r"demo-run not found.*uninstall demo-run --no-hooks.*configmap demo-run-config"
    ):
        run(api, config, chart, inner_values, OWN, interval=0.02, run_helm=helm)
    assert not helm.asked


@pytest.mark.parametrize("content", ["", "!", "gA=="])
def test_a_secret_that_is_no_record_is_named(
    fake: FakeApi, api: Api, config: ClusterConfig, chart: Path, inner_values: Path, content: str
) -> None:
    record = helm_record("pending-install", release="demo-run")
    fake.add("secrets", {**record, "data": {"release": content}})
    name = record["metadata"]["name"]
    with pytest.raises(UserError, match=f"{name}: .*kubectl -n team-a delete (secret|configmap) {name}"):
        run(api, config, chart, inner_values, OWN, interval=0.02, run_helm=Helm(fake))


def test_a_runner_beside_a_live_helm_client_is_retried(
    fake: FakeApi, api: Api, config: ClusterConfig, chart: Path, inner_values: Path
) -> None:
    """E.g. a runner on a lost node that is still running. Retried, because status 2 would be final."""
    fake.add("jobs", job("demo-run-tokenize", "tokenize", release="demo-run"))
    fake.add("configmaps", in_config_map(helm_record("pending-install", release="demo-run")))
    helm = Helm(fake)
    running = beside(run, api, config, chart, inner_values, OWN, interval=0.02, run_helm=helm)
    until(lambda: fake.requests.count(("list", "jobs.batch")) > 3)
    fake.add("jobs", job("demo-run-rehearse", "rehearse", release="demo-run"))
    assert running.result(PATIENCE) == 3
    assert not helm.asked


def test_values_that_would_install_another_runner_are_rejected(
    fake: FakeApi, api: Api, config: ClusterConfig, chart: Path, inner_values: Path
) -> None:
    inner_values.write_text("pipeline: {mode: detached}\n")
    with pytest.raises(UserError, match=r"pipeline\.mode is detached"):
        run(api, config, chart, inner_values, OWN, run_helm=Helm(fake))


def test_a_running_gate_enforces_the_limits_until_the_new_one_takes_its_place(
    fake: FakeApi, api: Api, config: ClusterConfig, chart: Path, inner_values: Path
) -> None:
    """If Helm fails at an earlier stage, nothing else would. Helm deletes the gate when it creates the new one."""
    fake.add("jobs", job("demo-run-train-gate", "train-gate", release="demo-run"))
    fake.add("pytorchjobs", pytorch_job("demo-run-train-1", release="demo-run", fingerprint="f0"))
    before = dict(fake.objects)
    helm = Helm(fake, 1, fails="tokenize")
    assert run(api, config, chart, inner_values, OWN, interval=0.02, run_helm=helm) == 1
    assert helm.asked
    assert {key: fake.objects[key] for key in before} == before


def test_a_gate_of_an_earlier_client_that_fails_meanwhile_is_not_the_outcome(
    fake: FakeApi, api: Api, config: ClusterConfig, chart: Path, inner_values: Path
) -> None:
    fake.add("jobs", job("demo-run-train-gate", "train-gate", release="demo-run"))

    def helm(arguments: list[str]) -> int:
        fake.set_condition("jobs", "demo-run-train-gate", "Failed", "exit code 2 ", "PodFailurePolicy")
        return 1

    assert run(api, config, chart, inner_values, OWN, interval=0.02, run_helm=helm) == 3


def test_older_runners_have_ended_before_helm_runs(
    fake: FakeApi, api: Api, config: ClusterConfig, chart: Path, inner_values: Path
) -> None:
    for number, name in enumerate(["demo-runner-1", OWN, "demo-runner-3"]):
        runner = job(name, "runner")
        runner["metadata"]["creationTimestamp"] = f"2025-01-01T00:00:0{number}Z"
        fake.add("pods", pod(f"{name}-x1", fake.add("jobs", runner), "Job", container="runner"))
    fake.remove("pods", "demo-runner-3-x1")
    helm = Helm(fake)
    running = beside(run, api, config, chart, inner_values, OWN, interval=0.02, run_helm=helm)
    until(lambda: fake.objects["jobs", "demo-runner-1"]["spec"].get("suspend"))
    seen = len(fake.requests)
    until(lambda: len(fake.requests) > seen + 4)
    assert not helm.asked
    fake.remove("pods", "demo-runner-1-x1")
    assert running.result(PATIENCE) == 0
    assert [fake.objects["jobs", name]["spec"].get("suspend", False) for name in fake.names("jobs")] == [
        True,
        False,
        False,  # the newer one stops this one, not the reverse
    ]


@pytest.mark.parametrize("key", ["version", "appVersion"])
def test_a_chart_in_the_image_that_differs_from_the_installed_one_is_rejected(
    fake: FakeApi, api: Api, config: ClusterConfig, chart: Path, inner_values: Path, key: str
) -> None:
    versions = {"version": "0.1.0", "appVersion": "0.1.0", key: "0.2.0"}
    (chart / "Chart.yaml").write_text(json.dumps(versions))
    helm = Helm(fake)
    with pytest.raises(UserError, match=r"Chart\.yaml: .*image is .*0\.2\.0.* installed .* image\.tag"):
        run(api, config, chart, inner_values, OWN, run_helm=helm)
    assert not helm.asked


def test_an_image_without_the_chart_is_an_error_that_names_the_image_to_use(
    fake: FakeApi, api: Api, config: ClusterConfig, chart: Path, inner_values: Path
) -> None:
    with pytest.raises(UserError, match=r"cannot be read.*trainer/Dockerfile"):
        run(api, config, chart / "elsewhere", inner_values, OWN, run_helm=Helm(fake))
