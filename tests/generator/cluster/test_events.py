"""Kubernetes Events about the stages, and what a refused or slow one does: nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from generator.cluster.fake_api import NAMESPACE, FakeApi
from generator.cluster.objects import job
from genvalues.cluster import events
from genvalues.cluster.api import Api, connect
from genvalues.cluster.events import FAILED, FINISHED, STARTED, event, events_of_release, first_line, stage_events
from genvalues.common.errors import UserError


def written(fake: FakeApi) -> list[tuple[str, str, str]]:
    """(reason, Job, message), oldest first."""
    found = [item for (plural, _), item in fake.objects.items() if plural == "events"]
    return [(each["reason"], each["involvedObject"]["name"], each["message"]) for each in found]


def test_a_stage_writes_its_start_and_how_it_ended(fake: FakeApi, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(events.JOB_UID, "uid-of-the-job")
    with stage_events(api, "gate", "demo-train-gate") as ending:
        ending.message = "nothing changed, skipped"
    assert written(fake) == [
        (STARTED, "demo-train-gate", "gate started"),
        (FINISHED, "demo-train-gate", "nothing changed, skipped"),
    ]
    about = [item["involvedObject"] for (plural, _), item in fake.objects.items() if plural == "events"]
    assert {one["uid"] for one in about} == {"uid-of-the-job"}, "kubectl describe looks for it"


def test_a_failure_is_a_warning_with_the_first_line_of_its_message(fake: FakeApi, api: Api) -> None:
    with pytest.raises(UserError), stage_events(api, "gate", "demo-train-gate"):
        raise UserError("rank 3 ended with status 2\nlast 40 lines\n  secret detail")
    [_, failed] = [item for (plural, _), item in fake.objects.items() if plural == "events"]
    assert (failed["reason"], failed["type"]) == (FAILED, "Warning")
    assert failed["message"] == "rank 3 ended with status 2"


def test_a_message_is_one_short_line_without_tokens() -> None:
    assert first_line("\n\n  \n") == "no message"
    assert "hf_abcdefgh" not in first_line("the token hf_abcdefghijkl is rejected")
    assert len(first_line("ü" * 5000).encode()) <= 1024
    assert "\x1b" not in first_line("\x1b[31mred")


def test_a_refused_right_fails_nothing(fake: FakeApi, api: Api) -> None:
    fake.forbidden.add(("create", "events"))
    with stage_events(api, "gate", "demo-train-gate"):
        pass
    assert not written(fake)


@pytest.mark.parametrize("away", [True, False], ids=["away", "a webhook is away"])
def test_an_api_server_that_does_not_answer_costs_seconds(
    fake: FakeApi, away: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "PATIENCE_SECONDS", 0.2)
    fake.away, fake.failing = away, {"create": "webhook away"}
    began = time.monotonic()
    with stage_events(connect(NAMESPACE, patience=300.0, interval=0.05), "gate", "demo-train-gate"):
        pass
    assert time.monotonic() - began < 5


# --- what the runner sees


@pytest.fixture
def seen(fake: FakeApi, api: Api) -> Callable[[Callable[[], None]], list[tuple[str, str, str]]]:
    def follow(happens: Callable[[], None]) -> list[tuple[str, str, str]]:
        with events_of_release(api, "demo-run", interval=0.02):
            happens()
            time.sleep(0.1)
        return written(fake)

    return follow


def begun(fake: FakeApi, stage: str, **changes: Any) -> str:
    name = f"demo-run-{stage}"
    fake.add("jobs", {**job(name, stage, release="demo-run"), **changes})
    fake.merge("jobs", name, {"status": {"startTime": "2025-01-01T00:00:00Z"}})
    return name


def ended_pod(fake: FakeApi, name: str, message: str, code: int = 0) -> None:
    over = {"exitCode": code, "message": message, "finishedAt": "2025-01-01T00:00:01Z"}
    fake.add(
        "pods",
        {
            "metadata": {
                "name": f"{name}-x",
                "labels": {"job-name": name},
                "ownerReferences": [{"name": name, "uid": "u", "kind": "Job"}],
            },
            "status": {"containerStatuses": [{"name": "x", "state": {"terminated": over}}]},
        },
    )


def test_the_runner_writes_what_the_stages_without_api_access_did(
    fake: FakeApi, seen: Callable[[Callable[[], None]], list[tuple[str, str, str]]]
) -> None:
    def happens() -> None:
        name = begun(fake, "tokenize")
        ended_pod(fake, name, "nothing changed, skipped")
        fake.set_condition("jobs", name, "Complete")
        name = begun(fake, "merge")
        ended_pod(fake, name, "a log line\nmerged/x: has another SHA-256\n", 2)
        fake.set_condition("jobs", name, "Failed", "exit code 2")

    assert seen(happens) == [
        (STARTED, "demo-run-tokenize", "tokenize started"),
        (FINISHED, "demo-run-tokenize", "nothing changed, skipped"),
        (STARTED, "demo-run-merge", "merge started"),
        (FAILED, "demo-run-merge", "merged/x: has another SHA-256"),
    ]


def test_jobs_that_ended_before_or_write_their_own_events_are_left_out(
    fake: FakeApi, seen: Callable[[Callable[[], None]], list[tuple[str, str, str]]]
) -> None:
    fake.set_condition("jobs", begun(fake, "tokenize"), "Complete")

    def happens() -> None:
        item = job("demo-run-train-gate", "train-gate", release="demo-run")
        item["metadata"]["annotations"][events.NEEDS_CLUSTER] = "true"
        fake.add("jobs", {**item, "status": {"startTime": "2025-01-01T00:00:00Z"}})

    assert seen(happens) == []


def test_the_runner_ends_although_events_are_refused(fake: FakeApi, api: Api) -> None:
    fake.forbidden |= {("create", "events"), ("list", "jobs.batch")}
    with events_of_release(api, "demo-run", interval=0.02):
        begun(fake, "tokenize")
    assert not written(fake)


def test_an_event_is_one_that_kubernetes_accepts() -> None:
    one = event("team-a", "gate", FAILED, "demo-train-gate", "uid", "no")
    assert one["metadata"]["namespace"] == one["involvedObject"]["namespace"] == "team-a"
    assert one["metadata"]["name"].startswith("demo-train-gate.")
    assert one["firstTimestamp"].endswith("Z") and one["count"] == 1
