"""The Kubernetes client when the API server is unavailable, has not loaded its RBAC rules, or is not configured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from generator.cluster.fake_api import NAMESPACE, FakeApi, write_kubeconfig
from generator.cluster.objects import pytorch_job
from generator.cluster.waiting import PATIENCE, beside, log_lines, until
from genvalues.cluster.api import Api, connect
from genvalues.cluster.kinds import PODS, PYTORCH_JOBS, ApiError, NotAllowed, ServerAway
from genvalues.cluster.queueing import kueue_api
from genvalues.cluster.workloads.probe import PROBES
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


NONSENSE = [
    {"kind": "List", "apiVersion": "v1", "items": None, "metadata": []},
    {"kind": "SecretList", "apiVersion": "v1", "items": [None, 1, {"metadata": None}]},
    {"items": {}},
    {"kind": "Status", "metadata": {}},
    None,
    "[" * 200_000,
    "<html>Log in</html>",
]


@pytest.mark.parametrize("answer", NONSENSE, ids=lambda answer: str(answer)[:40])
def test_an_answer_of_something_else_than_an_api_server_is_an_outage_with_a_fix(fake: FakeApi, answer: Any) -> None:
    fake.nonsense = (200, answer if isinstance(answer, str) else json.dumps(answer))
    api = connect(NAMESPACE, patience=0.05, interval=0.05)
    for request in (lambda: api.list(PODS), lambda: api.get(PODS, "x"), lambda: list(api.watch(PODS, labels=""))):
        with pytest.raises(ServerAway, match=r"the response is .* Check the server's address in the kubeconfig"):
            request()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"clusters": [{"name": "lab", "cluster": {}}]},
            "cluster lab of the kubeconfig has no valid server. Write its",
        ),
        (
            {"clusters": [{"name": "lab", "cluster": {"server": "ftp://x y"}}]},
            "cluster lab of the kubeconfig has no valid",
        ),
        ({"clusters": 5}, "no usable kubeconfig: {file} does not have the form of one. Set KUBECONFIG"),
        ([], "no usable kubeconfig: {file} does not have the form of one. Set KUBECONFIG"),
    ],
)
def test_a_kubeconfig_that_names_no_server_is_a_mistake_with_its_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, told: str
) -> None:
    file = tmp_path / "kubeconfig"
    monkeypatch.setenv("KUBECONFIG", str(file))
    write_kubeconfig(file, "https://lab:6443")
    content = json.loads(file.read_text()) | {
        "contexts": [{"name": "fake", "context": {"cluster": "lab", "user": "fake"}}]
    }
    file.write_text(json.dumps(content | change if change else [content]))
    with pytest.raises(UserError) as refused:
        connect(None)
    assert str(refused.value).startswith(told.format(file=file))


def test_a_list_without_items_is_empty(fake: FakeApi, api: Api) -> None:
    fake.nonsense = (200, '{"kind": "PodList", "items": null, "metadata": {}}')
    assert api.list(PODS) == []


def test_a_discovery_document_without_what_is_looked_for_has_no_such_kind(fake: FakeApi, api: Api) -> None:
    for answer in ({}, {"resources": None, "preferredVersion": None}, {"resources": [None, {}]}):
        fake.nonsense = (200, json.dumps(answer))
        assert not any(probe.is_served(api) for probe in PROBES) and kueue_api(api) is None


def test_a_change_that_is_not_one_ends_the_watch_as_an_outage_does(
    fake: FakeApi, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    for line in ("[]", "[" * 200_000, '{"type": "ADDED"}', '{"type": "ADDED", "object": {"metadata": null}}'):
        monkeypatch.setattr(Api, "_stream", lambda *_, line=line: iter([line]))
        with pytest.raises(ValueError, match="the response is "):
            list(api.watch(PODS, labels=""))


def test_a_response_that_never_ends_is_given_up(fake: FakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("urllib3", minversion="2.1")
    monkeypatch.setattr("genvalues.cluster.api.BODY_SECONDS", 0.1)
    fake.drips = True
    with pytest.raises(ServerAway, match=r"the response is not complete after 0\.1 s"):
        connect(NAMESPACE, patience=0.05, interval=0.05).list(PODS)


def test_a_servers_message_is_one_line_of_printable_characters(fake: FakeApi, api: Api) -> None:
    fake.nonsense = (401, json.dumps({"message": "token\n  expired \x1b[31m"}))
    with pytest.raises(NotAllowed) as raised:
        api.list(PODS)
    assert raised.value.message == "token expired ?[31m"
    fake.nonsense = (302, "[" * 200_000)
    with pytest.raises(ApiError, match=r"^302 Found$"):
        api.list(PODS)
