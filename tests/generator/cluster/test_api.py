"""The edge: what it does when the API server is away, slow to know our rights, or not there at all."""

from __future__ import annotations

import pytest

from generator.cluster.fake_api import NAMESPACE, FakeApi
from generator.cluster.objects import pytorch_job
from generator.cluster.waiting import PATIENCE, beside, until
from genvalues.cluster.api import PODS, PYTORCH_JOBS, Api, NotAllowed, ServerAway, connect
from genvalues.common.errors import UserError


def test_a_request_waits_for_a_server_that_is_away_and_says_so_once(fake: FakeApi) -> None:
    said: list[str] = []
    api = connect(NAMESPACE, patience=5.0, interval=0.02, say=said.append)
    fake.away = True
    answer = beside(api.list, PODS)
    until(lambda: said)
    with pytest.raises(TimeoutError):
        answer.result(0.2)
    fake.away = False
    assert answer.result(PATIENCE) == []
    assert len(said) == 1


def test_patience_ends(fake: FakeApi) -> None:
    fake.away = True
    with pytest.raises(ServerAway):
        connect(NAMESPACE, patience=0.1, interval=0.02).list(PODS)


def test_what_is_not_allowed_is_said_at_once_with_the_servers_words(fake: FakeApi, api: Api) -> None:
    fake.forbidden.add(("list", "pods"))
    with pytest.raises(NotAllowed, match='cannot list resource "pods"'):
        api.list(PODS)
    assert len(fake.requests) == 1


def test_a_server_that_has_just_restarted_and_refuses_what_it_allowed_is_waited_for(fake: FakeApi, api: Api) -> None:
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


def test_deleting_or_patching_what_is_gone_is_fine(fake: FakeApi, api: Api) -> None:
    api.delete(PYTORCH_JOBS, "gone")
    assert api.patch(PYTORCH_JOBS, "gone", {}) is None


def test_a_watch_gives_what_is_there_and_then_each_change(fake: FakeApi, api: Api) -> None:
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


def test_no_cluster_is_the_users_to_change(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", f"{tmp_path}/none")
    with pytest.raises(UserError, match="kubectl config current-context"):
        connect(NAMESPACE)
