"""The operators of HyperPod, and an older Trainer, run the pipeline as the newest ones do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from chart.manifests import Values, merged
from cluster.local import operators
from cluster.space import Space, is_stage, stand_in, succeeded, uids
from cluster.test_hyperpod import latest
from genvalues.cluster.objects import ends_of

pytestmark = pytest.mark.node


@pytest.fixture(params=["pytorchjob-1.7", "pytorchjob-1.8", "trainjob-2.0"])
def workload(request: pytest.FixtureRequest) -> Iterator[str]:
    """Install another version of an operator, for one test. HyperPod installs 1.7.0; AWS supports up to 1.8.1."""
    workload, version = request.param.split("-")
    install, newest = {
        "pytorchjob": (operators.install, "1.9"),
        "trainjob": (operators.install_trainer, "2.2"),
    }[workload]
    try:
        install(version)
        yield workload
    finally:
        install(newest)


def test_it_runs_the_pipeline_and_failures_are_reported(space: Space, workload: str) -> None:
    """A failed worker ends the release within 15 s, with its log; after a fix, finished stages are not repeated."""
    release = space.release()
    settings: Values = {
        "workload": workload,
        "stages": {"train": {"backoffLimit": 0}},
        "evaluation": {"enabled": False},
    }

    client = release.start_install(merged(stand_in(train="echo my last words; exit 1"), settings))
    space.wait("a worker's status 1", lambda: 1 in statuses(space, "train"), 180)
    ended = client.wait(15)
    assert ended.status == 1 and "ended with status 1" in ended.output and "my last words" in ended.output

    compiled = uids(latest(space, "Pod", "compile"))
    release.upgrade(merged(stand_in(), settings))
    assert uids(latest(space, "Pod", "compile")) == compiled
    assert all(succeeded(job) for job in space.list("jobs", release.instance))
    compile_ended = space.history.first(lambda o: o["kind"] == "Job" and is_stage(o, "compile-gate") and succeeded(o))
    first_pod = space.history.first(lambda o: o["kind"] == "Pod" and is_stage(o, "train"))
    assert compile_ended is not None and first_pod is not None and compile_ended <= first_pod


def statuses(space: Space, stage: str) -> list[int]:
    """Exit statuses of the containers of its pods so far."""
    return [end.code for pod in latest(space, "Pod", stage) for end in ends_of(pod)]
