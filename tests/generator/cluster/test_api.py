"""The Kubernetes client when the API server is unavailable, has not loaded its RBAC rules, or is not configured."""

from __future__ import annotations

import pytest

from generator.cluster.fake_api import NAMESPACE, FakeApi
from generator.cluster.objects import pytorch_job
from generator.cluster.waiting import PATIENCE, beside, log_lines, until
from genvalues.cluster.api import Api, connect
from genvalues.cluster.kinds import PODS, PYTORCH_JOBS, NotAllowed, ServerAway
from genvalues.common.errors import UserError


def test_a_request_is_retried_while_the_server_is_unavailable_and_that_is_logged_once(fake: FakeApi) -> None:
    lines = log_lines()
    api = connect(NAMESPACE, patience=5.0, interval=0.02)
    fake.away = True
    answer = beside(api.list, PODS)
    until(lambda: lines)
    with pytest.raises(TimeoutError):
        answer.result(0.2)
    fake.away = False
    assert answer.result(PATIENCE) == []
    assert len(lines) == 1


def test_retries_end_after_the_patience(fake: FakeApi) -> None:
    fake.away = True
    with pytest.raises(ServerAway):
        connect(NAMESPACE, patience=0.1, interval=0.02).list(PODS)


def test_a_forbidden_request_fails_at_once_with_the_servers_message(fake: FakeApi, api: Api) -> None:
    fake.forbidden.add(("list", "pods"))
    with pytest.raises(NotAllowed, match='cannot list resource "pods"'):
        api.list(PODS)
    assert len(fake.requests) == 1


def test_a_restarted_server_that_rejects_an_allowed_request_is_retried(fake: FakeApi, api: Api) -> None:
    api.list(PODS)
    fake.forbidden.add(("list", "pods"))
    answer = beside(api.list, PODS)
    with pytest.raises(TimeoutError):
        answer.result(0.2)
    fake.forbidden.clear()
    assert answer.result(PATIENCE) == []


def test_a_kind_that_is_not_installed_has_no_objects(fake: FakeApi, api: Api) -> None:
    fake.crds = set()
    assert api.list(PYTORCH_JOBS) == []
    assert api.get(PYTORCH_JOBS, "x") is None


def test_deleting_or_patching_a_missing_object_is_no_error(fake: FakeApi, api: Api) -> None:
    api.delete(PYTORCH_JOBS, "gone")
    assert api.patch(PYTORCH_JOBS, "gone", {}) is None


def test_a_watch_yields_the_existing_objects_and_then_each_change(fake: FakeApi, api: Api) -> None:
    fake.add("pytorchjobs", pytorch_job("train-1"))
    seen: list[str] = []

    def follow() -> None:
        for item in api.watch(PYTORCH_JOBS, labels="app.kubernetes.io/instance=demo"):
            seen.append(item["metadata"]["name"])

    watching = beside(follow)
    until(lambda: seen == ["train-1"])
    fake.add("pytorchjobs", pytorch_job("train-9", release="other"))
    fake.add("pytorchjobs", pytorch_job("train-2"))
    fake.remove("pytorchjobs", "train-2")
    until(lambda: seen == ["train-1", "train-2", "train-2"])
    fake.away = True  # the watch ends without an error
    watching.result(PATIENCE)


def test_a_missing_kubeconfig_is_a_user_error(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", f"{tmp_path}/none")
    with pytest.raises(UserError, match="kubectl config current-context"):
        connect(NAMESPACE)
