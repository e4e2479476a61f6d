"""HyperPod's operator, and an older Trainer, run the pipeline as the newest ones do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from chart.manifests import Values, merged
from cluster.local import operators
from cluster.space import PATIENCE, Space, is_stage, stand_in, succeeded, uids
from cluster.test_hyperpod import latest
from cluster.test_training import TRAINING, check_training, put_inputs
from genvalues.cluster.objects import ends_of

BRIEF: Values = {"evaluation": {"enabled": False}}


@pytest.fixture(scope="module")
def operator_of_hyperpod() -> Iterator[None]:
    """HyperPod's Helm chart installs 1.7.0."""
    try:
        operators.install("1.7")
        yield
    finally:
        operators.install("1.9")


@pytest.fixture
def older_trainer() -> Iterator[None]:
    try:
        operators.install_trainer("2.0")
        yield
    finally:
        operators.install_trainer("2.2")


@pytest.mark.operator("pytorchjob")
def test_hyperpods_operator_runs_the_pipeline_and_failures_are_reported(
    space: Space, operator_of_hyperpod: None
) -> None:
    runs_the_pipeline_and_reports_failures(space, "pytorchjob")


@pytest.mark.operator("trainjob")
def test_an_older_trainer_runs_the_pipeline_and_failures_are_reported(space: Space, older_trainer: None) -> None:
    runs_the_pipeline_and_reports_failures(space, "trainjob")


def runs_the_pipeline_and_reports_failures(space: Space, workload: str) -> None:
    """A failed worker ends the release within 15 s, with its log; after a fix, finished stages are not repeated."""
    release = space.release()
    settings: Values = merged(BRIEF, {"workload": workload, "stages": {"train": {"backoffLimit": 0}}})

    client = release.start_install(merged(stand_in(train="echo my last words; exit 1"), settings))
    space.wait("a worker's status 1", lambda: 1 in statuses(space, "train"))
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


@pytest.mark.operator("pytorchjob")
def test_hyperpods_operator_trains_a_small_llama(
    new_space: Callable[..., Space], operator_of_hyperpod: None, tmp_path: Path
) -> None:
    space = new_space()
    put_inputs(space, tmp_path)
    steps = 60
    fewer: Values = {"training": {"maxSteps": steps, "saveSteps": steps, "evalSteps": steps // 3}}
    space.release().install(merged(TRAINING, BRIEF, fewer), seconds=3 * PATIENCE)
    check_training(space.volume, steps, tmp_path)
