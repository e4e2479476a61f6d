"""The runner against a fake cluster and a Helm that only notes what it is asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from generator.cluster.fake_api import FakeApi
from generator.cluster.objects import job
from generator.cluster.waiting import PATIENCE, beside, until
from genvalues.cluster.api import Api
from genvalues.cluster.config import ClusterConfig
from genvalues.cluster.runner import run
from genvalues.errors import UserError

CHART = Path("/opt/llama-lora/chart")


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
    fake: FakeApi, api: Api, config: ClusterConfig, inner_values: Path
) -> None:
    helm = Helm(fake)
    assert run(api, config, CHART, inner_values, print, interval=0.02, run_helm=helm) == 0
    assert helm.asked == [
        f"upgrade --install demo-run {CHART} --namespace team-a --values {inner_values} --timeout 720h"
    ]


@pytest.mark.parametrize(
    ("message", "reason", "status"),
    [
        ("Container tokenize for pod team-a/x failed with exit code 2 matching FailJob rule", "PodFailurePolicy", 2),
        ("Container train-gate for pod team-a/x failed with exit code 1 matching FailJob rule", "PodFailurePolicy", 1),
        ("Job has reached the specified backoff limit", "BackoffLimitExceeded", 1),
    ],
)
def test_the_outcome_of_the_failed_stage_is_the_runners_status(
    fake: FakeApi, api: Api, config: ClusterConfig, inner_values: Path, message: str, reason: str, status: int
) -> None:
    said: list[str] = []
    helm = Helm(fake, 1, fails="tokenize", message=message, reason=reason)
    assert run(api, config, CHART, inner_values, said.append, interval=0.02, run_helm=helm) == status
    assert any("demo-run-tokenize failed" in line for line in said)


def test_helm_failing_by_itself_is_worth_another_try_whatever_failed_before(
    fake: FakeApi, api: Api, config: ClusterConfig, inner_values: Path
) -> None:
    fake.add("jobs", job("demo-run-merge", "merge", release="demo-run"))
    fake.set_condition("jobs", "demo-run-merge", "Failed", "of an earlier run")
    assert run(api, config, CHART, inner_values, print, interval=0.02, run_helm=Helm(fake, 1)) == 3


def test_a_restarted_runner_waits_for_the_living_stage_then_clears_the_pending_record(
    fake: FakeApi, api: Api, config: ClusterConfig, inner_values: Path
) -> None:
    fake.add("jobs", job("demo-run-train-gate", "train-gate", release="demo-run"))
    records = ((1, "superseded", "demo-run"), (2, "pending-upgrade", "demo-run"), (1, "pending-install", "x"))
    for version, status, release in records:
        labels = {"owner": "helm", "name": release, "status": status}
        fake.add("secrets", {"metadata": {"name": f"sh.helm.release.v1.{release}.v{version}", "labels": labels}})
    helm = Helm(fake)
    running = beside(run, api, config, CHART, inner_values, print, interval=0.02, run_helm=helm)
    until(lambda: fake.requests.count(("list", "jobs.batch")) > 3)
    assert not helm.asked
    assert len(fake.names("secrets")) == 3
    fake.set_condition("jobs", "demo-run-train-gate", "Complete")
    assert running.result(PATIENCE) == 0
    assert len(helm.asked) == 1
    assert fake.names("secrets") == ["sh.helm.release.v1.demo-run.v1", "sh.helm.release.v1.x.v1"]
    assert fake.names("jobs") == ["demo-run-train-gate"]


def test_values_that_would_install_another_runner_are_refused(
    fake: FakeApi, api: Api, config: ClusterConfig, inner_values: Path
) -> None:
    inner_values.write_text("pipeline: {mode: detached}\n")
    with pytest.raises(UserError, match=r"pipeline\.mode is detached"):
        run(api, config, CHART, inner_values, print, run_helm=Helm(fake))
